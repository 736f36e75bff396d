"""Loads a call into a graph's buffers, by which of its values the host knows and which only the device knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert import ops
from fastbert.config import family_of
from fastbert.inference.static_batch import BAD_MASK, BAD_OFFSETS, StaticBatch, on_device
from fastbert.model.inputs import Inputs, counted_positions, is_spread, prepare
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.packing import PackedBatch, batch_from_cu_seqlens, unpack

_MISFIT, _TOO_LONG = "shapes do not match", "a text is longer than max_position_embeddings"
_GAPS = "attention depends on distances, and a mask on the device, or one with gaps between tokens, may change them"


class Call(NamedTuple):
    """A call that a graph can run.

    `tokens` is the number of tokens, or its upper bound; `shape` is that of the caller's tokens, (B, S) or (T,). `load`
    writes the call into the buffers. It returns the packed row of each position, (B * S,), or None without pads.
    """

    tokens: int
    texts: int
    shape: tuple[int, ...]
    load: Callable[[StaticBatch], Tensor | None]

    def give_back(self, x: Tensor, places: Tensor | None, fill: float) -> Tensor:
        """A copy of a graph's output per token, in the caller's shape: (T, ...) -> (*shape, ...)."""
        flat = x[: self.tokens].clone() if places is None else ops.gather_rows(x, places, fill=fill)
        return flat.view(*self.shape, *x.shape[1:])


def on_host(x: Tensor | None) -> bool:
    """True if the values of x are on the host, or x is None: reading it does not wait for a device."""
    return x is None or x.device.type == "cpu"


def read_call(
    model: BertPreTrainedModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Call | str:
    """The call that these arguments make, or the reason why no graph can run it.

    Raises:
        ValueError: as the model does, if all arguments are on the host.
    """
    bert, family, most = model.base_model, family_of(model.config.model_type), model.config.max_length
    tensors = (attention_mask, token_type_ids, position_ids, cu_seqlens)
    if not isinstance(input_ids, Tensor) or not all(x is None or isinstance(x, Tensor) for x in tensors):
        return "input_ids are not given as a tensor"
    if not input_ids.numel():
        return "there is no token"
    if all(on_host(x) for x in (input_ids, *tensors)):
        arguments = (attention_mask, token_type_ids, position_ids, None, cu_seqlens, max_seqlen)
        inputs = prepare(bert, input_ids, *arguments, family=family)
        return _GAPS if inputs.key_mask is not None else _host_call(inputs, most)
    shape = input_ids.shape
    if reason := _why_not(shape, attention_mask, cu_seqlens, most):
        return reason
    if family.counts_tokens and position_ids is None:
        position_ids = counted_positions(input_ids, model.config.first_position, cu_seqlens)
    if not family.has_token_types:
        token_type_ids = None
    fitted: list[Any] = []
    for x in (input_ids, token_type_ids, position_ids):
        if x is not None:
            x = x.expand(shape) if cu_seqlens is None and is_spread(x, shape) else x
            if x.shape != shape:
                return _MISFIT
            if x.dtype not in (torch.int64, torch.int32):
                return "ids are neither int64 nor int32"
            x = x.reshape(-1)
        fitted.append(x)
    ids, types, positions = fitted
    if cu_seqlens is not None:
        if on_host(cu_seqlens) and batch_from_cu_seqlens(cu_seqlens, shape[0], max_seqlen).max_seqlen > most:
            return _TOO_LONG
        return _packed_call(ids, types, positions, cu_seqlens, most if max_seqlen is None else min(most, max_seqlen))
    if attention_mask is not None and family.knows_distances:
        return _GAPS
    if attention_mask is None:
        return _full_call(ids, types, positions, tuple(shape))
    if on_host(attention_mask):
        return _host_mask_call(ids, types, positions, ops.read_mask(attention_mask))
    return _device_mask_call(ids, types, positions, attention_mask)


def _why_not(shape: torch.Size, mask: Tensor | None, cu_seqlens: Tensor | None, most: int) -> str | None:
    """The reason why no graph can run ids of this shape on the device; None where one can."""
    if cu_seqlens is not None:
        if mask is not None:
            return "attention_mask and cu_seqlens are both given"
        return None if len(shape) == 1 and cu_seqlens.dim() == 1 and len(cu_seqlens) else _MISFIT
    if len(shape) != 2 or (mask is not None and mask.shape != shape):
        return _MISFIT
    return _TOO_LONG if shape[1] > most else None


def _host_call(inputs: Inputs, most: int) -> Call | str:
    """A call whose tensors are all on the host, where they are checked."""
    batch, ids = inputs.batch, inputs.ids
    assert ids is not None, "a call with embeddings"
    if batch.max_seqlen > most:
        return _TOO_LONG

    def load(static: StaticBatch) -> Tensor | None:
        static.load_host(ids, inputs.token_type_ids, inputs.position_ids, batch.cu_seqlens)
        static.load_wrong(None)
        return None if inputs.came_packed else _places(batch, static)

    shape = (len(ids),) if inputs.came_packed else inputs.padded_shape
    return Call(len(ids), batch.batch_size, shape, load)


def _full_call(ids: Tensor, types: Tensor | None, positions: Tensor | None, shape: tuple[int, ...]) -> Call:
    """A call without a mask: nothing is packed. A second batch of the same shape copies its ids only."""

    def load(static: StaticBatch) -> None:
        static.load_ids(ids)
        static.load_types(types)
        static.load_full(*shape)
        if positions is not None:
            static.load_positions(positions)
        static.load_wrong(None)

    return Call(len(ids), shape[0], shape, load)


def _host_mask_call(ids: Tensor, types: Tensor | None, positions: Tensor | None, batch: PackedBatch) -> Call:
    """A call with tokens on the device and the mask on the host."""
    shape = (batch.batch_size, batch.seq_len)
    rows = batch.indices
    if rows is None:
        return _full_call(ids, types, positions, shape)

    def load(static: StaticBatch) -> Tensor | None:
        indices = on_device(rows, ids.device)
        static.load_ids(ops.gather_rows(ids, indices))
        static.load_types(None if types is None else ops.gather_rows(types, indices))
        columns = rows % batch.seq_len
        static.load_positions(columns if positions is None else ops.gather_rows(positions, indices))
        static.load_offsets(batch.cu_seqlens)
        static.load_wrong(None)
        return _places(batch, static)

    return Call(len(rows), batch.batch_size, shape, load)


def _device_mask_call(ids: Tensor, types: Tensor | None, positions: Tensor | None, mask: Tensor) -> Call:
    """A call with the mask on the device, which packs the tokens; the host assumes B * S of them."""

    def load(static: StaticBatch) -> Tensor:
        cu_seqlens, indices, places, bad = ops.pack_mask(mask)
        static.load_ids(ops.gather_rows(ids, indices))
        static.load_types(None if types is None else ops.gather_rows(types, indices))
        columns = indices % mask.shape[1]  # the unused index -1 also becomes a valid column
        static.load_positions(columns if positions is None else ops.gather_rows(positions, indices))
        static.load_offsets(cu_seqlens)
        static.load_wrong(bad * BAD_MASK)
        return places

    return Call(len(ids), mask.shape[0], tuple(mask.shape), load)


def _packed_call(ids: Tensor, types: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor, longest: int) -> Call:
    """A packed call, with offsets on the device."""

    def load(static: StaticBatch) -> None:
        offsets = on_device(cu_seqlens, ids.device)
        lengths = offsets.diff()
        static.load_ids(ids)
        static.load_types(types)
        static.load_positions(_columns(offsets, len(ids)) if positions is None else positions)
        static.load_offsets(offsets)
        wrong = (offsets[0] != 0) | (offsets[-1] != len(ids)) | ((lengths < 0) | (lengths > longest)).any()
        static.load_wrong(wrong[None] * BAD_OFFSETS)

    return Call(len(ids), len(cu_seqlens) - 1, (len(ids),), load)


def _columns(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each packed token's position in its text, (T,)."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    text = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[text.clamp(min=0)]


def _places(batch: PackedBatch, static: StaticBatch) -> Tensor | None:
    """The packed row of each position of a batch on the host, (B * S,) on the device, -1 at a pad."""
    if batch.indices is None:
        return None
    rows = unpack(torch.arange(len(batch.indices), device="cpu"), batch, fill=-1).flatten()
    return on_device(rows, static.tokens.device)
