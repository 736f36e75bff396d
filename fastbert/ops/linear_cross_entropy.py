"""linear_cross_entropy: mean cross entropy of x W^T + b against labels, without keeping the logits."""

from __future__ import annotations

from torch import Tensor

from fastbert import backend, reference
from fastbert.ops._checks import check_floating, check_integer, check_shape

backend.implement("linear_cross_entropy", "reference", reference.linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """(T, E), (V, E), (V,), (T,) -> (): the mean over rows whose label is not `ignore_index`.

    Where every label is ignored the mean is of nothing and the result NaN, as in torch.

    Raises:
        ValueError: a shape or dtype that does not fit, a label outside 0..V-1 (but `ignore_index`).
    """
    op = "linear_cross_entropy"
    check_floating(op, "x", x)
    check_shape(op, "weight", weight, (None, x.shape[-1] if x.dim() else None))
    check_shape(op, "x", x, (None, weight.shape[1]))
    check_shape(op, "labels", labels, (x.shape[0],))
    check_integer(op, "labels", labels)
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],))
    args = (x, weight, bias, labels)
    _, run = backend.choose(op, x.device.type, *args, ignore_index=ignore_index)
    return run(*args, ignore_index=ignore_index)
