"""Examples as the model sees them, and batches of them: packed, without a pad token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
_SORTED_TOGETHER = 50  # batches' worth of features that are sorted by length, where the order is by length


@dataclass(frozen=True)
class Feature:
    """An example, or a window of one, in token ids.

    `places` says where tokens come from, as decoding needs it: of words (T,) the number of the word that a token is
    the first of, else -1; of an answer's context (T, 2) the characters from and to, else -1.
    """

    example: int
    sequences: tuple[tuple[np.ndarray, np.ndarray], ...]  # ids and types of each; several where there is a choice
    label: Any
    weight: float = 1.0  # decisions that the loss is a mean over
    places: np.ndarray | None = None
    truncated: bool = False

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(ids) for ids, _ in self.sequences)


def packed(features: Sequence[Feature]) -> dict[str, Any]:
    """The model's arguments for one sequence of each feature, as one row without pads."""
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
    """The same as (B, C, S) with a mask: the multiple-choice model scores rows of choices, and packs them itself."""
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
    """Logits of a packed batch's tokens (T, K), as an array for each feature."""
    return [part.numpy() for part in on_host(logits).split([feature.length for feature in features])]


def on_host(logits: Tensor) -> Tensor:
    return logits.detach().float().cpu()


def plan_epoch(
    lengths: Sequence[int], *, seed: int, epoch: int, order: str, batch_size: int | None, tokens: int | None
) -> list[list[int]]:
    """The batches of an epoch, lists of indices into `lengths`: a function of the arguments alone.

    Args:
        order: "random"; or "length", where features of like length go together and batches come in random order.
        batch_size: features in a batch, at most; None for any number.
        tokens: in a batch, at most, unless a single feature has more; None for any number.
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
