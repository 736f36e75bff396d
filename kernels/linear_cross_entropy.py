"""The mean cross entropy of x W^T + b against labels, with its gradients computed while a chunk's logits exist.

Three products of 2 M V E FLOPs (one, for the loss alone) through cuBLAS. In addition, each of the M V logits is written
by the product, read by its row's kernel (and once more, from the L2 cache) and overwritten by its gradient, which two
products and the bias's sums read. At M = 2,457 labelled tokens (15 % of 16k), V = 30522 and
E = 1024 in bf16 that is 461 GFLOP, 0.58 ms at 790 TFLOP/s, and 0.14 ms of traffic. Logits exist for as many rows as
fit into _LOGITS_BYTES at a time.

Logits and their gradients are rounded to x's dtype, as eager PyTorch does; the bias is added after that, and softmax,
loss and sums over rows, chunks and columns are fp32. The forward computes gradients of the sum of the losses. Their
scale, dloss / count, is known only in the backward, and fp16 can hold a probability, but not one divided by thousands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs
from fastbert.kernels.activation import column_sum

_LOGITS_BYTES = 256 << 20
# Scale of fp16's gradients of the sum: 4,096 rows of one label cannot overflow until x exceeds 256.
_FP16_SCALE = 2.0**-4


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (M, P), without bias, zeros from V on; overwritten by its gradient if GRADIENT
    bias_ptr,  # (P,), -inf from V on
    labels_ptr,  # (M,)
    loss_ptr,  # (M,)
    V,
    P,  # a multiple of 64, so that masks split no vector
    ignore_index,
    scale,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + m * P
    label = tl.load(labels_ptr + m).to(tl.int64)
    offs = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(loss_ptr + m, 0.0)
        if GRADIENT:
            nothing = tl.zeros((BLOCK_V,), dtype=row_ptr.dtype.element_ty)
            for start in range(0, P, BLOCK_V):
                tl.store(row_ptr + start + offs, nothing, mask=start + offs < P)
    else:
        # Not -inf: a block of -inf only (from the bias) then contributes exp(-inf) = 0 instead of NaN.
        largest = -3.0e38
        total = 0.0
        for start in range(0, P, BLOCK_V):
            mask = start + offs < P
            z = tl.load(row_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            z += tl.load(bias_ptr + start + offs, mask=mask, other=-float("inf")).to(tl.float32)
            before = largest
            largest = tl.maximum(largest, tl.max(z, axis=0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), axis=0)
        # A label outside the vocabulary is not read: loss and gradients are NaN.
        within = (label >= 0) & (label < V)
        # Not added to `largest`: next to a large logit, the sum would lose the digits of log_total.
        log_total = tl.where(within, tl.log(total), float("nan"))
        target = tl.load(row_ptr + label, mask=within, other=0.0).to(tl.float32)
        target += tl.load(bias_ptr + label, mask=within, other=0.0).to(tl.float32)
        tl.store(loss_ptr + m, log_total + (largest - target))
        if GRADIENT:
            tl.debug_barrier()  # every warp has read the label's logit before any overwrites it
            for start in range(0, P, BLOCK_V):
                mask = start + offs < P
                z = tl.load(row_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                z += tl.load(bias_ptr + start + offs, mask=mask, other=-float("inf")).to(tl.float32)
                dz = (tl.exp(z - largest - log_total) - tl.where(start + offs == label, 1.0, 0.0)) * scale
                tl.store(row_ptr + start + offs, dz.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(
    x_ptr,  # (size,)
    y_ptr,  # (size,), may be x
    dloss_ptr,  # (1,)
    count_ptr,  # (1,)
    unscale,
    size,
    BLOCK: tl.constexpr,
):
    # If every label is ignored, the mean is NaN and the gradients are zero, as in torch.
    count = tl.maximum(tl.load(count_ptr), 1).to(tl.float32)
    factor = tl.load(dloss_ptr).to(tl.float32) / count * unscale
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (x * factor).to(y_ptr.dtype.element_ty), mask=offs < size)


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    needed: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x (M, E), weight (V, E), bias (V,), labels (M,) -> loss, count, dx, dweight, dbias.

    loss () is the mean in fp32; count (1,) int64 is the number of labels that are not `ignore_index`. The rest are
    gradients of the sum of the losses, for `linear_cross_entropy_bwd`, None where not `needed`: dx in x's dtype, dbias
    in fp32, dweight in either. A label that is neither ignored nor in 0..V-1 makes the loss and the gradients NaN.
    """
    (M, E), V = x.shape, weight.shape[0]
    labels, gradient = labels.contiguous(), any(needed)
    dx = torch.empty((M, E), dtype=x.dtype, device=x.device) if needed[0] else None
    dweight = dbias = None
    losses = torch.empty(M, dtype=torch.float32, device=x.device)
    chunk = _rows(M, V, x.element_size())
    # Rows aligned to 128 bytes: with V odd, or 30522, neither products nor kernels could use vector loads and stores.
    P = triton.cdiv(V, 64) * 64
    workspace = torch.empty((chunk, P), dtype=x.dtype, device=x.device)
    workspace[:, V:] = 0
    padded_bias = torch.full((P,), -float("inf"), dtype=x.dtype, device=x.device)
    padded_bias[:V] = 0 if bias is None else bias
    for first in range(0, M, chunk):
        rows = x[first : first + chunk]
        part = slice(first, first + len(rows))
        logits = torch.mm(rows, weight.t(), out=workspace[: len(rows), :V])
        _cross_entropy(workspace, padded_bias, V, labels[part], losses[part], ignore_index, gradient)
        if needed[0]:
            torch.mm(logits, weight, out=dx[part])
        if needed[1]:
            dweight = _added(dweight, torch.mm(logits.t(), rows), alone=chunk >= M)
        if needed[2]:
            dbias = _added(dbias, column_sum(logits, torch.float32), alone=True)
    if M == 0:
        dweight = torch.zeros_like(weight) if needed[1] else None
        dbias = torch.zeros(V, dtype=torch.float32, device=x.device) if needed[2] else None
    count = (labels != ignore_index).sum().view(1)
    # In fp64, so that the order of the sum does not change the rounded result.
    loss = (losses.sum(dtype=torch.float64) / count[0]).float()
    return loss, count, dx, dweight, dbias


def _rows(M: int, V: int, itemsize: int) -> int:
    """Rows per chunk: chunks of nearly equal size, with logits of at most _LOGITS_BYTES or 128 rows."""
    most = max(_LOGITS_BYTES // (V * itemsize) // 128 * 128, 128)
    if most >= M:
        return max(M, 1)
    return triton.cdiv(triton.cdiv(M, triton.cdiv(M, most)), 128) * 128


def _added(total: Tensor | None, part: Tensor, alone: bool) -> Tensor:
    """The running sum of the chunks' parts, in fp32; the first part as it is if it is `alone`."""
    if total is None:
        return part if alone else part.float()
    return total.add_(part)


def _cross_entropy(
    logits: Tensor, bias: Tensor, V: int, labels: Tensor, losses: Tensor, ignore_index: int, gradient: bool
) -> None:
    """Writes the losses (M,) of the first M rows of logits (_, P); if `gradient`, overwrites these with dlogits."""
    P = logits.shape[1]
    BLOCK_V, num_warps = configs.cross_entropy(P)
    with architecture.on_device(logits.device):
        _cross_entropy_kernel[(len(labels),)](
            logits,
            bias,
            labels,
            losses,
            V,
            P,
            ignore_index,
            _scale_of(logits.dtype),
            GRADIENT=gradient,
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )


def _scale_of(dtype: torch.dtype) -> float:
    return _FP16_SCALE if dtype == torch.float16 else 1.0


def linear_cross_entropy_bwd(
    dloss: Tensor,
    count: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `linear_cross_entropy_fwd` times dloss / count, in `dtype`; may overwrite its inputs."""
    gradients = []
    for x in (dx, dweight, dbias):
        if x is None or not x.numel():
            gradients.append(None if x is None else x.to(dtype))
            continue
        y = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
        with architecture.on_device(x.device):
            _scale_kernel[(triton.cdiv(x.numel(), 4096),)](
                x, y, dloss, count, 1.0 / _scale_of(dtype), x.numel(), BLOCK=4096, num_warps=8
            )
        gradients.append(y)
    return tuple(gradients)
