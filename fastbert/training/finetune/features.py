"""Examples as model inputs, and batches of them, packed without pad tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
_SORTED_TOGETHER = 50  # with order "length", features of so many batches are sorted together


@dataclass(frozen=True)
class Feature:
    """An example, or a window of one, in token ids.

    `places` gives the origin of tokens, for decoding. For words it is (T,): the index of the word whose first token
    this is, else -1. For an answer's context it is (T, 2): the token's range of characters, else -1.
    """

    example: int
    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]  # ids and types of each; several for choices
    label: Any
    weight: float = 1.0  # number of decisions in the mean loss
    places: np.ndarray | None = None
    truncated: bool = False

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(ids) for ids, _ in self.sequences)


def packed(features: Sequence[Feature]) -> dict[str, Any]:
    """The model's arguments for features of one sequence each, packed."""
    sequences = [sequence for feature in features for sequence in feature.sequences]
    lengths = np.array([len(ids) for ids, _ in sequences])
    cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    ids, types = (np.concatenate(column).astype(np.int64) for column in zip(*sequences, strict=True))
    return {
        "input_ids": torch.from_numpy(ids),
        "token_type_ids": torch.from_numpy(types),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "max_seqlen": int(lengths.max()),
    }


def padded(features: Sequence[Feature]) -> dict[str, Any]:
    """The model's arguments as (B, C, S) with a mask, for the multiple-choice model, which packs them itself."""
    sequences = [sequence for feature in features for sequence in feature.sequences]
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = []
    for column in zip(*sequences, strict=True):
        table = torch.zeros(mask.shape, dtype=torch.int64)
        table[mask] = torch.from_numpy(np.concatenate(column).astype(np.int64))
        columns.append(table)
    shape = (len(features), -1, mask.shape[1])
    ids, types = (table.view(shape) for table in columns)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long().view(shape)}


def per_feature(logits: Tensor, features: Sequence[Feature]) -> list[np.ndarray]:
    """Splits the logits (T, K) of a packed batch into one array per feature."""
    return [part.numpy() for part in on_host(logits).split([feature.length for feature in features])]


def on_host(logits: Tensor) -> Tensor:
    return logits.detach().float().cpu()


def plan_epoch(
    lengths: Sequence[int], *, seed: int, epoch: int, order: str, batch_size: int | None, tokens: int | None
) -> list[list[int]]:
    """The batches of an epoch, lists of indices into `lengths`: a function of the arguments alone.

    Args:
        order: "random"; or "length", which batches features of similar length and shuffles the batches.
        batch_size: most features in a batch; None for any number.
        tokens: most tokens in a batch, unless a single feature has more; None for any number.
    """
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    indices = random.permutation(len(lengths))
    if order == "length":
        mean = max(1.0, float(np.mean(lengths)))
        in_batch = len(lengths) if tokens is None else max(1, int(tokens / mean))
        window = _SORTED_TOGETHER * min(in_batch, batch_size or in_batch)
        chunks = [indices[start : start + window] for start in range(0, len(indices), window)]
        indices = np.concatenate([chunk[np.argsort(-np.asarray(lengths)[chunk], kind="stable")] for chunk in chunks])
    batches: list[list[int]] = []
    left = 0.0
    for index in indices.tolist():
        if not batches or len(batches[-1]) == batch_size or lengths[index] > left:
            batches.append([])
            left = np.inf if tokens is None else tokens
        batches[-1].append(index)
        left -= lengths[index]
    return [batches[i] for i in random.permutation(len(batches))] if order == "length" else batches
