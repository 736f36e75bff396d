"""Poolings of packed token states: from the states of each text, (T, E), to one vector, (B, n * E).

The names and their meaning are those of sentence-transformers' Pooling module; "pooler" is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

POOLER = "pooler"
TOKEN_POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
POOLINGS = (*TOKEN_POOLINGS, POOLER)


def pooling_modes(pooling: str | Sequence[str]) -> tuple[str, ...]:
    """The poolings to concatenate, from one name or a list or tuple of names.

    Raises:
        ValueError: there is no name, or one that is not in POOLINGS.
    """
    modes = (pooling,) if isinstance(pooling, str) else pooling
    if not isinstance(modes, list | tuple) or not modes or not all(mode in POOLINGS for mode in modes):
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}, or a list of them")
    return tuple(modes)


def pool(
    states: np.ndarray,
    lengths: np.ndarray,
    modes: Sequence[str],
    *,
    skip: int = 0,
    pooler_output: np.ndarray | None = None,
) -> np.ndarray:
    """Pools the states of each text and concatenates the modes: (T, E) float32 -> (B, n * E).

    Args:
        states: the token states of all texts, one text after the other.
        lengths: number of tokens of each text, (B,) int64.
        modes: names in POOLINGS.
        skip: number of tokens left out at the start of each text ([CLS] and the prompt). The positions that weight
            "weightedmean" still count from the start of the text. If no token is left, the vector is 0; that of
            "cls" is the first state.
        pooler_output: (B, E), for the mode "pooler", which ignores `skip`.
    """
    ends = lengths.cumsum()
    starts = ends - lengths
    texts = _Texts(states, starts, np.minimum(starts + skip, ends), ends)
    vectors = [pooler_output if mode == POOLER else _POOL[mode](texts) for mode in modes]
    found = [vector for vector in vectors if vector is not None]
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


class _Texts(NamedTuple):
    """The states of all texts, and where each text starts, what is pooled of it starts, and it ends, (B,)."""

    states: np.ndarray
    starts: np.ndarray
    pooled: np.ndarray
    ends: np.ndarray

    def counts(self) -> np.ndarray:
        """The number of pooled tokens of each text, at least 1, (B, 1)."""
        return np.maximum(self.ends - self.pooled, 1).astype(self.states.dtype)[:, None]


def _reduce(function: np.ufunc, texts: _Texts, x: np.ndarray) -> np.ndarray:
    """Reduces the pooled rows of each text, row after row: (T, E) -> (B, E); zeros for a text without any.

    The order does not depend on the rest of the batch. A call for each text is several times as fast as reduceat.
    """
    y = np.zeros((len(texts.ends), x.shape[1]), x.dtype)
    for row, start, end in zip(y, texts.pooled.tolist(), texts.ends.tolist(), strict=True):
        if end > start:
            function.reduce(x[start:end], axis=0, out=row)
    return y


def _rows(texts: _Texts, index: np.ndarray, exists: np.ndarray) -> np.ndarray:
    """Row `index` of all states, (B,) -> (B, E); zeros where it does not exist."""
    y = np.zeros((len(index), texts.states.shape[1]), texts.states.dtype)
    y[exists] = texts.states[index[exists]]
    return y


def _cls(texts: _Texts) -> np.ndarray:
    first = np.where(texts.pooled < texts.ends, texts.pooled, texts.starts)
    return _rows(texts, first, texts.starts < texts.ends)


def _lasttoken(texts: _Texts) -> np.ndarray:
    return _rows(texts, texts.ends - 1, texts.pooled < texts.ends)


def _weightedmean(texts: _Texts) -> np.ndarray:
    lengths = texts.ends - texts.starts
    positions = np.arange(1, len(texts.states) + 1) - np.repeat(texts.starts, lengths)
    weights = positions.astype(texts.states.dtype)[:, None]
    return _reduce(np.add, texts, texts.states * weights) / np.maximum(_reduce(np.add, texts, weights), 1e-9)


_POOL: dict[str, Callable[[_Texts], np.ndarray]] = {
    "cls": _cls,
    "lasttoken": _lasttoken,
    "max": lambda texts: _reduce(np.maximum, texts, texts.states),
    "mean": lambda texts: _reduce(np.add, texts, texts.states) / texts.counts(),
    "mean_sqrt_len_tokens": lambda texts: _reduce(np.add, texts, texts.states) / np.sqrt(texts.counts()),
    "weightedmean": _weightedmean,
}


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1, as torch.nn.functional.normalize."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
