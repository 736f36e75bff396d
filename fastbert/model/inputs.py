"""A model call's arguments, checked before anything runs, and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.families import BERT, Family
from fastbert.families.layer_kinds import place_count
from fastbert.packing import PackedBatch, batch_from_cu_seqlens, full_batch, pack, unpack


@dataclass(frozen=True)
class Inputs:
    """The tokens to compute, packed; `batch` holds their positions in the caller's rows.

    ids, token_type_ids and position_ids are (T,) int64; embeds is (T, E) and takes the place of ids.
    `key_mask` (B, S) bool is None if every computed token is a key. Otherwise some tokens are queries only: the
    attention mask is 0 at them, but they are not pads, and their states are used (ColBERT's query expansion).
    """

    batch: PackedBatch
    ids: Tensor | None
    embeds: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    came_packed: bool = False
    key_mask: Tensor | None = None
    is_full: bool = False  # no column is a pad: row b starts at token b * S
    has_queries: bool = False  # tokens other than pads are masked: they are computed, and their states count

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.batch.batch_size, self.batch.seq_len

    def flat(self) -> Inputs:
        """All columns, with pads as token 0: every field is (B * S, ...)."""
        if self.batch.indices is None:
            return self
        names = ("ids", "embeds", "token_type_ids", "position_ids")
        given = {name: getattr(self, name) for name in names}
        padded: Any = {name: unpack(x, self.batch).flatten(0, 1) for name, x in given.items() if x is not None}
        return replace(self, **padded)

    def keys(self) -> Tensor:
        """The positions that are attended to, (B, S) bool."""
        return self.batch.mask() if self.key_mask is None else self.key_mask

    def give_back(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Packed (T, ...) to the shape of the caller's input: (B, S, ...), or (T, ...) if it was packed."""
        return x if self.came_packed else self.pad(x, fill)

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Packed (T, ...) to (B, S, ...), `fill` at the pads, whatever shape the input had.

        A masked position that is computed only because it lies between two tokens is a pad.
        """
        padded = unpack(x, self.batch, fill)
        if self.key_mask is None or self.has_queries:
            return padded
        return padded.masked_fill(~self.key_mask.view(*self.key_mask.shape, *[1] * (x.dim() - 1)), fill)

    def real(self, labels: Tensor, ignored: int) -> Tensor:
        """The caller's labels per token as (T,), `ignored` at pads that are computed."""
        if self.key_mask is not None and not self.has_queries:
            labels = labels.masked_fill(~self.key_mask, ignored)
        return self.take(labels)

    def take(self, x: Tensor) -> Tensor:
        """The caller's values per token, such as labels, as (T, ...)."""
        return x if self.came_packed else pack(x, self.batch)


def check_ids(name: str, ids: Tensor, limit: int, what: str) -> Tensor:
    """Checks that ids are in 0..limit-1 and returns them as int64; `what` names the limit in the message."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {ids.dtype}; it must be int64 or int32")
    check_ranges([(name, ids, limit, what)])
    return ids.long()


def check_ranges(several: Sequence[tuple[str, Tensor, int, str]]) -> None:
    """Checks for each (name, ids, limit, what) that ids are in 0..limit-1; waits for their device once."""
    if torch.compiler.is_compiling():  # a compiled graph cannot branch on values
        return
    found: list[list[Any]] = []
    waiting: list[Tensor] = []
    for name, ids, limit, what in several:
        if ids.numel():
            while torch._C._functorch.is_functorch_wrapped_tensor(ids):  # under torch.vmap: check the whole batch
                ids = torch._C._functorch.get_unwrapped(ids)
            bounds = ops.bounds(ids)
            found.append([name, limit, what, bounds])
            if bounds is None:
                waiting += ids.aminmax()
    if waiting:
        flat = iter(torch.stack(waiting).tolist())
        for one in found:
            one[3] = one[3] or (next(flat), next(flat))
    for name, limit, what, (low, high) in found:
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}; {what} is {limit}, so 0 to {limit - 1} are valid"
            )


def prepare(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | PackedBatch | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    pad_id: int | None = None,
    masked_queries: bool = False,
    family: Family = BERT,
) -> Inputs:
    """Checks the arguments of a model call against the tables of an encoder and packs the tokens to compute.

    `attention_mask` may be a batch returned by `ops.read_mask`.
    With `masked_queries`, masked positions that hold an id other than `pad_id`, or embeddings, are computed as in
    transformers: they attend to the others, and nothing attends to them.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the limit.
    """
    # A wrapped table, as by PEFT, has the weight of the table inside.
    words, types = (family.table(model, path) for path in (family.embeddings.word, family.embeddings.types))
    name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if tokens is None or not (input_ids is None or inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    mask = None if isinstance(attention_mask, PackedBatch) else attention_mask
    named = {name: tokens, "attention_mask": mask, "token_type_ids": token_type_ids}
    _check_tensors({**named, "position_ids": position_ids, "cu_seqlens": cu_seqlens})
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError("attention_mask and cu_seqlens are both given; packed input has no mask")
    if torch.jit.is_tracing() and not (attention_mask is None and cu_seqlens is None):
        given = "cu_seqlens" if attention_mask is None else "attention_mask"
        raise ValueError(f"{given} is given to torch.jit.trace, which would hold these lengths for every later call")
    trailing = 0 if inputs_embeds is None else 1
    wanted = "(tokens,)" if cu_seqlens is not None else "(batch, sequence)"
    if tokens.dim() - trailing != (1 if cu_seqlens is not None else 2):
        raise ValueError(
            f"{name} has shape {tuple(tokens.shape)}; it must be {wanted}{' and the hidden size' * trailing}"
        )
    shape, device = tokens.shape[: tokens.dim() - trailing], tokens.device
    if inputs_embeds is not None:
        _check_embeds(inputs_embeds, words.weight.shape[1])
    if cu_seqlens is not None:
        batch = batch_from_cu_seqlens(cu_seqlens, tokens.shape[0], max_seqlen)
    else:
        batch = _batch_of(attention_mask, name, shape, device)
    positions, first = _places(model, family), family.first_position(model)
    by_column = position_ids is None or family.distance_table is not None or family.alibi
    # Where positions count tokens, a row may be longer by its pads.
    length = batch.max_seqlen if first and not family.knows_distances else batch.seq_len
    if by_column and length + first > positions:
        which = f", and the first is {first}" if first else ""
        raise ValueError(f"{name} has a sequence of {length} tokens; max_position_embeddings is {positions}{which}")
    if position_ids is None and first:
        ids = torch.full(shape, first, device=device) if input_ids is None else input_ids
        position_ids = counted_positions(ids, first, None if cu_seqlens is None else batch.cu_seqlens)
    ranges, checked = [], {}
    for argument, x, limit, what in (
        ("input_ids", input_ids, words.weight.shape[0], "vocab_size"),
        ("token_type_ids", token_type_ids, None if types is None else types.weight.shape[0], "type_vocab_size"),
        ("position_ids", position_ids, positions, "max_position_embeddings"),
    ):
        if x is None or limit is None:
            continue
        if argument != "input_ids" and cu_seqlens is None and is_spread(x, shape):
            x = x.expand(shape)
        if x.shape != shape:
            raise ValueError(f"{argument} has shape {tuple(x.shape)}; it must be {tuple(shape)}")
        if x.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{argument} has dtype {x.dtype}; it must be int64 or int32")
        ranges.append((argument, x, limit, what))
        checked[argument] = x.long()
    check_ranges(ranges)
    key_mask = None
    if masked_queries and attention_mask is not None and batch.indices is not None:
        batch, key_mask = _with_queries(batch, checked.get("input_ids"), pad_id)
    queries = key_mask is not None
    if family.knows_distances and attention_mask is not None and batch.indices is not None:
        batch, key_mask = _with_gaps(batch, key_mask)
    return replace(_packed(batch, checked, inputs_embeds, cu_seqlens is not None, key_mask), has_queries=queries)


def _places(model: nn.Module, family: Family) -> int:
    """Positions are below this."""
    if family.embeddings.positions is not None:
        return family.table(model, family.embeddings.positions).weight.shape[0]
    return place_count(model.config, family)


def _batch_of(mask: Tensor | PackedBatch | None, name: str, shape: torch.Size, device: torch.device) -> PackedBatch:
    """The batch of a mask; `name` is that of the tokens, whose shape it must have."""
    if mask is None:
        return full_batch(shape[0], shape[1], device)
    if isinstance(mask, PackedBatch):
        return mask
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it must be that of {name}, {tuple(shape)}")
    return ops.read_mask(mask)


def counted_positions(ids: Tensor, first: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """fairseq's positions: `first` and on for the tokens of a sequence that are not padding, first - 1 for padding.

    ids: (B, S), or (T,) with `cu_seqlens` (B+1,). Nothing waits for a device.
    """
    real = ids != first - 1
    counts = real.cumsum(-1)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(ids.device, non_blocking=True).long()
        token = torch.arange(len(ids), device=ids.device)
        text = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, len(starts) - 1)
        before = torch.cat([counts.new_zeros(1), counts])
        counts = counts - before[starts[text].clamp(0, len(ids))]
    return counts * real + (first - 1)


def _check_tensors(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")


def _check_embeds(embeds: Tensor, width: int) -> None:
    if embeds.shape[-1] != width or not embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds has shape {tuple(embeds.shape)} and dtype {embeds.dtype}; "
            f"it must be floating-point with {width} columns"
        )


def _packed(
    batch: PackedBatch,
    ids: dict[str, Tensor],
    embeds: Tensor | None,
    came_packed: bool,
    key_mask: Tensor | None,
) -> Inputs:
    indices, device = batch.indices, batch.cu_seqlens.device
    if not came_packed:
        for name, x in ids.items():
            ids[name] = x.reshape(-1) if indices is None else x.reshape(-1).index_select(0, indices)
        if embeds is not None:
            embeds = pack(embeds, batch)
    tokens = ids["input_ids"] if embeds is None else embeds
    types, positions = ids.get("token_type_ids"), ids.get("position_ids")
    if types is None:
        types = torch.zeros(tokens.shape[0], dtype=torch.int64, device=device)
    if positions is None:
        columns = torch.arange(tokens.shape[0], device=device) if indices is None else indices
        positions = columns % max(batch.seq_len, 1)
    is_full = indices is None
    return Inputs(batch, ids.get("input_ids"), embeds, types, positions, came_packed, key_mask, is_full)


def _with_queries(batch: PackedBatch, ids: Tensor | None, pad_id: int | None) -> tuple[PackedBatch, Tensor | None]:
    """The batch including masked tokens that are not pads, and the mask of its keys; None if there are no such tokens.

    A row without a key stays without tokens: there is nothing to attend to.
    """
    keys = batch.mask()
    queries = ~keys & (batch.lengths > 0)[:, None]
    if ids is not None and pad_id is not None:
        queries &= ids != pad_id
    return (ops.read_mask(keys | queries), keys) if queries.any() else (batch, None)


def _with_gaps(batch: PackedBatch, key_mask: Tensor | None) -> tuple[PackedBatch, Tensor | None]:
    """The batch including what lies between the tokens of a row, so that their distances are those of the columns, and
    the mask of its keys; as given if nothing lies between."""
    tokens = batch.mask()
    within = (tokens.cumsum(1) > 0) & (tokens.flip(1).cumsum(1).flip(1) > 0)
    if torch.equal(within, tokens):
        return batch, key_mask
    return ops.read_mask(within), tokens if key_mask is None else key_mask


def is_spread(x: Tensor, shape: torch.Size) -> bool:
    """True if x is one row for all of `shape` (B, S), or one number per row, as transformers accepts."""
    return x.shape in ((1, *shape[1:]), shape[1:], (shape[0], 1), (1, 1))
