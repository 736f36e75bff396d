"""Examples as model inputs, and batches of them, packed without pad tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.tokenizer.tokenizer import Tokenizer

IGNORE = -100
TOKENIZED_TOGETHER = 256
Sequences = tuple[np.ndarray, np.ndarray]  # ids and types
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
    skip: tuple[int, ...] = ()  # tokens at the start of each sequence that a pooling leaves out

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(ids) for ids, _ in self.sequences)


def sequences_of(
    texts: Sequence[tuple[str, str | None]], tokenizer: Tokenizer, max_length: int | None
) -> Iterator[tuple[Sequences, bool]]:
    """Ids and types of each text or pair, and whether it was cut. Either all are pairs or none is."""
    for start in range(0, len(texts), TOKENIZED_TOGETHER):
        firsts, seconds = map(list, zip(*texts[start : start + TOKENIZED_TOGETHER], strict=True))
        pairs = None if seconds[0] is None else seconds
        for encoding in tokenizer(firsts, pairs, truncation=True, max_length=max_length).encodings:
            yield arrays_of(encoding), bool(encoding.overflowing)


def arrays_of(encoding: Any) -> Sequences:
    return np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int8)


def packed(features: Sequence[Feature]) -> dict[str, Any]:
    """The model's arguments for all sequences of features, packed."""
    return packed_sequences([sequence for feature in features for sequence in feature.sequences])


def packed_sequences(sequences: Sequence[Sequences]) -> dict[str, Any]:
    """The model's arguments for sequences, packed."""
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
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    order: str,
    batch_size: int | None,
    tokens: int | None,
    classes: Sequence[int] | None = None,
) -> list[list[int]]:
    """The batches of an epoch, lists of indices into `lengths`: a function of the arguments alone.

    Args:
        order: "random"; or "length", which batches features of similar length and shuffles the batches.
        batch_size: most features in a batch; None for any number.
        tokens: most tokens in a batch, unless a single feature has more; None for any number.
        classes: of each feature; two of one class stand together, so that each finds its like in a batch.
    """
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    indices = random.permutation(len(lengths))
    if classes is not None:
        indices = _in_twos(indices, classes, random)
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


def _in_twos(indices: np.ndarray, classes: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """The indices in another order, two of one class next to each other."""
    open_ones: dict[int, int] = {}
    groups: list[list[int]] = []
    for index in indices.tolist():
        other = open_ones.pop(classes[index], None)
        if other is None:
            open_ones[classes[index]] = index
        else:
            groups.append([other, index])
    groups += [[index] for index in open_ones.values()]
    return np.array([index for place in random.permutation(len(groups)) for index in groups[place]])
