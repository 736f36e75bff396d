"""attention for training, on the CPU: the forward returns each query's maximum and sum for the backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, fresh


def attention_fwd_train(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None,
    dropout_p: float = 0.0,
    seed: int = 0,
    bias: Tensor | None = None,
    window: int | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T + bias) v with dropout of the probabilities: (T, 3, H, D) -> (T, H, D).

    Keys farther than `window` from a query are left out. Also returns the statistics for the backward, (2, H, T) fp32,
    or None without `keep`. `seed` determines the mask. The caller has checked `supports_attention`.
    """
    tokens, _, heads, width = qkv.shape
    y = fresh(qkv, tokens, heads, width)
    statistics = fresh(qkv, 2, heads, tokens, dtype=torch.float32) if keep else None
    held = held_bias(bias)
    C.attention_fwd_train_cpu(
        *attention_inputs(qkv, cu_seqlens, y, scale, held, window),
        dropout_p,
        seed,
        0 if statistics is None else statistics.data_ptr(),
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return y, statistics


def attention_bwd(
    dy: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    y: Tensor,
    statistics: Tensor,
    *,
    scale: float | None,
    dropout_p: float,
    seed: int,
    bias: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of qkv, (T, 3, H, D), and of the bias: probabilities are recomputed, a tile of keys at a time."""
    dqkv = fresh(qkv, *qkv.shape)
    dy, held = dy.contiguous(), held_bias(bias)
    dbias = None if bias is None else fresh(qkv, *bias.shape, dtype=torch.float32)
    parts = None if bias is None else fresh(qkv, len(bias), 2 * len(qkv), dtype=torch.float32)
    C.attention_bwd_cpu(
        *attention_inputs(qkv, cu_seqlens, y, scale, held, window),
        dropout_p,
        seed,
        statistics.data_ptr(),
        dy.data_ptr(),
        dqkv.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        0 if parts is None else parts.data_ptr(),
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return dqkv, dbias


def held_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as C++ takes it."""
    return None if bias is None else bias.detach().float().contiguous()


def bias_arguments(held: Tensor | None) -> tuple[int, int]:
    """A bias's address and reach, as C++ takes them."""
    return (0, 0) if held is None else (held.data_ptr(), (held.shape[1] + 1) // 2)


def attention_inputs(
    qkv: Tensor, cu_seqlens: Tensor, y: Tensor, scale: float | None, held: Tensor | None, window: int | None
) -> tuple[int | float, ...]:
    """The first arguments of every attention function in C++."""
    tokens, _, heads, width = qkv.shape
    return (
        CPU_DTYPES[qkv.dtype],
        tokens,
        len(cu_seqlens) - 1,
        heads,
        width,
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        cu_seqlens.data_ptr(),
        y.data_ptr(),
        (width**-0.5 if scale is None else scale) * math.log2(math.e),
        *bias_arguments(held),
        -1 if window is None else window,
    )
