"""linear for training, on the CPU: the forward keeps what the activation's derivative needs, the backward multiplies.

With z = x W^T + b and dz = dy activation'(z): dx = dz W, dW = dz^T x, db = the sum of dz over rows. Both products are
those of the forward, whose second factor is a packed weight: W^T is packed once for as long as W stays, x^T anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.extension import ACTIVATIONS, CPU_DTYPES, C, chosen_isa
from fastbert.native.linear import linear_into
from fastbert.native.packed_weights import kept_transpose
from fastbert.native.workspace import workspace

# Their derivatives follow from the output, which the next op keeps anyway.
_FROM_OUTPUT = ("relu", "tanh")


def linear_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None]:
    """act(x weight^T + bias), (M, N), and the tensor that the backward takes as `saved`, if any.

    The caller has asked `supports_linear`.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    if activation is None or activation in _FROM_OUTPUT:
        linear_into(y, x, weight, bias, activation)
        return y, None if activation is None else y
    z = torch.empty_like(y)
    linear_into(z, x, weight, bias, None)
    code, isa, threads = CPU_DTYPES[x.dtype], chosen_isa()[1], torch.get_num_threads()
    C.activate_cpu(code, z.numel(), z.data_ptr(), y.data_ptr(), ACTIVATIONS[activation], isa, threads)
    return y, z


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    activation: str | None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, None where not `wanted`: dy (M, N) -> (M, K), (N, K), (N,); sums in fp32."""
    (M, N), K, dtype = dy.shape, x.shape[1], x.dtype
    want_x, want_weight, want_bias = wanted
    code, isa, threads = CPU_DTYPES[dtype], chosen_isa()[1], torch.get_num_threads()
    step = 4 // dtype.itemsize  # elements of a product's word: widths and strides are multiples of it
    inner_M, inner_N = -(-M // step) * step, -(-N // step) * step
    if dy.stride(1) != 1 and N > 1:
        dy = dy.contiguous()
    direct = activation is None and inner_N == N and dy.stride(0) % step == 0 and dy.data_ptr() % 4 == 0
    dz, dzt, packed_x, partials = workspace(
        (dtype, (M, inner_N) if want_x and not direct else (0, 0)),
        (dtype, (N, inner_M) if want_weight else (0, 0)),
        (torch.uint8, (C.packed_weight_bytes(code, K, inner_M, isa) if want_weight else 0,)),
        (torch.float32, (-(-M // C.PARTIAL_ROWS), N) if want_bias else (0, 0)),
    )
    dbias = torch.empty(N, dtype=dtype) if want_bias else None
    if not direct or want_weight or want_bias:
        C.activation_backward_cpu(
            *(code, M, N, dy.data_ptr(), dy.stride(0)),
            *((0, 0) if saved is None else (saved.data_ptr(), saved.stride(0))),
            *(dz.data_ptr() if want_x and not direct else 0, inner_N),
            *(dzt.data_ptr() if want_weight else 0, inner_M),
            *(0 if dbias is None else dbias.data_ptr(), partials.data_ptr()),
            *(ACTIVATIONS[activation], isa, threads),
        )
    dx = dweight = None
    if want_x:
        dz = dy if direct else dz
        packed = _packed_transpose(weight, inner_N)
        dx = torch.empty((M, K), dtype=dtype)
        _multiply(dx, dz, packed, inner_N)
    if want_weight:
        C.pack_transposed_cpu(code, K, inner_M, x.data_ptr(), M, x.stride(0), packed_x.data_ptr(), isa, threads)
        dweight = torch.empty((N, K), dtype=dtype)
        _multiply(dweight, dzt, packed_x, inner_M)
    return dx, dweight, dbias


def _packed_transpose(weight: Tensor, inner: int) -> Tensor:
    """weight^T (K, N) as a weight for the product, its N filled up to `inner` with zeros; kept beside the weight."""
    (N, K), code, isa = weight.shape, CPU_DTYPES[weight.dtype], chosen_isa()[1]

    def pack() -> Tensor:
        buffer = torch.empty(C.packed_weight_bytes(code, K, inner, isa), dtype=torch.uint8)
        C.pack_transposed_cpu(
            *(code, K, inner, weight.data_ptr(), N, weight.stride(0), buffer.data_ptr(), isa, torch.get_num_threads())
        )
        return buffer

    return kept_transpose(weight, pack)


def _multiply(out: Tensor, x: Tensor, packed: Tensor, inner: int) -> None:
    """out (M, N) = x (M, inner) times a packed matrix."""
    C.linear_cpu(
        *(CPU_DTYPES[x.dtype], *out.shape, inner, x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr()),
        *(out.stride(0), ACTIVATIONS[None], chosen_isa()[1], torch.get_num_threads()),
    )
