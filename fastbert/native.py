"""The compiled kernels (csrc/): checks tensors, then hands pointers, sizes, strides and a stream to C++.

The only importer of `fastbert._C`. It imports without the extension too; `available()` says why it is not
there. The instruction set on CPU is the best the processor has, or what the environment variable
FASTBERT_ISA names (avx512_bf16, avx512, avx2 or portable).
"""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _load() -> tuple[Any, str | None]:
    try:
        import fastbert._C as extension
    except ModuleNotFoundError as error:
        if error.name != "fastbert._C":
            raise
        return None, "native: not built (no working C++ compiler when fastbert was installed)"
    except ImportError as error:  # built on another machine, say, with a library that this one lacks
        return None, f"native: does not load ({error})"
    return extension, None


_C, _reason = _load()
_CPU_DTYPES = {} if _C is None else {torch.float32: _C.F32, torch.bfloat16: _C.BF16}
_CUDA_DTYPES = {} if _C is None else {**_CPU_DTYPES, torch.float16: _C.F16}
_ACTIVATIONS = (
    {}
    if _C is None
    else {
        None: _C.ACTIVATION_none,
        "gelu": _C.ACTIVATION_gelu,
        "gelu_new": _C.ACTIVATION_gelu_tanh,
        "gelu_pytorch_tanh": _C.ACTIVATION_gelu_tanh,
        "relu": _C.ACTIVATION_relu,
        "silu": _C.ACTIVATION_silu,
        "tanh": _C.ACTIVATION_tanh,
    }
)


def available() -> str | None:
    """None where the extension is built and loads, else the reason why not."""
    return _reason


def has_cuda() -> bool:
    """Whether the extension is there and holds CUDA kernels."""
    return _C is not None and _C.has_cuda


def cpu_features() -> list[str]:
    """The features of this processor that the choice of an instruction set rests on."""
    return [] if _C is None else _C.cpu_features()


def isas() -> list[str]:
    """The instruction sets that can run here, best first."""
    return [] if _C is None else _C.isas()


def isa() -> str:
    """The instruction set in use; "none" without the extension.

    Raises:
        ValueError: FASTBERT_ISA is no instruction set, or one this machine has not.
    """
    return _chosen_isa()[0]


@functools.cache
def _chosen_isa() -> tuple[str, int]:
    if _C is None:
        return "none", -1
    name = os.environ.get("FASTBERT_ISA", "") or _C.isas()[0]
    try:
        return name, _C.isa_id(name)
    except ValueError as error:
        raise ValueError(f"FASTBERT_ISA={name}: {error}") from None


def peak(kind: str, isa: str, threads: int) -> float:
    """What `threads` threads reach at most here: FLOP/s of a loop over registers only ("fp32", "bf16", "int8"),
    or bytes/s read from main memory ("read"). 0 where the instruction set has no instruction for it.

    Raises:
        RuntimeError: the extension is not there.
        ValueError: no such kind, an instruction set that this machine has not, or no thread.
    """
    if _C is None:
        raise RuntimeError(_reason)
    return _C.peak(kind, _C.isa_id(isa), threads)


def supports_add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> str | None:
    """None where `add_layer_norm` takes these arguments, else the reason why not."""
    if _C is None:
        return _reason
    if dropout_p > 0:
        return "no dropout yet"
    if torch.jit.is_tracing():
        return "a trace cannot hold pointers"
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (residual is not None and residual.requires_grad)
    ):
        return "no backward yet"
    device, dtype = x.device, x.dtype
    if device.type == "cpu":
        dtypes = _CPU_DTYPES
    elif device.type == "cuda":
        if not _C.has_cuda:
            return "built without CUDA"
        dtypes = _CUDA_DTYPES
    else:
        return f"device {device.type}"
    if dtype not in dtypes:
        return f"dtype {dtype}"
    if x.dim() != 2:
        return f"x has {x.dim()} dimensions"
    shape = x.shape
    for t, expected in ((weight, shape[1:]), (bias, shape[1:]), (residual, shape), (x, shape)):
        if t is None:
            continue
        if t.dtype != dtype:
            return f"mixed dtypes {dtype} and {t.dtype}"
        if t.device != device:
            return f"mixed devices {device} and {t.device}"
        if t.shape != expected:
            return f"shape {tuple(t.shape)} beside x {tuple(shape)}"
        if t.stride(-1) != 1 and shape[1] > 1:
            return "last dimension not contiguous"
    return None


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(x + residual) * weight + bias. x and residual (M, N), weight and bias (N,) -> (M, N).

    One dtype for all: float32 or bfloat16 on CPU, float16 too on CUDA; sums and statistics are float32.

    Raises:
        ValueError: arguments it does not take, with the reason of `supports_add_layer_norm`.
        RuntimeError: a CUDA launch failed.
    """
    reason = supports_add_layer_norm(x, residual, weight, bias, eps=eps, dropout_p=dropout_p)
    if reason is not None:
        raise ValueError(f"native.add_layer_norm: {reason}")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _add_layer_norm_into(y, x, residual, weight, bias, eps)
    return y


def _add_layer_norm_into(
    y: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> None:
    M, N = x.shape
    arguments = (
        _CUDA_DTYPES[x.dtype],
        M,
        N,
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        N,
        eps,
    )
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _C.add_layer_norm_cuda(*arguments, x.device.index, stream)
    else:
        _C.add_layer_norm_cpu(*arguments, _chosen_isa()[1], torch.get_num_threads())


def supports_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> str | None:
    """None where `linear` takes these arguments, else the reason why not."""
    if _C is None:
        return _reason
    if activation not in _ACTIVATIONS:
        return f"activation {activation}"
    if reason := _cpu_reason(x, weight, bias):
        return reason
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)}"
    for t in (x, weight):
        if t.stride(1) != 1 and t.shape[1] > 1:
            return "last dimension not contiguous"
        if t.dtype == torch.bfloat16 and (t.shape[1] % 2 or t.stride(0) % 2 or t.data_ptr() % 4):
            return "odd width or row stride in bf16"
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return f"bias of shape {tuple(bias.shape)}"
    if weight.is_inference():
        return "a weight made in inference mode does not say when it changes"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """act(x weight^T + bias): x (M, K), weight (N, K), bias (N,) -> (M, N); sums in fp32.

    The weight is packed on first use and again when it changes; see `_packed`.

    Raises:
        ValueError: arguments it does not take, with the reason of `supports_linear`.
    """
    reason = supports_linear(x, weight, bias, activation=activation)
    if reason is not None:
        raise ValueError(f"native.linear: {reason}")
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    _linear_into(y, x, weight, bias, activation)
    return y


def _linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    packed = _packed(weight, bias)  # held: another thread may pack the weight anew while this one multiplies
    _C.linear_cpu(
        _CPU_DTYPES[x.dtype],
        *x.shape[:1],
        *weight.shape,
        x.data_ptr(),
        x.stride(0),
        packed.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        _ACTIVATIONS[activation],
        _chosen_isa()[1],
        torch.get_num_threads(),
    )


# id(weight) -> (weak reference to it, what it was packed from, the packed bytes).
_packed_weights: dict[int, tuple[weakref.ref[Tensor], tuple, Tensor]] = {}


def _packed(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight and bias in the order the kernels read, kept for as long as the weight tensor lives.

    Packed again when the address or the version counter of either, the instruction set or a sample of the
    values changes: writes through `.data` leave the version counter as it is.
    """
    threads, (_, isa_number) = torch.get_num_threads(), _chosen_isa()
    N, K = weight.shape
    address, bias_address = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    key = (
        address,
        weight._version,
        bias_address,
        None if bias is None else bias._version,
        isa_number,
        _C.sample(address, weight.numel() * weight.element_size() if weight.is_contiguous() else 0),
        _C.sample(bias_address, 0 if bias is None else N * bias.element_size()),
    )
    entry = _packed_weights.get(id(weight))
    if entry is not None and entry[1] == key:
        return entry[2]
    dtype = _CPU_DTYPES[weight.dtype]
    buffer = torch.empty(_C.packed_weight_bytes(dtype, N, K, isa_number), dtype=torch.uint8)
    _C.pack_weight_cpu(dtype, N, K, address, weight.stride(0), bias_address, buffer.data_ptr(), isa_number, threads)
    identity = id(weight)
    owner = weakref.ref(weight, lambda _: _packed_weights.pop(identity, None))
    _packed_weights[identity] = (owner, key, buffer)
    return buffer


def packed_bytes() -> int:
    """The memory that packed weights take, beside the weights themselves."""
    return sum(buffer.numel() for _, _, buffer in _packed_weights.values())


def supports_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None, dropout_p: float = 0.0
) -> str | None:
    """None where `attention` takes these arguments, else the reason why not."""
    if _C is None:
        return _reason
    if dropout_p > 0:
        return "no dropout yet"
    if reason := _cpu_reason(qkv):
        return reason
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        return f"shape {tuple(qkv.shape)}"
    heads, width = qkv.shape[2:]
    if qkv.stride(3) != 1 or qkv.stride(2) != width:
        return "heads not contiguous"
    if qkv.dtype == torch.bfloat16 and (width % 2 or qkv.stride(0) % 2 or qkv.stride(1) % 2 or qkv.data_ptr() % 4):
        return "odd head width or stride in bf16"
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device.type != "cpu" or not cu_seqlens.is_contiguous():
        return "cu_seqlens is no contiguous int32 tensor on the CPU"
    if heads == 0 or width == 0 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        return "nothing to attend to"
    if scale is not None and not scale > 0:
        return f"scale {scale}"
    return None


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """softmax(scale q k^T) v within each sequence: (T, 3, H, D) -> (T, H, D); softmax in fp32.

    Raises:
        ValueError: arguments it does not take, with the reason of `supports_attention`; offsets out of order.
    """
    reason = supports_attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=dropout_p)
    if reason is not None:
        raise ValueError(f"native.attention: {reason}")
    tokens, _, heads, width = qkv.shape
    y = torch.empty((tokens, heads, width), dtype=qkv.dtype)
    _attention_into(y, qkv, cu_seqlens, width**-0.5 if scale is None else scale)
    return y


def _attention_into(y: Tensor, qkv: Tensor, cu_seqlens: Tensor, scale: float) -> None:
    tokens, _, heads, width = qkv.shape
    _C.attention_cpu(
        _CPU_DTYPES[qkv.dtype],
        tokens,
        len(cu_seqlens) - 1,
        heads,
        width,
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.stride(1),
        cu_seqlens.data_ptr(),
        y.data_ptr(),
        scale * math.log2(math.e),
        _chosen_isa()[1],
        torch.get_num_threads(),
    )


def supports_encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    """None where `encoder` takes these arguments, else the reason why not."""
    if _C is None:
        return _reason
    if not layers:
        return "no layers"
    if x.device.type != "cpu":
        return f"device {x.device.type}"
    w = layers[0]
    width = x.shape[1]
    if not x.is_contiguous() or width % (2 * w.num_heads) or w.up_weight.shape[0] < width:
        return f"width {width} with {w.num_heads} heads and {w.up_weight.shape[0]} between"
    qkv = x.new_empty((1, 3, w.num_heads, width // w.num_heads))
    if reason := supports_attention(qkv, cu_seqlens, max_seqlen):
        return f"attention: {reason}"
    for w in layers:
        wide = x.new_empty((1, w.up_weight.shape[0]))
        for weight, bias, example in (
            (w.qkv_weight, w.qkv_bias, x),
            (w.attention_weight, w.attention_bias, x),
            (w.up_weight, w.up_bias, x),
            (w.down_weight, w.down_bias, wide),
        ):
            if reason := supports_linear(example, weight, bias, activation=w.activation):
                return f"linear: {reason}"
        for weight, bias in ((w.attention_norm_weight, w.attention_norm_bias), (w.norm_weight, w.norm_bias)):
            if reason := supports_add_layer_norm(x, x, weight, bias, eps=w.eps):
                return f"add_layer_norm: {reason}"
    return None


def encoder(x: Tensor, layers: Sequence[Any], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """All layers over packed tokens, (T, E) -> (T, E): the ops above, in memory that is used again and again.

    What an op writes into fresh memory costs a page fault every 4 KiB, up to half the time of a product.
    """
    T, E = x.shape
    heads = layers[0].num_heads
    between = max(w.up_weight.shape[0] for w in layers)
    qkv, up, a, b, c = _arena(x.dtype, *((T, n) for n in (3 * E, between, E, E, E)))
    context = up.view(-1)[: T * E].view(T, E)  # dead before `up` is written
    y = torch.empty_like(x)
    for w in layers:
        out = y if w is layers[-1] else c
        _linear_into(qkv, x, w.qkv_weight, w.qkv_bias, None)
        split = qkv.view(T, 3, heads, E // heads)
        _attention_into(context, split, cu_seqlens, (E // heads) ** -0.5)
        _linear_into(a, context, w.attention_weight, w.attention_bias, None)
        _add_layer_norm_into(b, a, x, w.attention_norm_weight, w.attention_norm_bias, w.eps)
        middle = up.view(-1)[: T * w.up_weight.shape[0]].view(T, w.up_weight.shape[0])
        _linear_into(middle, b, w.up_weight, w.up_bias, w.activation)
        _linear_into(a, middle, w.down_weight, w.down_bias, None)
        _add_layer_norm_into(out, a, b, w.norm_weight, w.norm_bias, w.eps)
        x = out
    return y


_ARENA_KEPT = 64 << 20  # bytes of workspace that a thread keeps between calls
_arenas = threading.local()


def _arena(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """Uninitialised tensors out of one allocation, which the thread keeps for its next call unless it is large."""
    sizes = [-(-rows * columns * dtype.itemsize // 64) * 64 for rows, columns in shapes]
    memory = getattr(_arenas, "memory", None)
    if memory is None or memory.numel() < sum(sizes):
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        _arenas.memory = memory if sum(sizes) <= _ARENA_KEPT else None
    parts = memory[: sum(sizes)].split(sizes)
    return [
        part[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
        for part, (rows, columns) in zip(parts, shapes, strict=True)
    ]


def _cpu_reason(first: Tensor, *others: Tensor | None) -> str | None:
    """Why the CPU kernels cannot take these tensors, whatever the op; None where they can."""
    tensors = [first, *(t for t in others if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "no backward yet"
    if first.device.type != "cpu":
        return f"device {first.device.type}"
    if first.dtype not in _CPU_DTYPES:
        return f"dtype {first.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.jit.is_tracing():
        return "a trace cannot hold pointers"
    for t in tensors:
        if t.dtype != first.dtype:
            return f"mixed dtypes {first.dtype} and {t.dtype}"
        if t.device != first.device:
            return f"mixed devices {first.device} and {t.device}"
    return None
