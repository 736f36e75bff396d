"""mine: hard negatives, texts that are close to a query and do not answer it, as sentence-transformers mines them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.inference.base_embedder import BaseEmbedder
from fastbert.inference.pooling import unit
from fastbert.inference.sentence_settings import prompt_named
from fastbert.tasks.text_classification import apply
from fastbert.tasks.vector_search import search

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
STRATEGIES = ("top", "random")


@dataclass(frozen=True)
class Mining:
    """Which of the texts that are close to a query are its negatives; see sentence-transformers' mine_hard_negatives.

    Args:
        num_negatives: for each query, at most.
        range_min: so many of the closest are left out.
        range_max: so many of the closest are looked at (default: as many as needed, or ten times as many where a score
            can rule some out).
        max_score: of a negative: its cosine, or a reranker's score, after the activation.
        min_score: the same.
        absolute_margin: by which a negative scores at least less than the query's positive; of several, the one that
            scores least.
        relative_margin: the same as a share of the positive's score.
        sampling_strategy: "top", or "random" of those that are left.
        seed: of what is drawn.
        index: "exact" or "faiss", see `search`.

    Raises:
        ValueError: a number out of range, or names that are not known.
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling_strategy: str = "top"
    seed: int = 0
    index: str = "exact"

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; it must be at least 1")
        if self.range_min < 0:
            raise ValueError(f"range_min is {self.range_min}; it must be at least 0")
        if self.range_max is not None and self.range_max < self.range_min + self.num_negatives:
            raise ValueError(
                f"range_max is {self.range_max}; it must be at least range_min + num_negatives, "
                f"{self.range_min + self.num_negatives}"
            )
        if self.sampling_strategy not in STRATEGIES:
            raise ValueError(f"sampling_strategy is {self.sampling_strategy!r}; it must be 'top' or 'random'")

    @property
    def rules_out(self) -> bool:
        """True if a score can rule a candidate out."""
        limits = (self.max_score, self.min_score, self.absolute_margin, self.relative_margin)
        return any(limit is not None for limit in limits)

    def candidates(self, positives: int) -> int:
        """The number of texts to look at, for queries of at most so many positives."""
        least = self.num_negatives * (10 if self.rules_out else 1) + positives
        return self.range_min + least if self.range_max is None else self.range_max


@dataclass(frozen=True)
class Mined:
    """A query's positives and negatives, the best first, each with its score: the cosine, or a reranker's logit."""

    query: str
    positives: list[tuple[str, float]]
    negatives: list[tuple[str, float]]


def mine(
    pairs: Sequence[tuple[str, str]],
    corpus: Sequence[str],
    embedder: BaseEmbedder,
    mining: Mining | None = None,
    *,
    reranker: Any = None,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
) -> list[Mined]:
    """Hard negatives for each query, in the order in which queries first occur.

    Args:
        pairs: queries and texts that answer them; a query may occur several times.
        corpus: texts to choose from, to which all positives are added. A query's own positives are never its negatives.
        embedder: its cosines determine the candidates.
        mining: which of them are taken.
        reranker: pipeline("rerank", ...), whose scores replace the cosines of candidates and positives.
        query_prompt: before each query (default: the embedder's prompt "query", or its own).
        corpus_prompt: before each text of the corpus (default: its prompt "document", or its own).

    Raises:
        ValueError: there are no pairs.
    """
    mining = mining or Mining()
    if not pairs:
        raise ValueError("pairs is empty; it must hold at least one query and its positive")
    positives: dict[str, list[str]] = {}
    for query, positive in pairs:
        own = positives.setdefault(query, [])
        if positive not in own:
            own.append(positive)
    texts = list(dict.fromkeys([*corpus, *(positive for _, positive in pairs)]))
    places = {text: i for i, text in enumerate(texts)}
    queries = list(positives)
    vectors = unit(embedder.embed(texts, prompt=_prompt(embedder, corpus_prompt, "document", "passage")))
    asked = unit(embedder.embed(queries, prompt=_prompt(embedder, query_prompt, "query")))
    most = max(map(len, positives.values()))
    wanted = mining.candidates(most)
    found = search(asked, vectors, wanted + most, index=mining.index)
    random = np.random.default_rng(mining.seed)
    mined = []
    for number, (query, hits) in enumerate(zip(queries, found, strict=True)):
        own = positives[query]
        ids = np.array([hit["corpus_id"] for hit in hits if texts[hit["corpus_id"]] not in own], dtype=np.int64)
        if reranker is None:
            scores = vectors[ids] @ asked[number]
            own_scores = vectors[[places[text] for text in own]] @ asked[number]
            kept = _kept(scores, float(own_scores.min()), mining)
        else:
            asking = [(query, text) for text in [*own, *(texts[i] for i in ids)]]
            both = np.array(reranker(asking, function_to_apply="none"), dtype=np.float64)
            own_scores, scores = both[: len(own)], both[len(own) :]
            shown = apply(reranker.activation, both)
            kept = _kept(shown[len(own) :], float(shown[: len(own)].min()), mining)
        order = kept[np.argsort(-scores[kept], kind="stable")][mining.range_min : wanted]
        if mining.sampling_strategy == "random" and len(order) > mining.num_negatives:
            order = order[np.sort(random.choice(len(order), mining.num_negatives, replace=False))]
        negatives = [(texts[ids[i]], float(scores[i])) for i in order[: mining.num_negatives]]
        mined.append(Mined(query, list(zip(own, own_scores.tolist(), strict=True)), negatives))
    return mined


def _prompt(embedder: BaseEmbedder, given: str | None, *names: str) -> str:
    return prompt_named(embedder.prompts, embedder.prompt, *names) if given is None else given


def _kept(scores: np.ndarray, positive: float, mining: Mining) -> np.ndarray:
    """The places of candidates that no limit rules out."""
    limits = [np.inf if mining.max_score is None else mining.max_score]
    if mining.absolute_margin is not None:
        limits.append(positive - mining.absolute_margin)
    if mining.relative_margin is not None:
        limits.append(positive - abs(positive) * mining.relative_margin)
    least = -np.inf if mining.min_score is None else mining.min_score
    return np.flatnonzero((scores <= min(limits)) & (scores >= least))


def rows_of_mined(mined: Sequence[Mined], format: str = "triplet", *, scores: bool = False) -> Iterator[dict[str, Any]]:
    """Rows to train on, as sentence-transformers' output_format names them.

    Args:
        format: "triplet", a row for each negative; "n-tuple", with negative_1 and so on, of queries that have as many
            as the one with most; "labeled-pair", query, document and label; "labeled-list", the same in lists.
        scores: adds them: "scores", or in place of labels.

    Raises:
        ValueError: another format.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    most = max((len(one.negatives) for one in mined), default=0)
    for one in mined:
        if format == "labeled-pair":
            for texts, label in ((one.positives, 1.0), (one.negatives, 0.0)):
                for text, score in texts:
                    yield {"query": one.query, "document": text, "label": score if scores else label}
            continue
        for positive, score in one.positives:
            first = {"anchor": one.query, "positive": positive}
            if format == "triplet":
                for negative, other in one.negatives:
                    yield {**first, "negative": negative} | ({"scores": [score, other]} if scores else {})
            elif format == "n-tuple" and most and len(one.negatives) == most:
                numbered = {f"negative_{i}": text for i, (text, _) in enumerate(one.negatives, start=1)}
                every = [score, *(other for _, other in one.negatives)]
                yield first | numbered | ({"scores": every} if scores else {})
            elif format == "labeled-list" and one.negatives:
                documents = [positive, *(text for text, _ in one.negatives)]
                labels = [score, *(other for _, other in one.negatives)]
                zeros = [1.0] + [0.0] * len(one.negatives)
                yield {"query": one.query, "document": documents, "label": labels if scores else zeros}
