"""What was read of modules to find something out: it holds for as long as reading again gives the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from operator import call, contains, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF = itemgetter(*_HOOKS)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing else: no subclass, no hook, no forward of its own."""
    return type(module) is kind and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    return any(map(module.__dict__.get, (*_HOOKS, "forward")))


class Reads:
    """Reads modules by their own tables, and remembers what it read.

    Attributes of a module are slow: to look at all that a BERT's layers have to say takes as long as the products of a
    short text. To see, in one sweep, that nothing of it has changed takes a fifth of that.
    """

    def __init__(self) -> None:
        self._tables: list[dict[str, Any]] = []
        self._getters: list[Callable[[dict[str, Any]], tuple]] = []  # of several entries of a table at once
        self._values: list[Any] = []  # all that they returned, one behind the other
        self._plain: list[nn.Module] = []
        self._kinds: list[type[nn.Module]] = []
        self._parameters: list[Tensor] = []
        self._own: list[dict[str, Any]] = []  # of the plain ones
        self._state: list[int] = []

    def attributes(self, module: nn.Module, *names: str) -> tuple:
        """An instance's own attributes."""
        return self._read(module.__dict__, names)

    def children(self, module: nn.Module, *names: str) -> tuple[nn.Module, ...]:
        return self._read(module._modules, names)

    def parameters(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Its weight and bias."""
        found = self._read(module._parameters, ("weight", "bias"))
        self._parameters += [p for p in found if p is not None]
        return found

    def is_plain(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        self._plain.append(module)
        self._kinds.append(kind)
        return is_plain(module, kind)

    def _read(self, table: dict[str, Any], names: tuple[str, ...]) -> tuple:
        # A getter of one name returns it bare, so it is asked for twice.
        get = itemgetter(*names) if len(names) > 1 else itemgetter(*names, *names)
        values = get(table)
        self._tables.append(table)
        self._getters.append(get)
        self._values += values
        return values[: len(names)]

    def settle(self) -> bool:
        """Notes the state of all that was read; False where some of it does not say when it changes."""
        if any(type(p) is not nn.Parameter or p.is_inference() for p in self._parameters):
            return False
        self._own = [module.__dict__ for module in self._plain]
        self._state = self._parameter_state()
        return True

    def hold(self) -> bool:
        """Whether everything is as it was when it settled: the same objects, plain as before, parameters unwritten."""
        try:
            same = all(map(is_, chain.from_iterable(map(call, self._getters, self._tables)), self._values))
        except KeyError:  # something is gone
            return False
        return (
            same
            and all(map(is_, map(type, self._plain), self._kinds))
            and not any(map(any, map(_HOOKS_OF, self._own)))
            and not any(map(contains, self._own, repeat("forward")))
            and self._parameter_state() == self._state
        )

    def _parameter_state(self) -> list[int]:
        """Where each parameter lies and how often it was written to, by what counts that."""
        return [p.data_ptr() for p in self._parameters] + [p._version for p in self._parameters]
