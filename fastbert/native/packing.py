"""Packing by the extension, on the host and on a GPU: checks, then pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.extension import C, available, fresh, has_memory, pointer_reason

# By dtype of a mask on the host: the bits of a 1, and the mask of the bits that are 0 in a zero.
_INTEGERS = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
_INTEGERS += [torch.int8, torch.int16, torch.int32, torch.int64]
MASK_BITS = {
    **dict.fromkeys(_INTEGERS, (1, 2**64 - 1)),
    torch.float16: (0x3C00, 2**15 - 1),
    torch.bfloat16: (0x3F80, 2**15 - 1),
    torch.float32: (0x3F800000, 2**31 - 1),
    torch.float64: (0x3FF0000000000000, 2**63 - 1),
}
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
_MOST = 2**31 - 1  # limit of the positions of a batch and of the rows of a result


def supports_read_mask(mask: Tensor) -> str | None:
    """None if `read_mask` takes this mask, else the reason why not."""
    if C is None:
        return available()
    if mask.device.type != "cpu":
        return f"device {mask.device.type}"
    if reason := pointer_reason():
        return reason
    if mask.dim() != 2:
        return "not (batch, sequence)"
    if not has_memory(mask):
        return f"a {type(mask).__name__} without memory of its own"
    if mask.dtype not in MASK_BITS:
        return f"dtype {mask.dtype}"
    return "more than 2^31 - 1 positions" if mask.numel() > _MOST else None


def read_mask(mask: Tensor) -> tuple[Tensor, Tensor, int, int, bool, bool]:
    """Reads a (B, S) mask on the host in one pass, for `ops.read_mask`.

    Returns:
        cu_seqlens (B+1,) int32 and indices (B * S,) int64, as from `ops.pack_mask`, but undefined after the last
        token; the number of tokens; the longest sequence; whether one begins with a pad; whether a value is neither 0
        nor 1, which counts as a pad.

    The caller has checked `supports_read_mask`.
    """
    (batch_size, seq_len), values = mask.shape, mask.contiguous()
    cu_seqlens = fresh(mask, batch_size + 1, dtype=torch.int32)
    indices = fresh(mask, batch_size * seq_len, dtype=torch.int64)
    found = C.read_mask_cpu(
        values.element_size(),
        *MASK_BITS[mask.dtype],
        batch_size,
        seq_len,
        values.data_ptr(),
        cu_seqlens.data_ptr(),
        indices.data_ptr(),
    )
    return cu_seqlens, indices, *found


def bounds(ids: Tensor) -> tuple[int, int] | None:
    """The minimum and maximum of at least one int32 or int64 id on the host; None for other tensors."""
    if C is None or ids.dtype not in (torch.int32, torch.int64) or not ids.is_cpu or not has_memory(ids):
        return None
    if not ids.is_contiguous():
        return None
    return C.bounds_cpu(ids.element_size(), ids.numel(), ids.data_ptr())


def supports_pack_mask(mask: Tensor) -> str | None:
    """None if `pack_mask` takes this mask, else the reason why not."""
    if reason := _cuda_reason(mask):
        return reason
    if mask.dtype not in _MASKS:
        return f"dtype {mask.dtype}"
    return "more than 2^31 - 1 positions" if mask.numel() > _MOST else None


def supports_gather_rows(x: Tensor, index: Tensor, *, fill: float = 0.0) -> str | None:
    """None if `gather_rows` takes these arguments, else the reason why not."""
    if reason := _cuda_reason(x):
        return reason
    if torch.is_grad_enabled() and x.requires_grad:
        return "no backward"
    if fill:
        return "it fills with zeros only"
    if index.dtype != torch.int64 or index.device != x.device or not index.is_contiguous():
        return f"index is no contiguous int64 tensor on {x.device}"
    if x.numel() and not x[0].is_contiguous():
        return "rows not contiguous"
    return "more than 2^31 - 1 rows" if index.numel() > _MOST else None


def pack_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The positions of the real tokens of a (B, S) mask on a GPU, in one to three launches; see `ops.pack_mask`.

    The caller has checked `supports_pack_mask`.

    Raises:
        RuntimeError: a CUDA launch failed.
    """
    (batch_size, seq_len), mask = mask.shape, mask.contiguous()
    positions = batch_size * seq_len
    offsets = fresh(mask, batch_size + 2, dtype=torch.int32)
    cu_seqlens, bad = offsets[:-1], offsets[-1:]
    found = fresh(mask, 2 * positions + C.pack_mask_workspace(positions), dtype=torch.int64)
    indices, places, workspace = found[:positions], found[positions : 2 * positions], found[2 * positions :]
    C.pack_mask_cuda(
        mask.element_size(),
        batch_size,
        seq_len,
        mask.data_ptr(),
        cu_seqlens.data_ptr(),
        indices.data_ptr(),
        places.data_ptr(),
        bad.data_ptr(),
        workspace.data_ptr(),
        *_where(mask),
    )
    return cu_seqlens, indices, places, bad


def gather_rows(x: Tensor, index: Tensor, *, fill: float = 0.0) -> Tensor:
    """x[index], with rows of zeros where the index is out of range: (N, ...), (M,) int64 -> (M, ...), on a GPU.

    The caller has checked `supports_gather_rows`.

    Raises:
        RuntimeError: a CUDA launch failed.
    """
    y = fresh(x, len(index), *x.shape[1:])
    size = x.element_size()
    row_bytes = y.stride(0) * size if x.dim() > 1 else size
    C.gather_rows_cuda(
        len(index), len(x), row_bytes, x.data_ptr(), x.stride(0) * size, index.data_ptr(), y.data_ptr(), *_where(x)
    )
    return y


def _cuda_reason(x: Tensor) -> str | None:
    if C is None:
        return available()
    if x.device.type != "cuda":
        return f"device {x.device.type}"
    if not C.has_cuda:
        return "built without CUDA"
    return pointer_reason()


def _where(x: Tensor) -> tuple[int, int]:
    """The device and the stream of a launch."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
