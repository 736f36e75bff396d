"""attention: softmax(scale q k^T + bias) v within each sequence of a packed row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.native import attention as native_attention
from fastbert.native import attention_bwd as native_attention_bwd
from fastbert.native import attention_fwd_train as native_attention_fwd_train
from fastbert.native import supports_attention
from fastbert.ops import dispatch
from fastbert.ops._autocast import autocast_is_on, autocast_off, cast
from fastbert.ops._autograd import needs_gradient
from fastbert.ops._checks import check_floating, check_offsets, check_probability, check_shape
from fastbert.ops.attention.native import run_native
from fastbert.ops.attention.reference import run_reference
from fastbert.ops.attention.triton import (
    rows_in_memory,
    run_triton,
    supports_triton,
    triton_arguments,
    triton_gradients,
)
from fastbert.reference import attention as reference_attention
from fastbert.reference import attention_gradients as reference_gradients

dispatch.implement("attention", "triton", run_triton, supports_triton)
dispatch.implement("attention", "native", run_native, supports_attention)
dispatch.implement("attention", "reference", run_reference)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    window: int | None = None,
    checked: bool = False,
) -> Tensor:
    """(T, 3, H, D) -> (T, H, D); sequence b is rows cu_seqlens[b] to cu_seqlens[b+1] and sees only itself.

    Args:
        qkv: queries, keys and values of every token.
        cu_seqlens: int32 (B+1,), from 0 to T.
        max_seqlen: at least the longest sequence.
        scale: the factor of the scores; None is D ** -0.5.
        dropout_p: the fraction of probabilities that are dropped.
        bias: (H, 2P-1), P at least the longest sequence: column P - 1 + key - query is added to the scaled scores.
        window: keys farther than this from a query, in tokens, are left out; None: none are.
        checked: skip the checks of cu_seqlens and max_seqlen, which the caller has made, as `packing` does.

    Offsets on a GPU are not read by the host, which would wait for them: there a token after the last sequence gets
    zeros, and offsets that do not rise are clamped to 0 to T.

    Raises:
        ValueError: a shape, dtype or probability that does not fit; offsets on a CPU that do not rise from 0 to T or
            hold a sequence longer than max_seqlen.
    """
    check_shape("attention", "qkv", qkv, (None, 3, None, None))
    check_floating("attention", "qkv", qkv)
    if not checked:
        check_offsets("attention", cu_seqlens, len(qkv), max_seqlen)
    check_probability("attention", "dropout_p", dropout_p)
    kwargs: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    if bias is not None:
        _check_bias(bias, qkv.shape[2], max_seqlen)
        kwargs["bias"] = bias
    if window is not None:
        if window < 0:
            raise ValueError(f"attention: window is {window}; it must be at least 0")
        kwargs["window"] = window
    if autocast_is_on(qkv):
        with autocast_off(qkv):
            return attention(cast(qkv)[0], cu_seqlens, max_seqlen, **kwargs, checked=True)
    name, run = dispatch.choose("attention", qkv.device.type, qkv, cu_seqlens, max_seqlen, **kwargs)
    if torch.compiler.is_compiling() and not (dropout_p and name == "reference"):
        # The lengths are data: a compiled graph holds the op as one node or, with dropout, breaks at the reference.
        # A graph that holds the number max_seqlen would be recompiled for another one; T bounds it as well.
        seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p else None
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.fastbert.attention(
            name, needs_gradient(qkv, bias), qkv, bias, cu_seqlens, scale, dropout_p, seed, window
        )[0]
    return run(qkv, cu_seqlens, max_seqlen, **kwargs)


def _check_bias(bias: Tensor, heads: int, max_seqlen: int) -> None:
    if bias.dim() != 2 or len(bias) != heads or bias.shape[1] % 2 == 0 or bias.shape[1] < 2 * max_seqlen - 1:
        raise ValueError(
            f"attention: bias has shape {tuple(bias.shape)}; it must be ({heads}, an odd number of at least "
            f"{2 * max_seqlen - 1}), twice max_seqlen less 1"
        )
    check_floating("attention", "bias", bias)


# The op in a compiled graph. `backend` was chosen when the graph was compiled. If `training`, `saved` is what its
# backward reads in addition to the output: see the launchers.


@torch.library.custom_op("fastbert::attention", mutates_args=())
def _attention_op(
    backend: str,
    training: bool,
    qkv: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    check_offsets("attention", cu_seqlens, len(qkv), len(qkv))
    if backend == "triton":
        from fastbert.kernels.attention import attention_fwd

        qkv = rows_in_memory(qkv)
        arguments = triton_arguments(qkv, cu_seqlens, len(qkv), scale, dropout_p, seed, window)
        out, saved = attention_fwd(qkv, cu_seqlens, len(qkv), bias=bias, **arguments)
    elif backend == "native" and (training or dropout_p):
        out, saved = native_attention_fwd_train(
            qkv, cu_seqlens, scale=scale, dropout_p=dropout_p, seed=_number(seed), bias=bias, window=window
        )
    elif backend == "native":
        out, saved = native_attention(qkv, cu_seqlens, len(qkv), scale=scale, bias=bias, window=window), None
    else:
        out = reference_attention(qkv, cu_seqlens, len(qkv), scale=scale, bias=bias, window=window).contiguous()
        saved = None
    return out, _saved(backend, training, qkv) if saved is None or not training else saved


@_attention_op.register_fake
def _(backend: str, training: bool, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:]), _saved(backend, training, qkv)


def _saved(backend: str, training: bool, qkv: Tensor) -> Tensor:
    T, _, H, _ = qkv.shape
    if backend == "reference" or not training:
        return qkv.new_empty(0, dtype=torch.float32)
    per_row = 2 if backend == "native" or qkv.dtype == torch.float32 else 1
    return qkv.new_empty((per_row, H, T), dtype=torch.float32)


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


@torch.library.custom_op("fastbert::attention_bwd", mutates_args=())
def _attention_bwd_op(
    backend: str,
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        qkv = rows_in_memory(qkv)
        arguments = triton_arguments(qkv, cu_seqlens, len(qkv), scale, dropout_p, seed, window)
        dqkv, dbias = triton_gradients(dout, qkv, bias, out, saved, cu_seqlens, len(qkv), arguments)
        return dqkv, _dbias(None) if dbias is None else dbias
    if backend == "native":
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": _number(seed)}
        dqkv, dbias = native_attention_bwd(dout, qkv, cu_seqlens, out, saved, **options, bias=bias, window=window)
        return dqkv, _dbias(bias) if dbias is None or bias is None else dbias.to(bias.dtype)
    dqkv, dbias = reference_gradients(dout, qkv, cu_seqlens, scale, bias, window)
    return dqkv.contiguous(), _dbias(None) if dbias is None else dbias


def _dbias(bias: Tensor | None) -> Tensor:
    """Memory for a bias's gradient; empty without a bias, as an op returns tensors only."""
    return torch.empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)


@_attention_bwd_op.register_fake
def _(backend: str, dout: Tensor, qkv: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), _dbias(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend, _, qkv, bias, cu_seqlens, ctx.scale, ctx.dropout_p, seed, ctx.window = inputs
    ctx.save_for_backward(qkv, bias, *output, cu_seqlens, seed)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens, seed = ctx.saved_tensors
    dqkv, dbias = torch.ops.fastbert.attention_bwd(
        ctx.backend, dout, *saved, cu_seqlens, ctx.scale, ctx.dropout_p, seed, ctx.window
    )
    return None, None, dqkv, None if saved[1] is None else dbias, None, None, None, None, None


_attention_op.register_autograd(_backward, setup_context=_save)
