"""attention by Triton: its autograd function, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastbert.ops._autograd import needs_gradient
from fastbert.ops._triton import draw_seed, reason_against
from fastbert.ops.attention.reference import second_derivative

if TYPE_CHECKING:
    from fastbert.kernels.schedule import TileSchedule


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float | None,
        dropout_p: float,
        window: int | None,
    ) -> Tensor:
        from fastbert.kernels.attention import attention_fwd

        qkv = rows_in_memory(qkv)
        ctx.arguments = triton_arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p, window=window)
        ctx.max_seqlen = max_seqlen
        out, statistics = attention_fwd(qkv, cu_seqlens, max_seqlen, bias=bias, **ctx.arguments)
        ctx.save_for_backward(qkv, bias, out, statistics, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, out, statistics, cu_seqlens = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *second_derivative(qkv, bias, cu_seqlens, dout, ctx.arguments), None, None, None, None, None
        given = qkv, bias, out, statistics, cu_seqlens, ctx.max_seqlen
        return *triton_gradients(dout, *given, ctx.arguments), None, None, None, None, None


def run_triton(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None,
    dropout_p: float,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    from fastbert.kernels.attention import attention_fwd

    if needs_gradient(qkv, bias):
        return _TritonAttention.apply(qkv, bias, cu_seqlens, max_seqlen, scale, dropout_p, window)
    qkv = rows_in_memory(qkv)
    arguments = triton_arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p, window=window)
    return attention_fwd(qkv, cu_seqlens, max_seqlen, bias=bias, **arguments)[0]


def triton_gradients(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of qkv and of the bias, by the forward's `triton_arguments`."""
    from fastbert.kernels.attention_bwd import attention_bwd

    # Not empty_like: a bias may be a view of a table, and the kernel writes rows.
    dbias = None if bias is None else bias.new_empty(bias.shape, dtype=torch.float32)
    given = rows_in_memory(dout), qkv, out, statistics, cu_seqlens, max_seqlen
    dqkv = attention_bwd(*given, bias=bias, dbias=dbias, **arguments)
    return dqkv, None if bias is None or dbias is None else dbias.to(bias.dtype)


def triton_arguments(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None = None,
    window: int | None = None,
) -> dict[str, Any]:
    """The arguments shared by the launchers of forward and backward; with dropout and no seed, one is drawn."""
    return {
        "scale": qkv.shape[-1] ** -0.5 if scale is None else scale,
        "dropout_p": dropout_p,
        "window": window,
        "seed": draw_seed(qkv.device) if dropout_p and seed is None else seed,
        "precision": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "schedule": _schedule(qkv, cu_seqlens, max_seqlen),
    }


def rows_in_memory(x: Tensor) -> Tensor:
    """x as the kernels read it: the last dimension contiguous, tokens without overlap, 128 of them within an int32."""
    if x.is_contiguous():
        return x
    width = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if x.stride(-1) == 1 and width <= x.stride(0) < 2**24 else x.contiguous()


def supports_triton(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None,
    dropout_p: float,
    bias: Tensor | None = None,
    window: int | None = None,
) -> str | None:
    reason = reason_against(qkv)
    if reason is not None:
        return reason
    if bias is not None and bias.device != qkv.device:
        return f"a bias on {bias.device}; it takes one device"
    if qkv.shape[-1] > 128:
        return f"head dim {qkv.shape[-1]}; it takes up to 128"
    if qkv.shape[2] > 65535:
        return f"{qkv.shape[2]} heads; it takes up to 65535"
    if cu_seqlens.device != qkv.device:
        return f"cu_seqlens on {cu_seqlens.device}; it takes one device"
    if scale is not None and not scale > 0:
        return f"scale {scale}; it must be above 0"
    return None


class _Shared:
    """The tile schedule shared by the layers of one run through a model: see `shared_schedules`."""

    def __init__(self) -> None:
        self.cu_seqlens: Tensor | None = None
        self.key: tuple | None = None
        self.schedule: TileSchedule | None = None


_shared: ContextVar[_Shared | None] = ContextVar("fastbert_schedule", default=None)


def _schedule(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> TileSchedule:
    from fastbert.kernels.attention import attention_schedule

    shared = _shared.get()
    if shared is None:
        return attention_schedule(qkv, cu_seqlens, max_seqlen)
    key = len(qkv), qkv.dtype, qkv.shape[-1], max_seqlen
    if shared.cu_seqlens is not cu_seqlens or shared.key != key:
        shared.cu_seqlens, shared.key = cu_seqlens, key
        shared.schedule = attention_schedule(qkv, cu_seqlens, max_seqlen)
    return shared.schedule


@contextmanager
def shared_schedules() -> Iterator[None]:
    """A context in which all attention over one cu_seqlens shares one schedule; cu_seqlens must not change meanwhile.

    For one run through a model's layers: the first layer makes the schedule, in a CUDA graph too, and it is dropped
    when the run is over.
    """
    token = _shared.set(_Shared())
    try:
        yield
    finally:
        _shared.reset(token)
