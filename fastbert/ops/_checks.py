"""The checks that the ops share: each failure is one ValueError that names the argument, its value and the limit."""

from __future__ import annotations

from torch import Tensor


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Holds `x` to `shape`; None in it means any size."""
    given = x.shape
    if len(given) == len(shape):
        for size, wanted in zip(given, shape, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    wanted_sizes = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(f"{op}: {name} has shape {tuple(given)}; it must be ({wanted_sizes})")


def check_floating(op: str, name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; it must be a floating-point tensor")


def check_integer(op: str, name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype.itemsize < 4:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; it must be int32 or int64")


def check_probability(op: str, name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: {name} is {p}; it must be at least 0 and below 1")
