"""Weights in the order that the kernels read, kept beside the parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastbert.native.extension import CPU_DTYPES, PRECISIONS, C, chosen_isa, fresh

# (id(weight), precision) -> (weak reference to it, what it was packed from, the packed bytes).
_kept: dict[tuple[int, str | None], tuple[weakref.ref[Tensor], tuple, Tensor]] = {}
# The same of their transposes, by which a backward multiplies.
_transposes: dict[int, tuple[weakref.ref[Tensor], tuple, Tensor]] = {}


def packed(weight: Tensor, bias: Tensor | None, precision: str | None = None) -> Tensor:
    """The weight and bias in the order the kernels read, kept for as long as the weight tensor lives.

    Packed again when the address or the version counter of either, the instruction set or a sample of the
    values changes: writes through `.data` leave the version counter as it is.
    """
    if weight.is_meta:
        return _kept[id(weight), precision][2]  # see `release`; supports_linear has asked `stands_in`
    threads, (_, isa_number) = torch.get_num_threads(), chosen_isa()
    N, K = weight.shape
    address, bias_address = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    key = (
        address,
        weight.shape,
        weight.stride(),
        weight._version,
        bias_address,
        None if bias is None else bias._version,
        isa_number,
        sample([weight, bias]),
    )
    identity = id(weight), precision
    entry = _kept.get(identity)
    if entry is not None and entry[1] == key:
        return entry[2]
    kind = CPU_DTYPES[weight.dtype], PRECISIONS[precision], N, K
    buffer = fresh(weight, C.packed_weight_bytes(*kind, isa_number), dtype=torch.uint8)
    C.pack_weight_cpu(*kind, address, weight.stride(0), bias_address, buffer.data_ptr(), isa_number, threads)
    owner = weakref.ref(weight, lambda _: _kept.pop(identity, None))
    _kept[identity] = (owner, key, buffer)
    return buffer


def release(weight: Tensor, bias: Tensor | None, precision: str | None) -> nn.Parameter:
    """A stand-in for `weight` on the meta device: it has no memory, but the kernels find the packed form by it."""
    buffer = packed(weight, bias, precision)
    _kept.pop((id(weight), precision))
    stand_in = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
    identity = id(stand_in), precision
    owner = weakref.ref(stand_in, lambda _: _kept.pop(identity, None))
    _kept[identity] = owner, (chosen_isa()[1],), buffer
    return stand_in


def stands_in(weight: Tensor, precision: str | None) -> bool:
    """Whether `weight` is a stand-in whose packed form these kernels can read."""
    entry = _kept.get((id(weight), precision)) if weight.is_meta else None
    return entry is not None and entry[1] == (chosen_isa()[1],)


def sample(tensors: Iterable[Tensor | None]) -> int:
    """A hash of 16 words of each, which sees a write to a sixteenth of the rows or columns, side by side."""
    return C.sample(*extents(tensors))


def extents(tensors: Iterable[Tensor | None]) -> tuple[list[int], list[int], list[int]]:
    """Where those that can be sampled lie, their rows, and the 32-bit words of a row; half a word is left out."""
    lying = [t for t in tensors if t is not None and t.is_contiguous() and not t.is_meta]
    paired = [(t.shape[0], t.shape[1] * t.element_size() / 4) if t.dim() == 2 else (1, t.nbytes / 4) for t in lying]
    # Rows that do not end with a word are one long row.
    shapes = [(rows, int(words)) if words == int(words) else (1, int(rows * words)) for rows, words in paired]
    return [t.data_ptr() for t in lying], [rows for rows, _ in shapes], [words for _, words in shapes]


def kept_transpose(weight: Tensor, pack: Callable[[], Tensor]) -> Tensor:
    """What `pack` makes of the weight's transpose, kept and made again as `packed` does."""
    key = (
        weight.data_ptr(),
        weight.shape,
        weight.stride(),
        weight._version,
        chosen_isa()[1],
        sample([weight]),
    )
    identity = id(weight)
    entry = _transposes.get(identity)
    if entry is not None and entry[1] == key:
        return entry[2]
    buffer = pack()
    _transposes[identity] = (weakref.ref(weight, lambda _: _transposes.pop(identity, None)), key, buffer)
    return buffer


def packed_bytes() -> int:
    """The memory that packed weights take, beside the weights themselves."""
    return sum(buffer.numel() for kept in (_kept, _transposes) for _, _, buffer in kept.values())
