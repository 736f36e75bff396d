"""Batches of pre-training: packed to a budget of tokens, without padding, in a seeded order that can be resumed.

A batch is a function of the shards, the seed and (epoch, position). Each epoch goes over all examples once, in an
order of its own. A batch takes the next examples until one does not fit; that example starts the next batch. At the
end of an epoch, the batch is filled from the next epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.training.counter_random import Permutation, draws, key_of
from fastbert.training.masking import Masker, Masking
from fastbert.training.shards import Shards

_ORDER, _MASKS = 0, 1  # purposes of random keys


@dataclass(frozen=True)
class PretrainingBatch:
    """B packed sequences of T tokens in all, masked."""

    input_ids: Tensor  # (T,) int64
    token_type_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32
    max_seqlen: int
    labels: Tensor  # (T,) int64, -100 where nothing is predicted
    next_sentence_label: Tensor | None  # (B,) int64: 0 next sentences, 1 from another document; None without pairs

    def sentence_labels(self) -> Tensor:
        """Returns next_sentence_label. Raises ValueError if the examples are not pairs."""
        if self.next_sentence_label is None:
            raise ValueError("the examples are no pairs; a next-sentence loss needs shards of pairs")
        return self.next_sentence_label

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PretrainingBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return PretrainingBatch(**moved)


class PackedBatches:
    """An iterator over batches. It is endless unless `epochs` is given; then its last batch may be short.

    Every rank iterates over the same global batches and takes its sequences from each. Sequences are distributed from
    the longest to the shortest, back and forth over the ranks, so that all have nearly the same number of tokens. The
    ranks' parts of a batch together are the batch of a single process, with the same masks.

    After each batch, `state_dict()` returns the position of the next one, which does not depend on the number of ranks.

    Args:
        tokens_per_batch: most tokens of a global batch, all ranks together; at least the number of ranks times the
            longest example, so that every rank gets a sequence.
        seed: seed of order and masks.
        masking: how tokens are masked.
        epochs: number of passes over the examples; in the last batch, a rank may get no sequence.

    Raises:
        ValueError: no examples, or a budget that is too small.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        tokens_per_batch: int,
        seed: int,
        masking: Masking | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be at least 0 and below world_size, {world_size}")
        if not len(shards):
            raise ValueError(f"{shards.folder}: split {shards.split!r} holds no examples")
        self.least = shards.max_length * world_size
        self.shards, self.tokens_per_batch, self.seed = shards, tokens_per_batch, seed
        self.rank, self.world_size, self.epochs = rank, world_size, epochs
        self.check_tokens("tokens_per_batch", tokens_per_batch)
        self.taken = 0  # tokens of the newest global batch, all ranks together
        self.length: int | None = None
        self._mask = Masker(shards.tokenizer, masking or Masking())
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def check_tokens(self, name: str, tokens: int) -> None:
        """Raises ValueError, with the setting's name, for fewer tokens than the longest example of each rank has."""
        if tokens < self.least:
            raise ValueError(
                f"{name} is {tokens}; {self.world_size} process{'es' * (self.world_size > 1)} with examples "
                f"of up to {self.shards.max_length} tokens take at least {self.least}"
            )

    def limit(self, *, tokens: int | None = None, length: int | None = None, probability: float | None = None) -> None:
        """Sets the limits of the batches that follow.

        Args:
            tokens: of a batch, in place of tokens_per_batch.
            length: of a sequence: longer examples become several, and no token is lost; None for whole examples. Masks
                do not depend on it.
            probability: that a token is masked.

        Raises:
            ValueError: fewer tokens than the longest example has; a length where the examples are pairs.
        """
        if tokens is not None:
            self.check_tokens("tokens_per_batch", tokens)
            self.tokens_per_batch = tokens
        if length is not None and self.shards.pairs:
            raise ValueError(f"{self.shards.folder} holds pairs of segments, which cannot be cut to {length} tokens")
        self.length = length
        if probability is not None:
            self._mask.masking = replace(self._mask.masking, probability=probability)

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch, and the identity of the data, for `load_state_dict`."""
        return {"epoch": self._epoch, "position": self._position, **self._source()}

    def _source(self) -> dict[str, int]:
        return {"seed": self.seed, "examples": len(self.shards), "crc32": self.shards.crc32}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a state. Raises ValueError for a state of another seed or other shards."""
        for name, own in self._source().items():
            if (was := state.get(name)) != own:
                raise ValueError(f"cannot continue {self.shards.folder}: {name} was {was} and is {own} now")
        if state["epoch"] < 0 or not 0 <= state["position"] <= len(self.shards):
            raise ValueError(f"epoch {state['epoch']}, position {state['position']} is no place in {self.shards!r}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def __iter__(self) -> Iterator[PretrainingBatch]:
        return self

    def __next__(self) -> PretrainingBatch:
        numbers, lengths, epochs = self._fill()
        if not len(numbers):
            raise StopIteration
        self.taken = int(lengths.sum())
        mine = self._deal(lengths)
        return self._assemble(numbers[mine], epochs[mine])

    def _order_of(self, epoch: int) -> Permutation:
        return Permutation(len(self.shards), key_of(self.seed, _ORDER, epoch))

    def _fill(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes the next global batch; returns its examples' numbers, lengths and epochs."""
        taken: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        room = self.tokens_per_batch
        usual = max(1, room * len(self.shards) // self.shards.counts.tokens)  # examples in an average batch
        want = usual + usual // 8 + 1
        while True:
            if self._position == len(self.shards):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            if self._epoch == self.epochs:
                break
            stop = min(self._position + want, len(self.shards))
            numbers = self._order(np.arange(self._position, stop))
            lengths = self.shards.lengths(numbers)
            count = int(np.searchsorted(lengths.cumsum(), room, side="right"))
            taken.append((numbers[:count], lengths[:count], np.full(count, self._epoch)))
            room -= int(lengths[:count].sum())
            self._position += count
            if count < len(numbers):
                break
        columns = zip(*taken, strict=True) if taken else [[np.zeros(0, dtype=np.int64)]] * 3
        numbers, lengths, epochs = (np.concatenate(column) for column in columns)
        return numbers, lengths, epochs

    def _deal(self, lengths: np.ndarray) -> np.ndarray:
        """This rank's rows of a global batch, in its order."""
        rank = np.arange(len(lengths)) % (2 * self.world_size)
        rank = np.minimum(rank, 2 * self.world_size - 1 - rank)  # 0 1 2 2 1 0 0 1 2 ...
        owner = np.empty_like(rank)
        owner[np.argsort(-lengths, kind="stable")] = rank
        return np.flatnonzero(owner == self.rank)

    def _assemble(self, numbers: np.ndarray, epochs: np.ndarray) -> PretrainingBatch:
        tokens, offsets, seconds, labels = self.shards.read(numbers)
        lengths = np.diff(offsets)
        keys = {epoch: key_of(self.seed, _MASKS, epoch) for epoch in set(epochs.tolist())}
        key = np.array([keys[epoch] for epoch in epochs.tolist()], dtype=np.uint64)
        seen, asked = self._mask(tokens, offsets, draws(key, numbers))
        types = np.arange(len(tokens)) >= np.repeat(offsets[:-1] + seconds, lengths)
        if self.length is not None:
            offsets = _cut(offsets, self.length)
            lengths = np.diff(offsets)
        return PretrainingBatch(
            input_ids=torch.from_numpy(seen),
            token_type_ids=torch.from_numpy(types.astype(np.int64)),
            cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
            max_seqlen=int(lengths.max(initial=0)),
            labels=torch.from_numpy(asked),
            next_sentence_label=torch.from_numpy(labels) if self.shards.pairs else None,
        )


def _cut(offsets: np.ndarray, length: int) -> np.ndarray:
    """The offsets of sequences, of which those that are longer than `length` tokens become several."""
    counts = -(-np.diff(offsets) // length)
    firsts = np.repeat(offsets[:-1], counts)
    number = np.arange(len(firsts)) - np.repeat(counts.cumsum() - counts, counts)
    return np.append(firsts + number * length, offsets[-1])
