"""The checks that the ops share: each failure is one ValueError that names the argument, its value and the limit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastbert.packing import check_offsets_form, sequence_lengths
from fastbert.precision import PRECISIONS, QUANTIZED, SPLIT


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Checks the shape of `x`; None in `shape` means any size."""
    given = x.shape
    if given == shape:
        return
    if len(given) == len(shape):
        # Called some twenty times per layer: indexing takes a third of the time of zip.
        for i, wanted in enumerate(shape):
            if wanted is not None and given[i] != wanted:
                break
        else:
            return
    wanted_sizes = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(f"{op}: {name} has shape {tuple(given)}; it must be ({wanted_sizes})")


def check_floating(op: str, name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; it must be a floating-point tensor")


def check_one_dtype(op: str, **operands: Tensor | None) -> None:
    """Checks that the operands of a product have one dtype; the error, unlike torch's, names them."""
    present = {name: x.dtype for name, x in operands.items() if x is not None}
    if len(set(present.values())) > 1:
        raise ValueError(f"{op}: {_dtypes(present)}; they must be of one dtype, unless torch.autocast is on")


def check_norm_dtypes(op: str, summed: Mapping[str, Tensor | None], weight: Tensor, bias: Tensor | None) -> None:
    """Rejects a float64 weight or bias of a LayerNorm unless one of the summed tensors is float64."""
    if torch.float64 in (weight.dtype, weight.dtype if bias is None else bias.dtype):
        rows = {name: x.dtype for name, x in summed.items() if x is not None}
        if torch.float64 not in rows.values():
            given = _dtypes({**rows, "weight": weight.dtype, **({} if bias is None else {"bias": bias.dtype})})
            raise ValueError(f"{op}: {given}; weight and bias may be float64 only where {' or '.join(rows)} is")


def _dtypes(of: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in of.items())


def check_integer(op: str, name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype.itemsize < 4:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; it must be int32 or int64")


def check_offsets(op: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
    """Checks the dtype and shape of offsets and, on a CPU, their values.

    Reading them on a GPU would wait for the device; the kernels there stay within the tokens, whatever the offsets
    hold. A compiled graph checks when it runs.
    """
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        sequence_lengths(cu_seqlens, tokens, max_seqlen, op)
    else:
        check_offsets_form(cu_seqlens, op)


def check_probability(op: str, name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: {name} is {p}; it must be at least 0 and below 1")


def check_precision(op: str, precision: str | None, x: Tensor, *weights: Tensor | None) -> None:
    """Checks that a product's precision is known and allowed by its operands."""
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision in SPLIT and not torch.is_autocast_enabled(x.device.type):  # autocast overrides it, as in torch
        for t in (x, *weights):
            if t is not None and t.dtype != torch.float32:
                raise ValueError(f"{op}: precision is {precision!r} and an operand is {t.dtype}; it is for float32")
    no_gradient = precision in QUANTIZED and torch.is_grad_enabled()
    if no_gradient and any(t is not None and t.requires_grad for t in (x, *weights)):
        raise ValueError(f"{op}: precision is {precision!r}, which has no gradient, and an operand requires one")
