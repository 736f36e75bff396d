"""add_layer_norm for training, on the CPU: the forward returns its statistics for the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.engine.memory import keep, workspace
from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, fresh


def add_layer_norm_fwd_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    keep: bool = True,
    rms: bool = False,
    return_sum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm(dropout(x) + residual) * weight + bias, (M, N), the statistics mean and rstd, (2, M) fp32, and the sum.

    `seed` determines the dropout mask. Without `keep`, the statistics are None; without `return_sum`, the sum
    dropout(x) + residual, (M, N), is. The caller has checked `supports_add_layer_norm`.
    """
    M, N = x.shape
    y = fresh(x, M, N)
    statistics = fresh(x, 2, M, dtype=torch.float32) if keep else None
    total = fresh(x, M, N) if return_sum else None
    addresses = (0, 0) if statistics is None else (statistics.data_ptr(), statistics.data_ptr() + 4 * M)
    C.add_layer_norm_fwd_train_cpu(
        *add_layer_norm_inputs(x, residual, weight, rms),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if total is None else total.data_ptr(),
        eps,
        dropout_p,
        seed,
        *addresses,
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return y, statistics, total


def add_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    *,
    dropout_p: float,
    seed: int,
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True),
    rms: bool = False,
    return_sum: bool = False,
    dsum: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, residual, weight and bias, None where not `wanted`; dweight and dbias summed in fp32.

    `return_sum` as for the forward; `dsum` is the gradient of the sum.
    """
    M, N = x.shape
    want_x, want_residual, want_weight, want_bias = wanted
    if dy.stride(1) != 1 and N > 1:
        dy = dy.contiguous()
    if dsum is not None and dsum.stride(1) != 1 and N > 1:
        dsum = dsum.contiguous()
    shared = want_x and want_residual and not dropout_p  # one gradient for both
    dx = fresh(x, M, N) if want_x else None
    dresidual = fresh(x, M, N) if want_residual and not shared else None
    dweight, dbias = (fresh(x, N) if want else None for want in (want_weight, want_bias))
    blocks = -(-M // C.PARTIAL_ROWS) if want_weight or want_bias else 0
    memory = workspace(blocks * 2 * N * 4)  # float32 (blocks, 2, N)
    C.add_layer_norm_bwd_cpu(
        *add_layer_norm_inputs(x, residual, weight, rms),
        return_sum,
        dropout_p,
        seed,
        statistics.data_ptr(),
        statistics.data_ptr() + 4 * M,
        dy.data_ptr(),
        dy.stride(0),
        *((0, 0) if dsum is None else (dsum.data_ptr(), dsum.stride(0))),
        *(0 if t is None else t.data_ptr() for t in (dx, dresidual, dweight, dbias)),
        memory.start,
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    keep(memory)
    return dx, dx if shared else dresidual, dweight, dbias


def add_layer_norm_inputs(x: Tensor, residual: Tensor | None, weight: Tensor, rms: bool) -> tuple[int, ...]:
    """The first arguments of every add_layer_norm function in C++."""
    second = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    return CPU_DTYPES[x.dtype], *x.shape, x.data_ptr(), x.stride(0), *second, weight.data_ptr(), rms
