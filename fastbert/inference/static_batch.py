"""The static input buffers of a graph: tensors with fixed addresses for a rounded-up number of tokens and of texts.

Tokens after the last text belong to no text: attention outputs zeros for them, all else is computed row by row, and
their results are not read. Unused texts are empty.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import family_of
from fastbert.families.layer_kinds import place_count
from fastbert.model.inputs import Inputs
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.packing import PackedBatch

# Error bits that the device sets for a call.
BAD_MASK, BAD_OFFSETS, BAD_ID = 1, 2, 4
COMPLAINTS = {
    BAD_MASK: "attention_mask holds another value than 0 and 1",
    BAD_OFFSETS: "cu_seqlens does not rise from 0 to the number of tokens, or holds a sequence longer than max_seqlen "
    "or max_position_embeddings",
    BAD_ID: "an id in input_ids, token_type_ids or position_ids is outside its table",
}


class Bucket(NamedTuple):
    """The sizes that a graph is captured for."""

    tokens: int
    texts: int


def token_sizes(most: int) -> list[int]:
    """Bucket sizes from 16 to `most`: powers of two up to 256, then four per octave (at most a fifth is padding)."""
    sizes, size = [], 16
    while size < most:
        sizes.append(size)
        size += size if size < 256 else 1 << (size.bit_length() - 3)
    return [*sizes, most]


def bucket_of(tokens: int, texts: int, sizes: list[int]) -> Bucket:
    """The smallest bucket that holds so many tokens and texts. Empty texts are cheap: they go in powers of four."""
    rounded = 1
    while rounded < texts:
        rounded *= 4
    return Bucket(sizes[bisect_left(sizes, tokens)], rounded)


class StaticBatch:
    """The buffers of one bucket, and the model's inputs made from them.

    `tokens` (3, T) int64 holds input ids, token types and positions; `cu_seqlens` (B+1,) int32 the offsets; `wrong`
    (1,) int32 the error bits found before the call was loaded. `full` is the (B, S) of the positions and offsets now in
    the buffers if they are those of a batch without pads, else None. `typed` is True if a token type may be nonzero,
    `suspect` if `wrong` may be.
    """

    def __init__(self, model: BertPreTrainedModel, bucket: Bucket, device: torch.device) -> None:
        family, encoder = family_of(model.config.model_type), model.base_model
        words, types = (family.table(encoder, path) for path in (family.embeddings.word, family.embeddings.types))
        places = place_count(model.config, family)
        limits = (words.weight.shape[0], 1 if types is None else types.weight.shape[0], places)
        self.bucket = bucket
        # One block, so that a host call is one copy: ids, types, positions (int64), and the offsets (int32).
        self._block = torch.zeros(3 * bucket.tokens + bucket.texts // 2 + 1, dtype=torch.int64, device=device)
        self.tokens, self.cu_seqlens = self._parts(self._block)
        self.wrong = torch.zeros(1, dtype=torch.int32, device=device)
        self.full: tuple[int, int] | None = None
        self.typed = self.suspect = False
        self._lowest = torch.zeros((3, 1), dtype=torch.int64, device=device)
        self._highest = torch.tensor(limits, device=device)[:, None] - 1
        self._longest = min(bucket.tokens, model.config.max_length)

    def _parts(self, block: Tensor) -> tuple[Tensor, Tensor]:
        tokens, texts = self.bucket
        return block[: 3 * tokens].view(3, tokens), block[3 * tokens :].view(torch.int32)[: texts + 1]

    def reset(self) -> None:
        """Zeroes the buffers, so that invalid ids do not reach a later call that does not overwrite them."""
        self._block.zero_()
        self.wrong.zero_()
        self.full, self.typed, self.suspect = None, False, False

    def inputs(self) -> tuple[Inputs, Tensor]:
        """The model's inputs, with ids clamped to their tables; and `wrong`, with BAD_ID set if that changed an id.

        The host does not read values or offsets, so nothing waits for the device. Sequences may be empty, and tokens
        after the last sequence belong to none. `max_seqlen` is an upper bound.
        """
        held = self.tokens.clamp(self._lowest, self._highest)
        wrong = self.wrong + (held != self.tokens).any().to(torch.int32) * BAD_ID
        ids, token_types, positions = held.unbind()
        batch = PackedBatch(self.bucket.texts, self._longest, self.cu_seqlens, self._longest, None)
        return Inputs(batch, ids, None, token_types, positions, came_packed=True), wrong

    def load_host(self, ids: Tensor, token_types: Tensor, positions: Tensor, cu_seqlens: Tensor) -> None:
        """Loads a whole call from the CPU: three tensors (T,), and cu_seqlens (B+1,)."""
        block = torch.zeros(self._block.shape, dtype=torch.int64, device="cpu", pin_memory=self._block.is_cuda)
        tokens, offsets = self._parts(block)
        for row, x in zip(tokens, (ids, token_types, positions), strict=True):
            row[: len(x)] = x
        offsets[: len(cu_seqlens)] = cu_seqlens
        offsets[len(cu_seqlens) :] = cu_seqlens[-1]
        self._block.copy_(block, non_blocking=True)
        self.full, self.typed = None, True

    def load_offsets(self, cu_seqlens: Tensor) -> None:
        """Loads cu_seqlens (B+1,) from any device; the remaining texts are empty."""
        empty = self.bucket.texts + 1 - len(cu_seqlens)
        self._write(self.cu_seqlens, torch.cat([cu_seqlens.int(), cu_seqlens[-1:].int().expand(empty)]))
        self.full = None

    def load_full(self, batch_size: int, seq_len: int) -> None:
        """Loads positions and offsets of B texts of S tokens each, unless the buffers hold them already."""
        if self.full != (batch_size, seq_len):
            self.load_positions(torch.arange(seq_len, device="cpu").repeat(batch_size))
            self.load_offsets(torch.arange(batch_size + 1, device="cpu") * seq_len)
            self.full = (batch_size, seq_len)

    def load_ids(self, ids: Tensor) -> None:
        """Loads input ids (N,)."""
        self._write(self.tokens[0, : len(ids)], ids)

    def load_positions(self, positions: Tensor) -> None:
        """Loads positions (N,)."""
        self._write(self.tokens[2, : len(positions)], positions)
        self.full = None

    def load_types(self, token_types: Tensor | None) -> None:
        """Loads token types (N,); None loads zeros."""
        if token_types is not None:
            self._write(self.tokens[1, : len(token_types)], token_types)
        elif self.typed:
            self.tokens[1].zero_()
        self.typed = token_types is not None

    def load_wrong(self, wrong: Tensor | None) -> None:
        """Loads the call's error bits, (1,) int32 on the device; None if the host has checked the call."""
        if wrong is not None:
            self.wrong.copy_(wrong)
        elif self.suspect:
            self.wrong.zero_()
        self.suspect = wrong is not None

    def _write(self, buffer: Tensor, x: Tensor) -> None:
        buffer.copy_(x.to(buffer.dtype).pin_memory() if buffer.is_cuda and not x.is_cuda else x, non_blocking=True)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies x to a device without waiting. Pinned memory for a copy from the CPU is held by torch until it is done."""
    return x.pin_memory().to(device, non_blocking=True) if x.device.type == "cpu" != device.type else x
