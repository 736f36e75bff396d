"""Seeds of the kernels' dropout masks, and the rows of a mask that a call's tokens have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

# The key of a mask's row is a hash of seed + row * _PER_ROW (csrc/cpu/simd/dropout.h): another first row is another
# seed.
_PER_ROW = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class MaskRows:
    """Where the tokens of a call are in the masks of a larger batch, and the generator of its seeds."""

    first: int
    generator: torch.Generator

    def draw(self) -> int:
        """The seed of the next mask, with the first row counted in, as uint64."""
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=self.generator))
        return (seed + self.first * _PER_ROW) % 2**64


_rows: ContextVar[MaskRows | None] = ContextVar("fastbert_mask_rows", default=None)


@contextmanager
def mask_rows(seed: int, first: int) -> Iterator[None]:
    """A context in which the masks of a forward are rows `first` on of those of a larger batch.

    A batch that is forwarded in parts, each with the number of tokens before it as `first`, and all with one seed, has
    the masks that it has as a whole, and each part has the same ones whenever it is forwarded again. On a GPU, each
    part has masks of its own, which a second forward repeats.
    """
    token = _rows.set(MaskRows(first, torch.Generator().manual_seed(seed)))
    try:
        yield
    finally:
        _rows.reset(token)


def current_rows() -> MaskRows | None:
    """Those of the innermost `mask_rows`."""
    return _rows.get()


def draw_seed(dropout_p: float) -> int:
    """A seed from torch's default generator, so that torch.manual_seed reproduces it, or by `mask_rows`; else 0."""
    if not dropout_p:
        return 0
    rows = _rows.get()
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if rows is None else rows.draw()
