"""From texts that belong together to tensors, and from vectors or logits to ranks and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.model.outputs import ModelOutput
from fastbert.tasks.vector_search import search
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.finetune import metrics
from fastbert.training.finetune.examples import DataError
from fastbert.training.finetune.features import Feature, on_host, packed, sequences_of
from fastbert.training.finetune.pair_examples import RankExample, VectorExample
from fastbert.training.finetune.ranking import RANK_LOSSES
from fastbert.training.finetune.settings import FinetuneSettings

Predictions = list[dict[str, Any]]
TOP = 10  # ranks that scores look at


# Vectors


def encode_vectors(
    examples: Sequence[VectorExample], tokenizer: Tokenizer, labels: list[str], settings: FinetuneSettings
) -> list[Feature]:
    """A sequence for each text, the anchor's after the query prompt; the label is what the loss reads.

    That of pairs is a number for each text, the same for equal texts; that of a class is its number.
    """
    _check_scores(examples, settings)
    prompts = settings.query_prompt or "", settings.document_prompt or ""
    counted = [not text or settings.include_prompt for text in prompts]
    skips = [0 if c else len(tokenizer([text]).encodings[0]) - 1 for c, text in zip(counted, prompts, strict=True)]
    apart = examples[0].kind not in ("classes", "scored")  # whether the first text is a query
    texts = [
        (prompts[apart and place > 0] + text, None) for example in examples for place, text in enumerate(example.texts)
    ]
    sequences = sequences_of(texts, tokenizer, settings.max_length)
    numbers: dict[str, int] = {}
    features = []
    for i, example in enumerate(examples):
        own = [next(sequences) for _ in example.texts]
        label: Any = example.label
        if example.kind == "pairs":
            label = tuple(numbers.setdefault(text, len(numbers)) for text in example.texts)
        elif example.kind == "classes":
            label = numbers.setdefault(str(example.label), len(numbers))
        skip = tuple(skips[apart and place > 0] for place in range(len(own)))
        truncated = any(cut for _, cut in own)
        features.append(Feature(i, tuple(sequence for sequence, _ in own), label, truncated=truncated, skip=skip))
    return features


def _check_scores(examples: Sequence[VectorExample], settings: FinetuneSettings) -> None:
    if settings.loss == "cosine":
        for example in examples:
            if not isinstance(example.label, float) or abs(example.label) > 1:
                raise DataError(f"{example.where}: the score is {example.label}; loss 'cosine' takes -1 to 1")


def collate_vectors(features: Sequence[Feature]) -> dict[str, Any]:
    arguments = packed(features)
    skip = [skip for feature in features for skip in feature.skip]
    return arguments | ({"skip": torch.tensor(skip)} if any(skip) else {})


def labels_of(features: Sequence[Feature]) -> Tensor:
    """The labels of a loss over vectors, with a row for each example: int64 or float32."""
    return torch.tensor([feature.label for feature in features])


def split_vectors(vectors: Tensor, features: Sequence[Feature]) -> list[np.ndarray]:
    """The vectors of each example's texts, (C, E) each."""
    return [part.numpy() for part in on_host(vectors).split([len(feature.sequences) for feature in features])]


def split_sparse(vectors: Tensor, features: Sequence[Feature]) -> list[Any]:
    """As `split_vectors`, as scipy's sparse rows."""
    from scipy.sparse import csr_array

    return [csr_array(part) for part in split_vectors(vectors, features)]


def decode_vectors(
    examples: Sequence[VectorExample], features: Any, vectors: Sequence[Any], labels: Any, settings: FinetuneSettings
) -> Predictions:
    """Of scored pairs, the similarity; of others, what an anchor finds among all texts of the examples but anchors."""
    if examples[0].kind == "scored":
        return [{"gold": e.label, "predicted": s} for e, s in zip(examples, _similarities(vectors, 0, 1), strict=True)]
    if examples[0].kind == "classes":
        return _nearest_of_class(examples, vectors)
    corpus: dict[str, tuple[int, int]] = {}  # each text, and the example and place of its vector
    relevant: dict[str, set[str]] = {}  # the positives of each anchor
    for i, example in enumerate(examples):
        for place, text in enumerate(example.texts[1:], start=1):
            corpus.setdefault(text, (i, place))
        relevant.setdefault(example.texts[0], set()).add(example.texts[1])
    texts = list(corpus)
    found = _ranked([row[:1] for row in vectors], [vectors[i][place : place + 1] for i, place in corpus.values()], TOP)
    matching = _similarities(vectors, 0, 1)
    if len(examples[0].texts) > 2:
        other = _similarities(vectors, 0, 2)
    else:  # the positive of the next example stands for any text
        other = _paired([row[:1] for row in vectors], [row[1:2] for row in [*vectors[1:], vectors[0]]])
    predictions = []
    for example, row, own, apart in zip(examples, found, matching, other, strict=True):
        wanted = relevant[example.texts[0]]
        grades = [float(texts[i] in wanted) for i in row]
        rank = _first_rank(grades)
        predictions.append(
            {"rank": rank, "found": texts[row[0]] if row else "", "grades": grades, "relevant": len(wanted)}
            | {"similarity": own, "other": apart}
        )
    return predictions


def _nearest_of_class(examples: Sequence[VectorExample], vectors: Sequence[Any]) -> Predictions:
    """For each text, which of the other ones that are closest have its class."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[str(example.label)] = counts.get(str(example.label), 0) + 1
    found = _ranked(vectors, vectors, TOP + 1)
    predictions = []
    for i, (example, row) in enumerate(zip(examples, found, strict=True)):
        grades = [float(examples[j].label == example.label) for j in row if j != i][:TOP]
        rank = _first_rank(grades)
        predictions.append(
            {"gold": example.label, "rank": rank, "grades": grades, "relevant": counts[str(example.label)] - 1}
        )
    return predictions


def _first_rank(grades: Sequence[float]) -> int:
    """The rank, from 1, of the first that is relevant; 0 if none is."""
    return next((rank for rank, grade in enumerate(grades, start=1) if grade > 0), 0)


def _is_sparse(vectors: Sequence[Any]) -> bool:
    return not isinstance(vectors[0], np.ndarray)


def _ranked(queries: Sequence[Any], corpus: Sequence[Any], top: int) -> list[list[int]]:
    """The places of the closest rows, best first: by cosine, or of sparse rows by inner product."""
    if not _is_sparse(queries):
        found = search(np.concatenate(queries), np.concatenate(corpus), top)
        return [[hit["corpus_id"] for hit in hits] for hits in found]
    from scipy.sparse import vstack

    from fastbert.tasks.sparse import search_sparse

    found = search_sparse(vstack(queries), vstack(corpus), top)
    return [[hit["corpus_id"] for hit in hits] for hits in found]


def _similarities(vectors: Sequence[Any], first: int, second: int) -> list[float]:
    return _paired([row[first : first + 1] for row in vectors], [row[second : second + 1] for row in vectors])


def _paired(a: Sequence[Any], b: Sequence[Any]) -> list[float]:
    """The cosine of each pair of rows; of sparse rows, the inner product."""
    if _is_sparse(a):
        from scipy.sparse import vstack

        return (vstack(a) * vstack(b)).sum(axis=1).tolist()
    x, y = np.concatenate(a), np.concatenate(b)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return ((x * y).sum(axis=1) / np.maximum(lengths, 1e-12)).tolist()


def score_vectors(predictions: Predictions, labels: list[str]) -> dict[str, float]:
    """Correlations of scored pairs, else the scores of `metrics.ranking`."""
    if "predicted" in predictions[0]:
        gold, predicted = ([p[side] for p in predictions] for side in ("gold", "predicted"))
        found = metrics.regression(gold, predicted)
        return {name: found[name] for name in ("spearman", "pearson")}
    return metrics.ranking([p["grades"] for p in predictions], [[1.0] * p["relevant"] for p in predictions])


# Rerankers


def encode_ranked(
    examples: Sequence[RankExample], tokenizer: Tokenizer, labels: list[str], settings: FinetuneSettings
) -> list[Feature]:
    """A sequence for each document, [CLS] query [SEP] document [SEP]; the label is their grades."""
    kind = RANK_LOSSES[settings.loss or "binary"]
    for example in examples:
        if kind.by_query and len(example.documents) < 2:
            raise DataError(f"{example.where}: the query has one document; loss {settings.loss!r} compares several")
        for grade in example.grades:
            if not kind.least <= grade <= kind.most:
                raise DataError(
                    f"{example.where}: the label is {grade:g}; loss {settings.loss!r} takes {kind.least:g} to "
                    f"{kind.most:g}"
                )
    pairs = [(example.query, document) for example in examples for document in example.documents]
    sequences = sequences_of(pairs, tokenizer, settings.max_length)
    features = []
    for i, example in enumerate(examples):
        own = [next(sequences) for _ in example.documents]
        weight = 1.0 if kind.by_query else float(len(own))
        truncated = any(cut for _, cut in own)
        sequences_only = tuple(sequence for sequence, _ in own)
        features.append(Feature(i, sequences_only, example.grades, weight=weight, truncated=truncated))
    return features


def collate_ranked(features: Sequence[Feature]) -> dict[str, Any]:
    grades = torch.tensor([grade for feature in features for grade in feature.label], dtype=torch.float32)
    return packed(features) | {"grades": grades, "sizes": torch.tensor([len(f.sequences) for f in features])}


def ranked_loss(output: ModelOutput, arguments: dict[str, Any], settings: FinetuneSettings) -> Tensor:
    loss = RANK_LOSSES[settings.loss or "binary"].loss
    return loss(output.logits.float().squeeze(1), arguments["grades"], arguments["sizes"])


def split_ranked(output: ModelOutput, features: Sequence[Feature]) -> list[np.ndarray]:
    """The logit of each example's documents, (D,) each."""
    logits = on_host(output.logits).squeeze(1)
    return [part.numpy() for part in logits.split([len(feature.sequences) for feature in features])]


def decode_ranked(
    examples: Sequence[RankExample], features: Any, logits: Sequence[np.ndarray], labels: Any, settings: Any
) -> Predictions:
    """The grades of a query's documents in the order of their logits.

    Whole numbers from 0 are grades. Others are a teacher's scores, of which the highest of a query has grade 1.
    """
    graded = all(grade >= 0 and grade == int(grade) for example in examples for grade in example.grades)
    predictions = []
    for example, row in zip(examples, logits, strict=True):
        order = np.argsort(-row, kind="stable")
        best = max(example.grades)
        grades = [example.grades[i] if graded else float(example.grades[i] == best) for i in order]
        rank = _first_rank(grades)
        predictions.append(
            {"rank": rank, "found": example.documents[order[0]], "grades": grades, "scores": row.tolist()}
        )
    return predictions


def score_ranked(predictions: Predictions, labels: list[str]) -> dict[str, float]:
    return metrics.ranking([p["grades"] for p in predictions], [p["grades"] for p in predictions])
