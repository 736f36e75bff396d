"""linear for training, on the CPU: the forward saves what the activation's derivative needs.

With z = x W^T + b and dz = dy activation'(z): dx = dz W, dW = dz^T x, db = the sum of dz over rows. Both products run
by the forward's kernel, whose second operand is packed: W^T is packed once while W is unchanged, x^T in each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.engine.memory import keep, workspace
from fastbert.native.extension import ACTIVATIONS, CPU_DTYPES, C, chosen_isa, fresh
from fastbert.native.linear import linear
from fastbert.native.packed_weights import packed_transpose
from fastbert.weight import Weight, as_weight

# Words (of one fp32 or two bf16) of tokens per chunk, so that a strip of dz^T and a panel of x fit in the L2 cache.
# With 16384 words per chunk, dW took 1.6 times as long.
_CHUNK_WORDS = 1024
# Their derivatives follow from the output, which the next op saves anyway.
_FROM_OUTPUT = ("relu", "tanh")


def linear_fwd_train(x: Tensor, weight: Weight, activation: str | None) -> tuple[Tensor, Tensor | None]:
    """act(x weight^T + bias), (M, N), and the tensor that the backward takes as `saved`, if any.

    The caller has checked `supports_linear`.
    """
    if activation is None or activation in _FROM_OUTPUT:
        y = linear(x, weight, activation=activation)
        return y, None if activation is None else y
    z = linear(x, weight)
    return activate(z, activation), z


def activate(saved: Tensor, activation: str) -> Tensor:
    """Recomputes the output of `linear_fwd_train` from its `saved`."""
    if activation in _FROM_OUTPUT:
        return saved
    y = fresh(saved, *saved.shape)
    code, isa, threads = CPU_DTYPES[saved.dtype], chosen_isa()[1], torch.get_num_threads()
    C.activate_cpu(code, saved.numel(), saved.data_ptr(), y.data_ptr(), ACTIVATIONS[activation], isa, threads)
    return y


def gate(z: Tensor, activation: str) -> Tensor:
    """act(a) b of the halves of z's columns: (M, 2F) -> (M, F). No autograd."""
    z = z.contiguous()
    return _gate(z, None, fresh(z, len(z), z.shape[1] // 2), activation)


def gate_bwd(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z, (M, 2F), from that of act(a) b, (M, F)."""
    z = z.contiguous()
    return _gate(z, dy.contiguous(), fresh(z, *z.shape), activation)


def _gate(z: Tensor, dy: Tensor | None, out: Tensor, activation: str) -> Tensor:
    what = CPU_DTYPES[z.dtype], len(z), z.shape[1] // 2, z.data_ptr(), 0 if dy is None else dy.data_ptr()
    C.gate_cpu(*what, out.data_ptr(), ACTIVATIONS[activation], chosen_isa()[1], torch.get_num_threads())
    return out


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Weight,
    saved: Tensor | None,
    activation: str | None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, None where not `wanted`: dy (M, N) -> (M, K), (N, K), (N,); sums in fp32.

    dweight and dbias are the gradients of the stacked tensors.
    """
    (M, N), K = dy.shape, x.shape[1]
    want_x, want_weight, want_bias = wanted
    code, isa, threads = CPU_DTYPES[x.dtype], chosen_isa()[1], torch.get_num_threads()
    if dy.stride(1) != 1 and N > 1:
        dy = dy.contiguous()
    per_word = 4 // x.element_size()
    inner = -(-N // per_word) * per_word
    packed = packed_transpose(as_weight(weight, None), inner) if want_x else None
    dx = fresh(x, M, K) if want_x else None
    dweight = fresh(x, N, K) if want_weight else None
    dbias = fresh(x, N) if want_bias else None
    outputs = (0 if t is None else t.data_ptr() for t in (dx, dweight, dbias))
    what = code, M, N, K, dy.data_ptr(), dy.stride(0), ACTIVATIONS[activation], *outputs, _CHUNK_WORDS
    memory = workspace(C.linear_bwd_workspace_bytes(*what, isa))
    C.linear_bwd_cpu(
        *what,
        *(x.data_ptr(), x.stride(0)),
        *((0, 0) if saved is None else (saved.data_ptr(), saved.stride(0))),
        0 if packed is None else packed.data_ptr(),
        *(memory.start, isa, threads),
    )
    keep(memory)
    return dx, dweight, dbias
