"""Batches from several sources of examples, each by its share of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastbert.training.batches import PackedBatches, PretrainingBatch


class Mixture:
    """An endless iterator over batches, each with examples of several sources; see PackedBatches.

    A source gains its share of each batch's tokens, and gives examples once it has gained enough for every process to
    get one.

    Args:
        sources: their own `tokens_per_batch` are set here.
        tokens_per_batch: tokens that the sources gain for each batch, all of them and all processes together.
        weights: the shares of the sources, which need not add up to 1.
    """

    def __init__(self, sources: Sequence[PackedBatches], tokens_per_batch: int, weights: Sequence[float]) -> None:
        self.sources, self.tokens_per_batch, self.weights = list(sources), tokens_per_batch, weights
        self._credits = [0.0] * len(self.sources)

    def __iter__(self) -> Iterator[PretrainingBatch]:
        return self

    def __next__(self) -> PretrainingBatch:
        parts: list[PretrainingBatch] = []
        while not parts:
            for i, (source, weight) in enumerate(zip(self.sources, self.weights, strict=True)):
                self._credits[i] += self.tokens_per_batch * weight / sum(self.weights)
                if self._credits[i] >= source.least:
                    source.tokens_per_batch = int(self._credits[i])
                    self._credits[i] -= source.tokens_per_batch
                    parts.append(next(source))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def limit(self, **limits: Any) -> None:
        """Sets limits of all sources: see PackedBatches.limit; `tokens`, and the sources' `weights`, are its own."""
        tokens, self.weights = limits.pop("tokens", None), limits.pop("weights", self.weights)
        if tokens is not None:
            self.tokens_per_batch = tokens
        for source in self.sources:
            source.limit(**limits)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch."""
        return {"sources": [source.state_dict() for source in self.sources], "credits": list(self._credits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state. Raises ValueError for a state of other sources."""
        if len(state.get("sources", ())) != len(self.sources):
            raise ValueError(f"cannot continue: there were {len(state.get('sources', ()))} folders of shards")
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
        self._credits = list(state["credits"])


def _joined(parts: Sequence[PretrainingBatch]) -> PretrainingBatch:
    starts = torch.tensor([0, *(len(part.input_ids) for part in parts)]).cumsum(0)
    offsets = [part.cu_seqlens[1:] + start for part, start in zip(parts, starts[:-1].int(), strict=True)]
    sentences = [part.next_sentence_label for part in parts]
    return PretrainingBatch(
        input_ids=torch.cat([part.input_ids for part in parts]),
        token_type_ids=torch.cat([part.token_type_ids for part in parts]),
        cu_seqlens=torch.cat([parts[0].cu_seqlens[:1], *offsets]),
        max_seqlen=max(part.max_seqlen for part in parts),
        labels=torch.cat([part.labels for part in parts]),
        next_sentence_label=None
        if any(s is None for s in sentences)
        else torch.cat([s for s in sentences if s is not None]),
    )
