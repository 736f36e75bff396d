"""What was read of modules to find something out: it holds for as long as reading again gives the same."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing else: no subclass, no hook, no forward of its own."""
    return type(module) is kind and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    return any(map(module.__dict__.get, (*_HOOKS, "forward")))


class Reads:
    """Reads modules by their own tables, and remembers what it read.

    Attributes of a module are slow: to look at all that a BERT's layers have to say takes as long as the products of a
    short text. To see, in one sweep, that nothing of it has changed takes a tenth of that.
    """

    def __init__(self) -> None:
        self._tables: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._plain: list[nn.Module] = []
        self._kinds: list[type[nn.Module]] = []
        self._hooks: list[tuple[dict[str, Any], str]] = []
        self._parameters: list[Tensor] = []
        self._state: list[int] | None = None

    def attribute(self, module: nn.Module, name: str) -> Any:
        """An instance's own attribute; None where it has none."""
        return self._read(module.__dict__, name)

    def child(self, module: nn.Module, name: str) -> nn.Module:
        return self._read(module._modules, name)

    def parameter(self, module: nn.Module, name: str) -> Tensor | None:
        parameter = self._read(module._parameters, name)
        if parameter is not None:
            self._parameters.append(parameter)
        return parameter

    def is_plain(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        self._plain.append(module)
        self._kinds.append(kind)
        return is_plain(module, kind)

    def _read(self, table: dict[str, Any], name: str) -> Any:
        value = table.get(name)
        self._tables.append(table)
        self._names.append(name)
        self._values.append(value)
        return value

    def settle(self) -> bool:
        """Notes the state of all that was read; False where some of it does not say when it changes."""
        if any(type(p) is not nn.Parameter or p.is_inference() for p in self._parameters):
            return False
        own = [module.__dict__ for module in self._plain]
        self._hooks = [(table, name) for table in own for name in (*_HOOKS, "forward")]
        self._state = self._parameter_state()
        return True

    def hold(self) -> bool:
        """Whether everything is as it was when it settled: the same objects, plain as before, parameters unwritten."""
        return (
            all(map(is_, map(dict.get, self._tables, self._names), self._values))
            and all(map(is_, map(type, self._plain), self._kinds))
            and not any([table.get(name) for table, name in self._hooks])
            and self._parameter_state() == self._state
        )

    def _parameter_state(self) -> list[int]:
        """Where each parameter lies and how often it was written to, by what counts that."""
        return [p.data_ptr() for p in self._parameters] + [p._version for p in self._parameters]
