"""similarity and search: how close vectors are, and the closest of many, exactly, in blocks of a mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.inference.base_embedder import BaseEmbedder
from fastbert.inference.output import OutputError

BLOCK = 1 << 16  # vectors of the corpus that are compared at a time
QUERIES = 256  # that are compared at a time
SCORES = ("cos_sim", "dot_score", "euclidean", "manhattan")
# sentence-transformers' names, of its similarity functions and of its utilities.
_OTHER_NAMES = {
    "cosine": "cos_sim",
    "dot": "dot_score",
    "pytorch_cos_sim": "cos_sim",
    "euclidean_sim": "euclidean",
    "manhattan_sim": "manhattan",
}
Vectors = np.ndarray | str | Path


class Similarity:
    """Texts to their similarities, as sentence-transformers' `similarity`, by an Embedder."""

    task = "similarity"

    def __init__(self, embedder: BaseEmbedder, *, score_function: str = "cos_sim") -> None:
        self.embedder, self.score_function = embedder, _known(score_function)

    def __call__(
        self, first: Sequence[str], second: Sequence[str] | None = None, *, score_function: str | None = None
    ) -> np.ndarray:
        """(N, M) float32: of each text of `first` with each of `second`, or of `first`.

        The vector of a text with more tokens than the model takes is the mean of its windows'.

        Raises:
            TypeError: a str in place of a list.
        """
        for name, given in (("first", first), ("second", second)):
            if isinstance(given, str):
                raise TypeError(f"{name} is a str; it must be a list of texts")
        texts = list(first)
        vectors = self.embedder.embed([*texts, *(second if second is not None else ())], long="mean")
        a, b = vectors[: len(texts)], vectors[len(texts) :] if second is not None else vectors
        return similarity(a, b, score_function or self.score_function)


def similarity(a: np.ndarray, b: np.ndarray, score_function: str = "cos_sim") -> np.ndarray:
    """(N, E), (M, E) to (N, M) float32: cosines, dot products, or distances with their sign turned.

    Raises:
        ValueError: another function, or vectors of another length.
    """
    kind = _known(score_function)
    a, b = (np.ascontiguousarray(x, dtype=np.float32) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"the vectors have shapes {a.shape} and {b.shape}; they must be (N, E) and (M, E)")
    if kind == "cos_sim":
        a, b = _unit(a), _unit(b)
    if kind in ("cos_sim", "dot_score"):
        return a @ b.T
    if kind == "manhattan":
        return -np.stack([np.abs(row - b).sum(axis=1) for row in a]) if len(a) else np.empty((0, len(b)), np.float32)
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
    return -np.sqrt(np.maximum(squares, 0))


def search(
    queries: Vectors,
    corpus: Vectors,
    top_k: int = 10,
    *,
    score_function: str = "cos_sim",
    block: int = BLOCK,
    index: str = "exact",
) -> list[list[dict[str, Any]]]:
    """The `top_k` vectors of the corpus that are closest to each query: lists of {corpus_id, score}, best first.

    Args:
        queries: an array (N, E), or the path of an .npy file.
        corpus: an array (M, E), or the path of an .npy file, which is mapped, not read: it may be larger than memory.
            Rows of NaN, as `fastbert embed --bad-lines skip` writes them, are never found.
        score_function: "cos_sim", "dot_score", "euclidean" or "manhattan", or sentence-transformers' function or name
            of these; see `similarity`.
        block: vectors of the corpus that are compared at a time.
        index: "exact"; or "faiss", FAISS's flat index, for "cos_sim" and "dot_score".

    Equal scores are in the order of the corpus.

    Raises:
        ValueError: another function or index, vectors of another length, top_k or block below 1.
        FileNotFoundError: there is no such file.
    """
    kind = _known(score_function)
    for name, value in (("top_k", top_k), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    wanted, held = vectors_of("queries", queries), vectors_of("corpus", corpus)
    if wanted.shape[1] != held.shape[1]:
        raise ValueError(f"queries have {wanted.shape[1]} numbers, the corpus {held.shape[1]}; they must be as many")
    if index == "faiss":
        scores, ids = _by_faiss(wanted, held, top_k, kind, block)
    elif index == "exact":
        scores, ids = _exact(wanted, held, top_k, kind, block)
    else:
        raise ValueError(f"index is {index!r}; it must be 'exact' or 'faiss'")
    return [
        [{"corpus_id": int(i), "score": float(s)} for i, s in zip(row, values, strict=True) if i >= 0]
        for row, values in zip(ids, scores, strict=True)
    ]


def _exact(a: np.ndarray, corpus: np.ndarray, top_k: int, kind: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids, (N, top_k), best first; ids are -1 where there are fewer. The corpus is read once."""
    parts = [a[i : i + QUERIES] for i in range(0, max(len(a), 1), QUERIES)]
    found = [(np.full((len(part), 0), -np.inf, np.float32), np.empty((len(part), 0), np.int64)) for part in parts]
    for start, rows in _blocks(corpus, block):
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        numbers = np.arange(start, start + len(rows))
        found = [
            _better(*so_far, similarity(part, rows, kind), numbers, top_k)
            for part, so_far in zip(parts, found, strict=True)
        ]
    best, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(-best, axis=1, kind="stable")
    best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    return best, np.where(np.isneginf(best), -1, ids)


def _better(
    best: np.ndarray, ids: np.ndarray, scores: np.ndarray, numbers: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `top_k` best, in the order of the corpus, of those so far and of the next vectors."""
    scores[np.isnan(scores)] = -np.inf
    both = np.concatenate([best, scores], axis=1)
    known = np.concatenate([ids, np.broadcast_to(numbers, scores.shape)], axis=1)
    if both.shape[1] > top_k:  # ties at the edge: the first of the corpus stay
        edge = -np.partition(-both, top_k - 1, axis=1)[:, top_k - 1 : top_k]
        rank = np.where(both > edge, 2, (both == edge).astype(np.int8))
        kept = np.sort(np.argsort(-rank, axis=1, kind="stable")[:, :top_k], axis=1)
        both, known = np.take_along_axis(both, kept, 1), np.take_along_axis(known, kept, 1)
    return both, known


def _by_faiss(a: np.ndarray, corpus: np.ndarray, top_k: int, kind: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "index 'faiss' needs faiss: pip install 'fastbert-engine[search]'", name="faiss"
        ) from None
    if kind not in ("cos_sim", "dot_score"):
        raise ValueError(f"score_function is {kind!r}; index 'faiss' knows cos_sim and dot_score")
    flat = faiss.IndexFlatIP(corpus.shape[1])
    prepare = _unit if kind == "cos_sim" else np.ascontiguousarray
    for _, rows in _blocks(corpus, block):
        flat.add(prepare(np.asarray(rows, np.float32)))
    return flat.search(prepare(np.asarray(a, np.float32)), min(top_k, len(corpus)))


def _blocks(corpus: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(corpus), size):
        yield start, corpus[start : start + size]


def vectors_of(name: str, given: Vectors) -> np.ndarray:
    """Vectors (N, E); those of an .npy file are mapped."""
    if isinstance(given, str | Path):
        try:
            found = np.load(given, mmap_mode="r")
        except ValueError as error:
            raise OutputError(f"{given} is no .npy file of vectors: {error}") from None
    else:
        found = np.asarray(given)
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise ValueError(f"{name} has shape {found.shape} and dtype {found.dtype}; it must be (N, E) of numbers")
    return found


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays."""
    lengths = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return np.ascontiguousarray(x / np.maximum(lengths, 1e-12))


def _known(score_function: Any) -> str:
    name = getattr(score_function, "__name__", score_function)  # of a function of sentence-transformers
    name = _OTHER_NAMES.get(name, name)
    if name not in SCORES:
        raise ValueError(f"score_function is {score_function!r}; it must be one of {', '.join(SCORES)}")
    return str(name)
