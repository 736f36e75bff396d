"""The poolings of inference.pooling where the states are on another device than the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.inference.pooling import POOLER


def pool(
    states: Tensor,
    lengths: Tensor,
    modes: Sequence[str],
    *,
    skip: int | Tensor = 0,
    pooler_output: Tensor | None = None,
) -> Tensor:
    """Pools the states of each text and concatenates the modes, (T, E) float -> (B, n * E); see inference.pooling.pool.

    Nothing waits for the device of the states, which is that of lengths (B,) int64. `skip` may be a number for each
    text, (B,) int64.
    """
    segments = _Segments(states, lengths, skip)
    vectors: list[Any] = [pooler_output if mode == POOLER else getattr(segments, mode)() for mode in modes]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


class _Segments:
    """The states of each text, and one method for each pooling."""

    def __init__(self, states: Tensor, lengths: Tensor, skip: int | Tensor) -> None:
        self._all, self._all_lengths, self._skip = states, lengths, skip
        self._ends = lengths.cumsum(0)
        self._states, self._lengths = states, lengths
        if isinstance(skip, Tensor) or skip:
            self._states = states[self._positions() >= self._of_tokens(skip)]
            self._lengths = (lengths - skip).clamp(min=0)

    def _positions(self) -> Tensor:
        """The position of each token in its text, (T)."""
        starts = torch.repeat_interleave(self._ends - self._all_lengths, self._all_lengths)
        return torch.arange(len(self._all), device=self._all.device) - starts

    def _of_tokens(self, numbers: int | Tensor) -> int | Tensor:
        """A number for each text as one for each token."""
        return torch.repeat_interleave(numbers, self._all_lengths) if isinstance(numbers, Tensor) else numbers

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        """Reduces each text's rows by `how`, (T, E) -> (B, E); zeros for a text without rows."""
        if not x.shape[0]:
            return x.new_zeros(len(self._lengths), x.shape[1])
        # Unlike index_add_, the order of each sum does not depend on the rest of the batch. `unsafe` skips a check of
        # the lengths that waits for the device.
        return torch.segment_reduce(x, how, lengths=self._lengths, axis=0, unsafe=True, initial=None)

    def _row(self, index: Tensor, exists: Tensor) -> Tensor:
        """Row `index` of all states, (B) -> (B, E); zeros where it does not exist."""
        if not self._all.shape[0]:
            return self._all.new_zeros(len(index), self._all.shape[1])
        return self._all[index.clamp(0, len(self._all) - 1)] * exists[:, None]

    def cls(self) -> Tensor:
        start = self._ends - self._all_lengths
        return self._row(start + torch.where(self._lengths > 0, self._skip, 0), self._all_lengths > 0)

    def lasttoken(self) -> Tensor:
        return self._row(self._ends - 1, self._lengths > 0)

    def max(self) -> Tensor:
        return self._reduce(self._states, "max").masked_fill((self._lengths == 0)[:, None], 0)

    def mean(self) -> Tensor:
        return self._reduce(self._states, "sum") / self._lengths.clamp(min=1)[:, None]

    def mean_sqrt_len_tokens(self) -> Tensor:
        return self._reduce(self._states, "sum") / self._lengths.clamp(min=1).to(self._states.dtype).sqrt()[:, None]

    def weightedmean(self) -> Tensor:
        positions = self._positions()
        weights = (positions[positions >= self._of_tokens(self._skip)] + 1).to(self._states.dtype)[:, None]
        return self._reduce(self._states * weights, "sum") / self._reduce(weights, "sum").clamp(min=1e-9)
