"""Packing: the real tokens of a padded batch are gathered into one row, once, and scattered back once.

The names are flash-attention's: `cu_seqlens` int32 (B+1,) is the start of each sequence in the packed row,
`max_seqlen` the longest length, `indices` int64 (T,) the position of each packed token in the flattened
(B * S,) batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import sub
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """The positions of the real tokens of a (B, S) batch.

    `indices` is None when no token of the batch is a pad, so that packing is a reshape.
    """

    batch_size: int  # B
    seq_len: int  # S
    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int
    indices: Tensor | None  # (T,) int64
    leading_pads: bool = False  # whether a row begins with a pad and has tokens

    @property
    def lengths(self) -> Tensor:
        """The number of real tokens of each row, (B,)."""
        return self.cu_seqlens.diff()

    def mask(self) -> Tensor:
        """The 0/1 mask this batch came from, (B, S) bool."""
        if self.indices is None:
            return self.cu_seqlens.new_ones(self.batch_size, self.seq_len, dtype=torch.bool)
        mask = self.cu_seqlens.new_zeros(self.batch_size * self.seq_len, dtype=torch.bool)
        mask[self.indices] = True
        return mask.view(self.batch_size, self.seq_len)


def full_batch(batch_size: int, seq_len: int, device: torch.device) -> PackedBatch:
    """A batch without a pad: B sequences of S tokens."""
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
    return PackedBatch(batch_size, seq_len, cu_seqlens, seq_len, None)


@overload
def batch_from_mask(mask: Tensor) -> PackedBatch: ...
@overload
def batch_from_mask(mask: Tensor, *, strict: bool) -> PackedBatch | None: ...
def batch_from_mask(mask: Tensor, *, strict: bool = True) -> PackedBatch | None:
    """Reads a (B, S) mask of 0 and 1, which may be right- or left-padded and have holes or rows of zeros.

    Returns:
        The batch; None if `strict` is False and the mask holds a value other than 0 and 1 (NaN included).

    Raises:
        ValueError: the mask is not 2-D or, with `strict`, holds a value other than 0 and 1 (NaN included).
    """
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it must be (batch, sequence)")
    batch_size, seq_len = mask.shape
    real = mask if mask.dtype == torch.bool else mask == 1
    if mask.dtype != torch.bool:
        neither = mask[~real & (mask != 0)]
        if neither.numel() and not strict:
            return None
        if neither.numel():
            raise ValueError(f"attention_mask holds {neither[0].item()}; its values must be 0 or 1")
    lengths = real.sum(dim=1, dtype=torch.int32)
    # The host needs the number of tokens: on a GPU, this and the check above wait for the device.
    total, longest = lengths.sum().item(), int(lengths.max()) if batch_size else 0
    if total == batch_size * seq_len:
        return full_batch(batch_size, seq_len, mask.device)
    leading = bool((~real[:, 0] & (lengths > 0)).any())
    cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(lengths, dim=0, dtype=torch.int32, out=cu_seqlens[1:])
    indices = real.reshape(-1).nonzero().squeeze(1)
    return PackedBatch(batch_size, seq_len, cu_seqlens, longest, indices, leading)


def sequence_lengths(cu_seqlens: Tensor, total: int, max_seqlen: int | None = None, op: str = "") -> list[int]:
    """The lengths of the sequences of a row of `total` packed tokens; on a GPU the host waits for them.

    Raises:
        ValueError: cu_seqlens is not an int32 or int64 vector of at least one offset, does not rise from 0 to `total`,
            or holds a sequence longer than max_seqlen. The message begins with `op`.
    """
    check_offsets_form(cu_seqlens, op)
    offsets, before = cu_seqlens.tolist(), f"{op}: " if op else ""
    lengths = list(map(sub, offsets[1:], offsets))
    if offsets[0] != 0 or offsets[-1] != total or (lengths and min(lengths) < 0):
        least = [0, *accumulate(offsets[:-1], max)]
        wrong = [b for b, (low, x) in enumerate(zip(least, offsets, strict=True)) if not low <= x <= total * (b > 0)]
        b = wrong[0] if wrong else len(lengths)
        raise ValueError(
            f"{before}cu_seqlens[{b}] is {offsets[b]}; offsets must rise from 0 to the number of tokens, {total}"
        )
    if max_seqlen is not None and lengths and (longest := max(lengths)) > max_seqlen:
        raise ValueError(f"{before}cu_seqlens holds a sequence of {longest} tokens; max_seqlen is {max_seqlen}")
    return lengths


def check_offsets_form(cu_seqlens: Tensor, op: str = "") -> None:
    """Checks the dtype and shape of cu_seqlens, not its values."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(
            f"{f'{op}: ' if op else ''}cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            "it must be an int32 or int64 vector of batch + 1 offsets"
        )


def batch_from_cu_seqlens(cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> PackedBatch:
    """The batch of a row that is already packed: `total` tokens in the sequences given by `cu_seqlens`.

    Its padded shape is (B, longest length), right-padded.

    Raises:
        ValueError: as `sequence_lengths`.
    """
    lengths = sequence_lengths(cu_seqlens, total, max_seqlen)
    longest = max(lengths, default=0)
    if longest * len(lengths) == total:
        return full_batch(len(lengths), longest, cu_seqlens.device)
    cu_seqlens = cu_seqlens.to(torch.int32)
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), cu_seqlens.diff())
    columns = torch.arange(total, device=cu_seqlens.device) - cu_seqlens[:-1].long()[rows]
    return PackedBatch(len(lengths), longest, cu_seqlens, longest, rows * longest + columns)


def pack(x: Tensor, batch: PackedBatch) -> Tensor:
    """Gathers the real tokens: (B, S, ...) -> (T, ...)."""
    flat = x.reshape(batch.batch_size * batch.seq_len, *x.shape[2:])
    return flat if batch.indices is None else flat.index_select(0, batch.indices)


def unpack(x: Tensor, batch: PackedBatch, fill: float = 0.0) -> Tensor:
    """Scatters the real tokens back: (T, ...) -> (B, S, ...), `fill` at the pads."""
    if batch.indices is not None:
        flat = x.new_full((batch.batch_size * batch.seq_len, *x.shape[1:]), fill)
        x = flat.index_copy_(0, batch.indices, x)
    return x.reshape(batch.batch_size, batch.seq_len, *x.shape[1:])
