"""Weights in the order that the kernels read them, cached as forms of a `Weight`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.engine.packed import RowBlock, fill_panels, pack, rows_in_turns
from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, fresh
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
    """The rows of a weight's two halves in turns: see engine.packed.rows_in_turns."""
    rows, bias = weight.stacked()
    order = torch.from_numpy(rows_in_turns(len(rows)))
    there = order >= 0

    def turned(x: Tensor) -> Tensor:
        y = x.new_zeros(len(order), *x.shape[1:])
        y[there] = x.detach()[order[there]]
        return y

    return Weight((turned(rows),), (None if bias is None else turned(bias),))


def _pack(weight: Weight, precision: str | None) -> Tensor:
    code, width = CPU_DTYPES[weight.weights[0].dtype], weight.shape[1]
    weights: tuple[Tensor, ...] = weight.weights
    biases: tuple[Tensor | None, ...] = weight.biases or (None,) * len(weights)
    if not fill_panels(code, precision, [*map(len, weights)], width):
        stacked, bias = weight.stacked()
        weights, biases = (stacked,), (bias,)
    blocks = [
        RowBlock(len(w), w.data_ptr(), w.stride(0), 0 if b is None else b.data_ptr())
        for w, b in zip(weights, biases, strict=True)
    ]
    return torch.from_numpy(pack(code, precision, blocks, width, torch.get_num_threads()))


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
