"""linear for training, on the CPU: the forward keeps what the activation's derivative needs, the backward multiplies.

With z = x W^T + b and dz = dy activation'(z): dx = dz W, dW = dz^T x, db = the sum of dz over rows. Both products are
those of the forward, whose second factor is a packed weight: W^T is packed once while W stays the same, x^T each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.extension import ACTIVATIONS, CPU_DTYPES, C, chosen_isa, fresh
from fastbert.native.linear import linear_fwd
from fastbert.native.packed_weights import packed_transpose
from fastbert.native.workspace import keep, workspace
from fastbert.weight import Weight, as_weight

# Tokens are taken so many words (of one fp32, two bf16) at a time, so that a strip of dz^T and a panel of x lie in the
# L2 cache. Over 16384 at once, dW took 1.6 times as long.
_CHUNK_WORDS = 1024
# Their derivatives follow from the output, which the next op keeps anyway.
_FROM_OUTPUT = ("relu", "tanh")


def linear_training(x: Tensor, weight: Weight, activation: str | None) -> tuple[Tensor, Tensor | None]:
    """act(x weight^T + bias), (M, N), and the tensor that the backward takes as `saved`, if any.

    The caller has asked `supports_linear`.
    """
    if activation is None or activation in _FROM_OUTPUT:
        y = linear_fwd(x, weight, activation)
        return y, None if activation is None else y
    z = linear_fwd(x, weight, None)
    return activate(z, activation), z


def activate(saved: Tensor, activation: str) -> Tensor:
    """What `linear_training` returned with this `saved`, made of it once more."""
    if activation in _FROM_OUTPUT:
        return saved
    y = fresh(saved, *saved.shape)
    code, isa, threads = CPU_DTYPES[saved.dtype], chosen_isa()[1], torch.get_num_threads()
    C.activate_cpu(code, saved.numel(), saved.data_ptr(), y.data_ptr(), ACTIVATIONS[activation], isa, threads)
    return y


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Weight,
    saved: Tensor | None,
    activation: str | None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, None where not `wanted`: dy (M, N) -> (M, K), (N, K), (N,); sums in fp32.

    Those of the weight are gradients of its stacked tensors.
    """
    (M, N), K, dtype = dy.shape, x.shape[1], x.dtype
    want_x, want_weight, want_bias = wanted
    code, isa, threads = CPU_DTYPES[dtype], chosen_isa()[1], torch.get_num_threads()
    per_word = 4 // dtype.itemsize
    if dy.stride(1) != 1 and N > 1:
        dy = dy.contiguous()
    direct = activation is None and N % per_word == 0 and dy.stride(0) % per_word == 0 and dy.data_ptr() % 4 == 0
    chunk = min(M, _CHUNK_WORDS * per_word)
    inner, stride = _even(N, per_word), _even(chunk, per_word) + 64 // dtype.itemsize
    memory, (dz, dzt, packed_x, sums, partials) = workspace(
        (dtype, (chunk, inner) if want_x and not direct else (0, 0)),
        (dtype, (N, stride) if want_weight else (0, 0)),
        (
            torch.uint8,
            (C.packed_weight_bytes(code, C.PRECISION_full, K, _even(chunk, per_word), isa) if want_weight else 0,),
        ),
        (torch.float32, (N, K) if want_weight and chunk < M and per_word > 1 else (0, 0)),
        (torch.float32, (-(-M // C.PARTIAL_ROWS), N) if want_bias else (0, 0)),
    )
    dx = fresh(x, M, K) if want_x else None
    dweight = fresh(x, N, K) if want_weight else None
    if not M and want_weight:
        dweight.zero_()  # no row is added to it below
    dbias = fresh(x, N) if want_bias else None
    packed = packed_transpose(as_weight(weight, None), inner) if want_x else None

    for start in range(0, M, chunk or 1):
        rows = min(chunk, M - start)
        part, tokens = dy[start : start + rows], _even(rows, per_word)
        if not direct or want_weight or want_bias:
            C.activation_backward_cpu(
                *(code, rows, N, part.data_ptr(), part.stride(0)),
                *((0, 0) if saved is None else (saved[start:].data_ptr(), saved.stride(0))),
                *(dz.data_ptr() if want_x and not direct else 0, inner, dzt.data_ptr() if want_weight else 0, stride),
                *(partials[start // C.PARTIAL_ROWS :].data_ptr() if want_bias else 0, ACTIVATIONS[activation]),
                *(isa, threads),
            )
        if dx is not None:
            left = part if direct else dz
            C.linear_cpu(
                *(code, C.PRECISION_full, rows, K, inner, left.data_ptr(), left.stride(0), packed.data_ptr()),
                *(dx[start:].data_ptr(), K, ACTIVATIONS[None], isa, threads),
            )
        if dweight is not None:
            xt = packed_x.data_ptr()
            C.pack_transposed_cpu(code, K, tokens, x[start:].data_ptr(), rows, x.stride(0), xt, isa, threads)
            C.weight_gradient_cpu(
                *(code, N, K, tokens, dzt.data_ptr(), stride, xt),
                *((sums if per_word > 1 else dweight).data_ptr(), dweight.data_ptr()),
                *(start == 0, start + rows == M, isa, threads),
            )
    if dbias is not None:
        C.sum_partials_cpu(code, len(partials), N, partials.data_ptr(), dbias.data_ptr(), isa)
    keep(memory)
    return dx, dweight, dbias


def _even(n: int, per_word: int) -> int:
    return -(-n // per_word) * per_word
