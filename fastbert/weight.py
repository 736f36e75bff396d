"""Weight: the parameters of one matrix product, and the forms that backends derive from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Forms:
    """A cache, by key, of what backends derive from weights; its owner clears it when the weights have changed."""

    __slots__ = ("forms",)

    def __init__(self) -> None:
        self.forms: dict[Hashable, Any] = {}

    def form(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The form cached under `key`; made by make() and cached if there is none."""
        found = self.forms.get(key)
        if found is None:
            self.forms[key] = found = make()
        return found


class Weight(Forms):
    """The weight and bias of one matrix product: those of one linear layer, or of several with the same input.

    Several layers are stacked by rows: queries, keys and values are one product of (3E, E). The parameters are not
    moved. `forms` caches what a backend derives from them (packed panels, their transposes, 8-bit rows). It lives as
    long as this object; the owner, a plan, clears it when the parameters have changed.
    """

    __slots__ = ("__weakref__", "biases", "shape", "tensors", "weights")

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """weights: (N_i, K); biases: (N_i,) each, or all None."""
        super().__init__()
        self.weights = tuple(weights)
        self.biases = tuple(b for b in biases if b is not None)
        if self.biases and len(self.biases) < len(self.weights):
            raise ValueError(f"{len(self.biases)} of {len(self.weights)} weights have a bias; it must be all or none")
        self.tensors = self.weights + self.biases  # all parameters
        self.shape = sum(w.shape[0] for w in self.weights), self.weights[0].shape[1]  # (N, K)

    def release(self) -> tuple[Tensor, ...]:
        """Replaces the weights by placeholders (meta tensors) and returns those: only the forms are left."""
        empty = [torch.empty(w.shape, dtype=w.dtype, device="meta") for w in self.weights]
        self.weights = tuple(nn.Parameter(x, requires_grad=False) for x in empty)
        self.tensors = self.weights + self.biases
        return self.weights

    @property
    def is_placeholder(self) -> bool:
        """True if the memory of the weights has been released: see `ops.release`."""
        return self.weights[0].is_meta

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """The weight (N, K) and the bias (N,) as one tensor each; several are concatenated."""
        if len(self.weights) == 1:
            return self.weights[0], self.biases[0] if self.biases else None
        return torch.cat(self.weights), torch.cat(self.biases) if self.biases else None

    def split(self, dweight: Tensor | None, dbias: Tensor | None) -> list[Tensor | None]:
        """Gradients of the stacked weight and bias as gradients of `tensors`."""
        rows = [w.shape[0] for w in self.weights]
        parts = [None] * len(rows) if dweight is None else list(dweight.split(rows))
        if self.biases:
            parts += [None] * len(rows) if dbias is None else list(dbias.split(rows))
        return parts

    def nbytes(self) -> int:
        """The memory that the forms take, in addition to the parameters."""
        tensors = chain.from_iterable(form if isinstance(form, tuple) else (form,) for form in self.forms.values())
        return sum(t.nbytes for t in tensors if t is not None)


def as_weight(weight: Tensor | Weight, bias: Tensor | None) -> Weight:
    """A Weight as it is; a tensor and its bias as a Weight without an owner, whose forms last for one call."""
    return weight if isinstance(weight, Weight) else Weight((weight,), (bias,))
