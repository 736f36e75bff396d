"""Weights in the order that the kernels read them, cached as forms of a `Weight`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.native.extension import CPU_DTYPES, PRECISIONS, C, chosen_isa, fresh, fresh_bytes, start_of
from fastbert.weight import Weight


def packed(weight: Weight, precision: str | None = None, gated: bool = False) -> Tensor:
    """The packed panels of a Weight with its biases, for the instruction set in use; `gated`, for such a product."""
    key = "gated" if gated else "packed", precision, weight.weights[0].dtype, chosen_isa()[1]
    found = weight.forms.get(key)
    return (
        weight.form(key, lambda: _pack(_in_turns(weight) if gated else weight, precision)) if found is None else found
    )


@torch.no_grad()
def _in_turns(weight: Weight) -> Weight:
    """The rows of a weight's two halves in turns, half a panel of each, the last ones filled up with zeros."""
    rows, bias = weight.stacked()
    half = C.panel_columns(chosen_isa()[1]) // 2

    def turned(x: Tensor) -> Tensor:
        missing = -(len(x) // 2) % half
        parts = x.detach().unflatten(0, (2, -1))
        parts = torch.cat([parts, parts.new_zeros(2, missing, *x.shape[1:])], 1) if missing else parts
        return parts.unflatten(1, (-1, half)).transpose(0, 1).flatten(0, 2).contiguous()

    return Weight((turned(rows),), (None if bias is None else turned(bias),))


def _pack(weight: Weight, precision: str | None) -> Tensor:
    (N, K), first, isa, threads = weight.shape, weight.weights[0], chosen_isa()[1], torch.get_num_threads()
    kind = CPU_DTYPES[first.dtype], PRECISIONS[precision]
    weights: tuple[Tensor, ...] = weight.weights
    biases: tuple[Tensor | None, ...] = weight.biases or (None,) * len(weights)
    sizes = [C.packed_weight_bytes(*kind, len(w), K, isa) for w in weights]
    # Row blocks that fill their panels are packed one by one: the bytes are those of all rows packed together.
    full = [C.packed_weight_bytes(*kind, len(w) + 1, K, isa) > size for w, size in zip(weights, sizes, strict=True)]
    if len(weights) > 1 and not all(full):
        stacked, bias = weight.stacked()
        weights, biases, sizes = (stacked,), (bias,), [C.packed_weight_bytes(*kind, N, K, isa)]
    memory = fresh_bytes(sum(sizes))
    address = start_of(memory)
    buffer = memory[address - memory.data_ptr() :][: sum(sizes)]
    for w, b, size in zip(weights, biases, sizes, strict=True):
        pointers = w.data_ptr(), w.stride(0), 0 if b is None else b.data_ptr(), address
        C.pack_weight_cpu(*kind, len(w), K, *pointers, isa, threads)
        address += size
    return buffer


def packed_transpose(weight: Weight, inner: int) -> Tensor:
    """weight^T (K, N) packed for a product, its N padded with zeros to `inner`."""
    return weight.form(("transposed", inner, chosen_isa()[1]), lambda: _pack_transpose(weight, inner))


def _pack_transpose(weight: Weight, inner: int) -> Tensor:
    (N, K), blocks, isa, threads = weight.shape, weight.weights, chosen_isa()[1], torch.get_num_threads()
    code = CPU_DTYPES[blocks[0].dtype]
    if any(len(block) * block.element_size() % 4 for block in blocks[:-1]):  # a word holds rows of two blocks
        blocks = weight.stacked()[:1]
    buffer = fresh(blocks[0], C.packed_weight_bytes(code, C.PRECISION_full, K, inner, isa), dtype=torch.uint8)
    first = 0
    for block in blocks:
        where = block.data_ptr(), N, block.stride(0), buffer.data_ptr(), first, first + len(block)
        C.pack_transposed_cpu(code, K, inner, *where, isa, threads)
        first += len(block)
    return buffer


def has_packed(weight: Weight, precision: str | None, gated: bool = False) -> bool:
    """True if a weight has the packed form that these kernels read."""
    return ("gated" if gated else "packed", precision, weight.weights[0].dtype, chosen_isa()[1]) in weight.forms
