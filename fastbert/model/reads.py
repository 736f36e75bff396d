"""What was read of modules to find something out: it holds for as long as reading again gives the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from operator import call, contains, getitem, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF = itemgetter(*_HOOKS)
_Getter = Callable[[dict[str, Any]], tuple]


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
        # Of the modules' own dictionaries, and of one of the tables in each: where, which, and by what getter.
        self._owners: list[nn.Module] = []
        self._own_getters: list[_Getter] = []
        self._holders: list[nn.Module] = []
        self._tables: list[str] = []
        self._getters: list[_Getter] = []
        self._own_values: list[Any] = []  # all that the getters returned, one behind the other
        self._values: list[Any] = []
        self._plain: list[nn.Module] = []
        self._kinds: list[type[nn.Module]] = []
        self._parameters: list[Tensor] = []
        self._state: list[Any] = []

    def attributes(self, module: nn.Module, *names: str) -> tuple:
        """An instance's own attributes."""
        get = _getter(names)
        self._owners.append(module)
        self._own_getters.append(get)
        self._own_values += get(vars(module))
        return get(vars(module))[: len(names)]

    def children(self, module: nn.Module, *names: str) -> tuple[nn.Module, ...]:
        return self._read(module, "_modules", names)

    def parameters(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Its weight and bias."""
        found = self._read(module, "_parameters", ("weight", "bias"))
        self._parameters += [p for p in found if p is not None]
        return found

    def is_plain(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        self._plain.append(module)
        self._kinds.append(kind)
        return is_plain(module, kind)

    def _read(self, module: nn.Module, table: str, names: tuple[str, ...]) -> tuple:
        get = _getter(names)
        values = get(vars(module)[table])
        self._holders.append(module)
        self._tables.append(table)
        self._getters.append(get)
        self._values += values
        return values[: len(names)]

    def settle(self) -> bool:
        """Notes the state of all that was read; False where some of it does not say when it changes."""
        if any(type(p) is not nn.Parameter or p.is_inference() for p in self._parameters):
            return False
        self._state = self._parameter_state()
        return True

    def hold(self) -> bool:
        """Whether everything is as it was when it settled: the same objects, plain as before, parameters unwritten."""
        plain = list(map(vars, self._plain))
        try:
            own = chain.from_iterable(map(call, self._own_getters, map(vars, self._owners)))
            tables = map(getitem, map(vars, self._holders), self._tables)
            read = chain.from_iterable(map(call, self._getters, tables))
            same = all(map(is_, own, self._own_values)) and all(map(is_, read, self._values))
        except KeyError:  # something is gone
            return False
        return (
            same
            and all(map(is_, map(type, self._plain), self._kinds))
            and not any(map(any, map(_HOOKS_OF, plain)))
            and not any(map(contains, plain, repeat("forward")))
            and self._parameter_state() == self._state
        )

    def _parameter_state(self) -> list[Any]:
        """What part of which memory each parameter is, and how often it was written to, by what counts that."""
        state: list[Any] = [p.data_ptr() for p in self._parameters]
        state += [p._version for p in self._parameters]
        state += [p.numel() for p in self._parameters]
        state += [p.stride() for p in self._parameters]
        return state


def _getter(names: tuple[str, ...]) -> _Getter:
    """Takes several entries of a table at once, as a tuple; itemgetter returns one alone bare, so it is taken twice."""
    return itemgetter(*names, *names[:1]) if names else lambda table: ()
