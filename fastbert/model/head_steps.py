"""The modules of a head by their paths in the model: what is applied in which order, and what is called as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastbert import ops
from fastbert.model.layer import is_plain
from fastbert.model.modules import Part, place
from fastbert.model.plan import project

Steps = tuple[tuple[str, str | None], ...]  # names of modules, and the activation after each


class HeadPart(nn.Module):
    """A module of a head. Its forward applies, in order, the modules that `steps` name."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:  # (T, K) -> (T, N)
        return _apply(self, self.steps, x)


def _apply(owner: nn.Module, steps: Steps, x: Tensor) -> Tensor:
    for name, activation in steps:
        part: Any = owner.get_submodule(name)
        if is_plain(part, nn.LayerNorm):
            x = ops.add_layer_norm(x, None, part.weight, part.bias, eps=part.eps)
        elif isinstance(part, HeadPart | nn.Dropout):
            x = part(x)
        else:
            x = project(part, x, activation)
    return x


class Head:
    """The two ends of a model's head, each within a module or in the model itself; a module is called, hooks and all.

    Args:
        first, last: the paths of the modules, "" for the model, and the steps within them. Where the modules differ,
            the last one begins with the first.
    """

    def __init__(self, model: nn.Module, first: tuple[str, Steps], last: tuple[str, Steps]) -> None:
        self.model, (inner, steps), (outer, more) = model, first, last
        self.together = inner == outer
        self.first = inner, steps
        self.last = outer, (*steps, *more) if self.together else ((inner.removeprefix(f"{outer}."), None), *more)

    def place(self, containers: Sequence[str]) -> None:
        """Makes the modules of the head, which hold nothing yet; the others of `containers` are never called."""
        steps = dict([self.first, self.last])
        for path in containers:
            place(self.model, path, HeadPart(steps[path]) if path in steps else Part())

    def run_first(self, x: Tensor) -> Tensor:
        path, steps = self.first
        return _apply(self.model.get_submodule(path), steps, x) if self.together else self._run(path, steps, x)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(*self.last, x)

    def _run(self, path: str, steps: Steps, x: Tensor) -> Tensor:
        owner = self.model.get_submodule(path)
        return owner(x) if isinstance(owner, HeadPart) else _apply(owner, steps, x)


def split_path(path: str) -> tuple[str, str]:
    """The path of the owner, "" for the model, and the name in it."""
    owner, _, name = path.rpartition(".")
    return owner, name
