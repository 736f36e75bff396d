"""Batches from several sources of examples, each by its share of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastbert.training.batches import PackedBatches, PretrainingBatch


class Mixture:
    """An endless iterator over batches, each with examples of several sources; see PackedBatches.

    A source gives its share of a batch's tokens, and those that it owes from batches before. If that is too little for
    every process to get an example, it gives none and owes it; the source that owes most gives more instead.

    Args:
        sources: their own `tokens_per_batch` are set here.
        tokens_per_batch: most tokens of a batch, all sources and processes together.
        weights: the shares of the sources, which need not add up to 1.
    """

    def __init__(self, sources: Sequence[PackedBatches], tokens_per_batch: int, weights: Sequence[float]) -> None:
        self.sources, self.tokens_per_batch, self.weights = list(sources), tokens_per_batch, weights
        self._owed = [0.0] * len(self.sources)

    def __iter__(self) -> Iterator[PretrainingBatch]:
        return self

    def __next__(self) -> PretrainingBatch:
        parts: list[PretrainingBatch] = []
        taken = [0] * len(self.sources)
        for i, tokens in self._budgets().items():
            source = self.sources[i]
            source.tokens_per_batch = tokens
            parts.append(next(source))
            taken[i] = source.taken
        self._owed = [
            owed + share * sum(taken) - of for owed, share, of in zip(self._owed, self._shares, taken, strict=True)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    @property
    def _shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]

    def _budgets(self) -> dict[int, int]:
        """The most tokens of the next batch from each source that gives some; at most tokens_per_batch in all."""
        most, shares = self.tokens_per_batch, self._shares
        able = sorted((i for i, share in enumerate(shares) if share), key=lambda i: -self._owed[i])
        rest = most - sum(self._owed[i] for i in able)  # what they owe adds up to 0 until the weights change
        due = {i: shares[i] * rest + self._owed[i] for i in able}
        chosen = [i for i in able if due[i] >= self.sources[i].least] or able[:1]
        due[chosen[0]] += max(0.0, most - sum(due[i] for i in chosen))
        budgets: dict[int, int] = {}
        for i in chosen:
            tokens = min(round(due[i]), most - sum(budgets.values()))
            if tokens >= self.sources[i].least:
                budgets[i] = tokens
        return budgets

    def limit(self, **limits: Any) -> None:
        """Sets limits of all sources: see PackedBatches.limit; `tokens`, and the sources' `weights`, are its own."""
        tokens, self.weights = limits.pop("tokens", None), limits.pop("weights", self.weights)
        if tokens is not None:
            self.tokens_per_batch = tokens
        for source in self.sources:
            source.limit(**limits)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch."""
        return {"sources": [source.state_dict() for source in self.sources], "owed": list(self._owed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state. Raises ValueError for a state of other sources."""
        if len(state.get("sources", ())) != len(self.sources):
            raise ValueError(f"cannot continue: there were {len(state.get('sources', ()))} folders of shards")
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
        self._owed = list(state["owed"])


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
