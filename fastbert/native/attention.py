"""attention by the extension: checks, then pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.attention_bwd import attention_fwd_train, attention_inputs, held_bias
from fastbert.native.dropout import draw_seed
from fastbert.native.extension import C, chosen_isa, cpu_reason, fresh, misaligned


def supports_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    window: int | None = None,
) -> str | None:
    """None if `attention` takes these arguments, else the reason why not."""
    if reason := cpu_reason(qkv):
        return reason
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        return f"shape {tuple(qkv.shape)}"
    heads, width = qkv.shape[2:]
    if qkv.stride(3) != 1 or qkv.stride(2) != width:
        return "heads not contiguous"
    if qkv.dtype == torch.bfloat16 and (width % 2 or qkv.stride(0) % 2 or qkv.stride(1) % 2 or misaligned(qkv, 4)):
        return "odd head width or stride in bf16"
    if heads == 0 or width == 0:
        return "nothing to attend to"
    if reason := offsets_reason(cu_seqlens):
        return reason
    if scale is not None and not scale > 0:
        return f"scale {scale}"
    if bias is not None and not bias.is_cpu:
        return f"a bias on {bias.device}"
    return None


def offsets_reason(cu_seqlens: Tensor) -> str | None:
    """Why `attention` cannot take these offsets; None if it can."""
    if cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_cpu or not cu_seqlens.is_contiguous():
        return "cu_seqlens is no contiguous int32 tensor on the CPU"
    return None if cu_seqlens.dim() == 1 and len(cu_seqlens) else "cu_seqlens is no vector of batch + 1 offsets"


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v within each sequence: (T, 3, H, D) -> (T, H, D); softmax in fp32. No autograd.

    Keys farther than `window` from a query are left out. The caller has checked `supports_attention`.

    Raises:
        ValueError: offsets out of order.
    """
    if dropout_p:
        return attention_fwd_train(
            qkv,
            cu_seqlens,
            scale=scale,
            dropout_p=dropout_p,
            seed=draw_seed(dropout_p),
            bias=bias,
            window=window,
            keep=False,
        )[0]
    tokens, _, heads, width = qkv.shape
    y = fresh(qkv, tokens, heads, width)
    held = held_bias(bias)
    C.attention_cpu(
        *attention_inputs(qkv, cu_seqlens, y, scale, held, window), chosen_isa()[1], torch.get_num_threads()
    )
    return y
