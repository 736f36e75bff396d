"""Weights in the order that the kernels read, kept beside the parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fastbert.native.extension import CPU_DTYPES, C, chosen_isa

# id(weight) -> (weak reference to it, what it was packed from, the packed bytes).
_kept: dict[int, tuple[weakref.ref[Tensor], tuple, Tensor]] = {}
# The same of their transposes, by which a backward multiplies.
_transposes: dict[int, tuple[weakref.ref[Tensor], tuple, Tensor]] = {}


def packed(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight and bias in the order the kernels read, kept for as long as the weight tensor lives.

    Packed again when the address or the version counter of either, the instruction set or a sample of the
    values changes: writes through `.data` leave the version counter as it is.
    """
    threads, (_, isa_number) = torch.get_num_threads(), chosen_isa()
    N, K = weight.shape
    address, bias_address = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    key = (
        address,
        weight._version,
        bias_address,
        None if bias is None else bias._version,
        isa_number,
        C.sample(address, weight.numel() * weight.element_size() if weight.is_contiguous() else 0),
        C.sample(bias_address, 0 if bias is None else N * bias.element_size()),
    )
    entry = _kept.get(id(weight))
    if entry is not None and entry[1] == key:
        return entry[2]
    dtype = CPU_DTYPES[weight.dtype]
    buffer = torch.empty(C.packed_weight_bytes(dtype, N, K, isa_number), dtype=torch.uint8)
    C.pack_weight_cpu(dtype, N, K, address, weight.stride(0), bias_address, buffer.data_ptr(), isa_number, threads)
    identity = id(weight)
    owner = weakref.ref(weight, lambda _: _kept.pop(identity, None))
    _kept[identity] = (owner, key, buffer)
    return buffer


def kept_transpose(weight: Tensor, pack: Callable[[], Tensor]) -> Tensor:
    """What `pack` makes of the weight's transpose, kept and made again as `packed` does."""
    key = (
        weight.data_ptr(),
        weight._version,
        chosen_isa()[1],
        C.sample(weight.data_ptr(), weight.numel() * weight.element_size() if weight.is_contiguous() else 0),
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
