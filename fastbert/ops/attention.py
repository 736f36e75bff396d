"""attention: softmax(scale q k^T) v within each sequence of a packed row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastbert import backend, native, reference
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import differentiable_gradients, needs_gradient
from fastbert.ops._checks import check_floating, check_offsets, check_probability, check_shape
from fastbert.ops._triton import reason_against

if TYPE_CHECKING:
    from fastbert.kernels.schedule import TileSchedule


def _second(qkv: Tensor, cu_seqlens: Tensor, dy: Tensor, constants: dict[str, Any]) -> Tensor | None:
    forward = partial(reference.attention_formula, cu_seqlens=cu_seqlens, scale=constants["scale"])
    return differentiable_gradients("attention", forward, (qkv,), (True,), dy, constants["dropout_p"])[0]


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        ctx.constants = {"scale": scale, "dropout_p": dropout_p, "seed": native.draw_seed(dropout_p)}
        y, statistics = native.attention_training(qkv, cu_seqlens, **ctx.constants)
        ctx.save_for_backward(qkv, cu_seqlens, y, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _second(ctx.saved_tensors[0], ctx.saved_tensors[1], dy, ctx.constants), None, None, None
        return native.attention_backward(dy, *ctx.saved_tensors, **ctx.constants), None, None, None


class _DifferentiableTwice(torch.autograd.Function):
    """`out` as it is, which torch's fused attention made of qkv; that has a gradient, of which there is no derivative.

    Where one is asked for, the gradient is the formula's, and none goes through `out`. So it is in fp32 on a CPU,
    where torch's fused gradient loses digits to large scores: it keeps the logarithm of the sum alone.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, out: Tensor, cu_seqlens: Tensor, scale: float | None, dropout_p: float
    ) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.constants = {"scale": scale, "dropout_p": dropout_p}
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _second(ctx.saved_tensors[0], ctx.saved_tensors[1], dout, ctx.constants), None, None, None, None
        if dout.is_cpu and dout.dtype == torch.float32 and not ctx.constants["dropout_p"]:
            qkv, cu_seqlens = ctx.saved_tensors
            dqkv = reference.attention_backward(dout, qkv, cu_seqlens, len(qkv), scale=ctx.constants["scale"])
            return dqkv, None, None, None, None
        return None, dout, None, None, None


def _reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float) -> Tensor:
    out = reference.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)
    if not needs_gradient(qkv) or torch.compiler.is_compiling() or torch.jit.is_tracing() or reference.is_transformed():
        return out
    return _DifferentiableTwice.apply(qkv, out, cu_seqlens, scale, dropout_p)


def _native(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float) -> Tensor:
    if needs_gradient(qkv):
        return _NativeAttention.apply(qkv, cu_seqlens, scale, dropout_p)
    return native.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, dropout_p: float
    ) -> Tensor:
        from fastbert.kernels.attention import attention_fwd

        qkv = _rows(qkv)
        ctx.arguments = _triton_arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p)
        ctx.max_seqlen = max_seqlen
        out, statistics = attention_fwd(qkv, cu_seqlens, max_seqlen, **ctx.arguments)
        ctx.save_for_backward(qkv, out, statistics, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from fastbert.kernels.attention_backward import attention_bwd

        if torch.is_grad_enabled():
            dqkv = _second(ctx.saved_tensors[0], ctx.saved_tensors[3], dout, ctx.arguments)
            return dqkv, None, None, None, None
        dqkv = attention_bwd(_rows(dout), *ctx.saved_tensors, ctx.max_seqlen, **ctx.arguments)
        return dqkv, None, None, None, None


def _triton(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float) -> Tensor:
    from fastbert.kernels.attention import attention_fwd

    if needs_gradient(qkv):
        return _TritonAttention.apply(qkv, cu_seqlens, max_seqlen, scale, dropout_p)
    qkv = _rows(qkv)
    out, _ = attention_fwd(
        qkv, cu_seqlens, max_seqlen, **_triton_arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p)
    )
    return out


def _triton_arguments(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None = None,
) -> dict[str, Any]:
    """What the launchers of forward and backward are told alike; with dropout and no seed, one is drawn."""
    from fastbert.kernels.dropout import draw_seed

    return {
        "scale": qkv.shape[-1] ** -0.5 if scale is None else scale,
        "dropout_p": dropout_p,
        "seed": draw_seed(qkv.device) if dropout_p and seed is None else seed,
        "precision": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "schedule": _schedule(qkv, cu_seqlens, max_seqlen),
    }


def _rows(x: Tensor) -> Tensor:
    """x as the kernels read it: heads' columns contiguous, token behind token, 128 of them within an int32."""
    if x.is_contiguous():
        return x
    width = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if x.stride(-1) == 1 and width <= x.stride(0) < 2**24 else x.contiguous()


def _supports_triton(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None, dropout_p: float
) -> str | None:
    reason = reason_against(qkv)
    if reason is not None:
        return reason
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
    """The tile schedule that the layers of one run through a model have in common: see `shared_schedules`."""

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
    """Within it every attention over one cu_seqlens shares one schedule; no one may write to cu_seqlens meanwhile.

    For one run through a model's layers: the first layer makes the schedule, in a CUDA graph too, and nothing is kept
    when the run is over.
    """
    token = _shared.set(_Shared())
    try:
        yield
    finally:
        _shared.reset(token)


backend.implement("attention", "triton", _triton, _supports_triton)
backend.implement("attention", "native", _native, native.supports_attention)
backend.implement("attention", "reference", _reference)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    checked: bool = False,
) -> Tensor:
    """(T, 3, H, D) -> (T, H, D); sequence b is rows cu_seqlens[b] to cu_seqlens[b+1] and sees only itself.

    Args:
        qkv: queries, keys and values of every token.
        cu_seqlens: int32 (B+1,), from 0 to T.
        max_seqlen: at least the longest sequence.
        scale: what the scores are multiplied by; None is D ** -0.5.
        dropout_p: the share of probabilities dropped.
        checked: cu_seqlens and max_seqlen were checked before, as by `packing`, and are not again.

    Offsets on a GPU are not read by the host, which would wait for them: there a token after the last sequence belongs
    to none and gets zeros, and offsets that do not rise are kept within 0 to T.

    Raises:
        ValueError: a shape, dtype or probability that does not fit; offsets on a CPU that do not rise from 0 to T or
            hold a sequence longer than max_seqlen.
    """
    check_shape("attention", "qkv", qkv, (None, 3, None, None))
    check_floating("attention", "qkv", qkv)
    if not checked:
        check_offsets("attention", cu_seqlens, len(qkv), max_seqlen)
    check_probability("attention", "dropout_p", dropout_p)
    if autocast_is_on(qkv):
        with autocast_off(qkv):
            return attention(cast(qkv)[0], cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p, checked=True)
    kwargs = {"scale": scale, "dropout_p": dropout_p}
    name, run = backend.choose("attention", qkv.device.type, qkv, cu_seqlens, max_seqlen, **kwargs)
    if torch.compiler.is_compiling() and not (dropout_p and name == "reference"):
        # The lengths are data: a compiled graph holds the op whole; or, with dropout, breaks at the reference.
        # max_seqlen is a number, and a graph that holds one is made anew for the next: T bounds it as well.
        seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p else None
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.fastbert.attention(name, needs_gradient(qkv), qkv, cu_seqlens, scale, dropout_p, seed)[0]
    return run(qkv, cu_seqlens, max_seqlen, **kwargs)


# What a compiled graph holds. `backend` is the one that was chosen when the graph was made; `saved` is what its
# backward reads beside the output, where `training`: see the launchers.


@torch.library.custom_op("fastbert::attention", mutates_args=())
def _attention_op(
    backend: str,
    training: bool,
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_offsets("attention", cu_seqlens, len(qkv), len(qkv))
    if backend == "triton":
        from fastbert.kernels.attention import attention_fwd

        qkv = _rows(qkv)
        arguments = _triton_arguments(qkv, cu_seqlens, len(qkv), scale, dropout_p, seed)
        out, saved = attention_fwd(qkv, cu_seqlens, len(qkv), **arguments)
    elif backend == "native" and (training or dropout_p):
        out, saved = native.attention_training(qkv, cu_seqlens, scale=scale, dropout_p=dropout_p, seed=_number(seed))
    elif backend == "native":
        out, saved = native.attention(qkv, cu_seqlens, len(qkv), scale=scale), None
    else:
        out, saved = reference.attention(qkv, cu_seqlens, len(qkv), scale=scale).contiguous(), None
    return out, _saved(backend, training, qkv) if saved is None or not training else saved


@_attention_op.register_fake
def _(
    backend: str,
    training: bool,
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:]), _saved(backend, training, qkv)


def _saved(backend: str, training: bool, qkv: Tensor) -> Tensor:
    T, _, H, _ = qkv.shape
    if backend == "reference" or not training:
        return qkv.new_empty(0, dtype=torch.float32)
    per_row = 2 if backend == "native" or qkv.dtype == torch.float32 else 1
    return qkv.new_empty((per_row, H, T), dtype=torch.float32)


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


@torch.library.custom_op("fastbert::attention_backward", mutates_args=())
def _attention_backward_op(
    backend: str,
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    if backend == "triton":
        from fastbert.kernels.attention_backward import attention_bwd

        qkv = _rows(qkv)
        arguments = _triton_arguments(qkv, cu_seqlens, len(qkv), scale, dropout_p, seed)
        return attention_bwd(_rows(dout), qkv, out, saved, cu_seqlens, len(qkv), **arguments)
    if backend == "native":
        return native.attention_backward(
            dout, qkv, cu_seqlens, out, saved, scale=scale, dropout_p=dropout_p, seed=_number(seed)
        )
    return reference.attention_backward(dout, qkv, cu_seqlens, len(qkv), scale=scale).contiguous()


@_attention_backward_op.register_fake
def _(
    backend: str,
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend, _, qkv, cu_seqlens, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens, seed = ctx.saved_tensors
    dqkv = torch.ops.fastbert.attention_backward(ctx.backend, dout, *saved, cu_seqlens, ctx.scale, ctx.dropout_p, seed)
    return None, None, dqkv, None, None, None, None


_attention_op.register_autograd(_backward, setup_context=_save)
