"""Packing without the host: a mask on a device says where its real tokens stand, and nobody waits for how many.

`fastbert.packing` is the same for callers who may know: there, tensors have as many rows as there are tokens.
"""

from __future__ import annotations

from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops._checks import check_shape

backend.implement("pack_mask", "native", native.pack_mask, native.supports_pack_mask)
backend.implement("pack_mask", "reference", reference.pack_mask)
backend.implement("take_rows", "native", native.take_rows, native.supports_take_rows)
backend.implement("take_rows", "reference", reference.take_rows)


def pack_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the real tokens of a (B, S) mask of 0 and 1 stand; rows may have holes and left padding, or be all pads.

    Returns:
        cu_seqlens (B+1,) int32: where each sequence starts in the packed row, and their number T at the end;
        indices (B * S,) int64: where packed token t stood in the flattened batch, -1 from T on;
        places (B * S,) int64: the packed row of each position, -1 at a pad;
        bad (1,) int32: 1 where the mask holds another value than 0 and 1, which counts as a pad; else 0.

    Raises:
        ValueError: the mask is not (B, S).
    """
    check_shape("pack_mask", "mask", mask, (None, None))
    _, run = backend.choose("pack_mask", mask.device.type, mask)
    return run(mask)


def take_rows(x: Tensor, index: Tensor, *, fill: float = 0.0) -> Tensor:
    """x[index], and `fill` where the index is -1 or otherwise none of x's rows: (N, ...), (M,) int64 -> (M, ...).

    With `indices` of `pack_mask` it packs, with `places` it unpacks.

    Raises:
        ValueError: index is not (M,).
    """
    check_shape("take_rows", "index", index, (None,))
    _, run = backend.choose("take_rows", x.device.type, x, index, fill=fill)
    return run(x, index, fill=fill)
