"""Positions of the real tokens of a mask: for a host that needs their number, and without waiting for the device."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastbert import native, reference
from fastbert.ops import dispatch
from fastbert.ops._checks import check_shape
from fastbert.packing import PackedBatch, batch_from_mask


@overload
def read_mask(mask: Tensor) -> PackedBatch: ...
@overload
def read_mask(mask: Tensor, *, strict: bool) -> PackedBatch | None: ...
def read_mask(mask: Tensor, *, strict: bool = True) -> PackedBatch | None:
    """Reads a (B, S) mask of 0 and 1 with pads, holes and rows of zeros anywhere; waits for its device once.

    Returns:
        The batch; None if `strict` is False and the mask holds a value other than 0 and 1 (NaN included).

    Raises:
        ValueError: the mask is not 2-D; or, with `strict`, holds a value other than 0 and 1.
    """
    if torch.compiler.is_compiling():
        return batch_from_mask(mask, strict=strict)
    _, run = dispatch.choose("read_mask", mask.device.type, mask)
    batch = run(mask)
    return batch_from_mask(mask) if batch is None and strict else batch  # which raises with the wrong value


def _read_mask(mask: Tensor) -> PackedBatch | None:
    return batch_from_mask(mask, strict=False) if mask.device.type == "cpu" else read_mask_at_once(mask)


def read_mask_at_once(mask: Tensor) -> PackedBatch | None:
    """The reference for a mask on a device, by `pack_mask`: the host reads all that it needs in one transfer."""
    if mask.dim() != 2 or not mask.numel():
        return batch_from_mask(mask, strict=False)
    cu_seqlens, indices, _, bad = pack_mask(mask)
    lengths = cu_seqlens.diff()
    leading = ((mask[:, 0] == 0) & (lengths > 0)).any().to(torch.int32)
    known = torch.stack([cu_seqlens[-1], lengths.max(), leading, bad[0]]).tolist()
    return _batch(mask, (cu_seqlens, indices, *known))


def _batch(mask: Tensor, read: tuple[Tensor, Tensor, int, int, bool, bool] | None = None) -> PackedBatch | None:
    """The batch of a mask from what was `read` of it, by default by the extension."""
    cu_seqlens, indices, tokens, longest, leading_pads, bad = read or native.read_mask(mask)
    if bad:
        return None
    batch_size, seq_len = mask.shape
    if tokens == mask.numel():
        return PackedBatch(batch_size, seq_len, cu_seqlens, seq_len, None)
    return PackedBatch(batch_size, seq_len, cu_seqlens, longest, indices[:tokens], bool(leading_pads))


dispatch.implement("read_mask", "native", _batch, native.supports_read_mask)
dispatch.implement("read_mask", "reference", _read_mask)
dispatch.implement("pack_mask", "native", native.pack_mask, native.supports_pack_mask)
dispatch.implement("pack_mask", "reference", reference.pack_mask)
dispatch.implement("gather_rows", "native", native.gather_rows, native.supports_gather_rows)
dispatch.implement("gather_rows", "reference", reference.gather_rows)


def pack_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the real tokens of a (B, S) mask of 0 and 1; rows may have holes and left padding, or be all pads.

    Returns:
        cu_seqlens (B+1,) int32: the start of each sequence in the packed row, and the number of tokens T at the end;
        indices (B * S,) int64: the position of packed token t in the flattened batch, -1 from T on;
        places (B * S,) int64: the packed row of each position, -1 at a pad;
        bad (1,) int32: 1 if the mask holds a value other than 0 and 1, which counts as a pad; else 0.

    Raises:
        ValueError: the mask is not (B, S).
    """
    check_shape("pack_mask", "mask", mask, (None, None))
    _, run = dispatch.choose("pack_mask", mask.device.type, mask)
    return run(mask)


def gather_rows(x: Tensor, index: Tensor, *, fill: float = 0.0) -> Tensor:
    """x[index], and `fill` where the index is -1 or out of range: (N, ...), (M,) int64 -> (M, ...).

    With `indices` of `pack_mask` it packs, with `places` it unpacks.

    Raises:
        ValueError: index is not (M,).
    """
    check_shape("gather_rows", "index", index, (None,))
    _, run = dispatch.choose("gather_rows", x.device.type, x, index, fill=fill)
    return run(x, index, fill=fill)
