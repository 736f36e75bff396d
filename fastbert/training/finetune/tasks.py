"""The tasks, as data: for each its model, its files, and its functions to make tensors, predictions and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.inference.windows import Window, central_tokens, windows_of
from fastbert.model.auto import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from fastbert.model.outputs import ModelOutput
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.finetune import answers, metrics, pair_examples, pair_features
from fastbert.training.finetune import examples as files
from fastbert.training.finetune.examples import (
    ChoiceExample,
    DataError,
    Reading,
    Source,
    TextExample,
    WordsExample,
)
from fastbert.training.finetune.features import (
    IGNORE,
    TOKENIZED_TOGETHER,
    Feature,
    arrays_of,
    on_host,
    packed,
    padded,
    per_feature,
    sequences_of,
)
from fastbert.training.finetune.ranking import RANK_LOSSES
from fastbert.training.finetune.settings import SPARSE_OPTIONS, VECTOR_OPTIONS, FinetuneSettings
from fastbert.training.vectors.losses import LOSSES
from fastbert.training.vectors.model import SparseEncoder, TextEncoder

TEXTS = ("text", "pair", "label")  # columns
Predictions = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One kind of fine-tuning."""

    model: Any  # has from_pretrained
    problem_type: str | None  # config.problem_type, which selects the head's loss
    scores: tuple[str, ...]  # names of the scores; the first selects the best checkpoint
    read: Callable[[Source, Reading], list]
    labels: Callable[[list], list[str]]  # the label set of training examples, in the order of its ids; may be empty
    encode: Callable[[Sequence, Tokenizer, list[str], FinetuneSettings], list[Feature]]
    collate: Callable[[Sequence[Feature]], dict[str, Any]]  # the model's arguments, including labels
    logits: Callable[[Any, Sequence[Feature]], list[Any]]  # what the model says of each feature
    decode: Callable[[Sequence, Sequence[Feature], Sequence[np.ndarray], list[str], FinetuneSettings], Predictions]
    score: Callable[[Predictions, list[str]], dict[str, float]]
    # For the report: precision, recall and F1 of each class or entity type.
    details: Callable[[Predictions, list[str]], dict[str, dict[str, float]]] = lambda predictions, labels: {}
    splits_words: bool = False  # whether texts come as words
    weighable: bool = False  # whether its classes can be given weights
    two_class_scores: tuple[str, ...] = ()  # scores that exist for two labels only
    max_length: int | None = None  # default; None for as many as the model takes
    options: tuple[str, ...] = TEXTS  # task-specific fields of FinetuneSettings and Reading
    outputs: int = 2  # of a head whose outputs are no labels
    losses: tuple[str, ...] = ()  # names of those that it can be trained by, if it has a choice
    loss: Callable[[ModelOutput, dict[str, Any], FinetuneSettings], Tensor] | None = None  # None: the head's own


# Texts: one class, several, or a number.


def _encode_texts(
    examples: Sequence[TextExample],
    tokenizer: Tokenizer,
    labels: list[str],
    settings: FinetuneSettings,
    *,
    target: Callable[[TextExample, dict[str, int]], Any],
) -> list[Feature]:
    ids = {label: i for i, label in enumerate(labels)}
    targets = [target(example, ids) for example in examples]  # first: errors show before the slow part
    texts = [(example.text, example.pair) for example in examples]
    sequences = sequences_of(texts, tokenizer, settings.max_length)
    return [
        Feature(i, (sequence,), wanted, truncated=truncated)
        for i, ((sequence, truncated), wanted) in enumerate(zip(sequences, targets, strict=True))
    ]


def _label_id(where: str, label: str, ids: dict[str, int]) -> int:
    if label not in ids:
        shown = ", ".join(map(repr, list(ids)[:20])) + (", ..." if len(ids) > 20 else "")
        raise DataError(f"{where}: label {label!r} is none of the training data's {len(ids)}: {shown}")
    return ids[label]


def _in_order(labels: set[str]) -> list[str]:
    """Sorted labels: by value if all are numbers, else by name."""
    numbers = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=int) if numbers else sorted(labels)


def _class_names(examples: Sequence[TextExample]) -> list[str]:
    labels = _in_order({example.label for example in examples})
    if len(labels) < 2:
        raise DataError(f"{examples[0].where}: all labels are {labels[0]!r}; classification needs two or more")
    return labels


def _multi_label_names(examples: Sequence[TextExample]) -> list[str]:
    labels = _in_order({label for example in examples for label in example.label})
    if not labels:
        raise DataError(f"{examples[0].where}: no example has a label")
    return labels


def _class_target(example: TextExample, ids: dict[str, int]) -> int:
    return _label_id(example.where, example.label, ids)


def _multi_label_target(example: TextExample, ids: dict[str, int]) -> list[float]:
    wanted = {_label_id(example.where, label, ids) for label in example.label}
    return [float(i in wanted) for i in range(len(ids))]


def _collate_texts(features: Sequence[Feature], dtype: torch.dtype) -> dict[str, Any]:
    return packed(features) | {"labels": torch.tensor([feature.label for feature in features], dtype=dtype)}


def _logits(output: ModelOutput, features: Sequence[Feature]) -> list[np.ndarray]:
    return list(on_host(output.logits).numpy())


def _decode_classes(examples: Any, features: Any, logits: Any, labels: list[str], settings: Any) -> Predictions:
    predictions = []
    for example, row in zip(examples, logits, strict=True):
        exponents = np.exp(row - row.max())
        probabilities = exponents / exponents.sum()
        best = int(row.argmax())
        predictions.append(
            {
                "gold": example.label,
                "predicted": labels[best],
                "probability": float(probabilities[best]),
                "probabilities": dict(zip(labels, probabilities.tolist(), strict=True)),
            }
        )
    return predictions


def _decode_multi_label(examples: Any, features: Any, logits: Any, labels: list[str], settings: Any) -> Predictions:
    """Every label whose probability is above a half."""
    return [
        {
            "gold": example.label,
            "predicted": [label for label, logit in zip(labels, row, strict=True) if logit > 0],
            "probabilities": {label: float(p) for label, p in zip(labels, 1 / (1 + np.exp(-row)), strict=True)},
        }
        for example, row in zip(examples, logits, strict=True)
    ]


def _decode_scores(examples: Any, features: Any, logits: Any, labels: list[str], settings: Any) -> Predictions:
    return [{"gold": e.label, "predicted": float(row.item())} for e, row in zip(examples, logits, strict=True)]


def _sides(predictions: Predictions) -> tuple[list, list]:
    """True and predicted labels."""
    return [p["gold"] for p in predictions], [p["predicted"] for p in predictions]


def _score_classes(predictions: Predictions, labels: list[str]) -> dict[str, float]:
    gold, predicted = _sides(predictions)
    scores = metrics.classification(gold, predicted)
    if len(labels) == 2:  # the second one is the positive class, as in scikit-learn
        probabilities = np.array([p["probabilities"][labels[1]] for p in predictions])
        truth, guess = (np.array([x == labels[1] for x in side]) for side in (gold, predicted))
        scores |= metrics.binary(truth, guess, probabilities)
    return scores


def _label_tables(predictions: Predictions, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    gold, predicted = (np.array([[int(x in found) for x in labels] for found in side]) for side in _sides(predictions))
    return gold, predicted


# Words: a tag for each.


def _encode_words(
    examples: Sequence[WordsExample], tokenizer: Tokenizer, labels: list[str], settings: FinetuneSettings
) -> list[Feature]:
    """Labels the first token of each word with its tag; other tokens and special tokens have no label.

    A text that is too long has several windows. Each word has its label in the one where it is most central.
    """
    ids = {label: i for i, label in enumerate(labels)}
    targets = [[_label_id(example.where, tag, ids) for tag in example.tags] for example in examples]
    longest = tokenizer.model_max_length if settings.max_length is None else settings.max_length
    overlap = (longest - tokenizer.num_special_tokens_to_add()) // 4
    features: list[Feature] = []
    for start in range(0, len(examples), TOKENIZED_TOGETHER):
        words = [example.words for example in examples[start : start + TOKENIZED_TOGETHER]]
        windows = windows_of(tokenizer, words, longest, overlap=min(settings.stride, overlap), words=True)
        for item, group in groupby(windows, key=lambda window: window.item):
            of_text = list(group)
            for window, places in zip(of_text, _first_tokens(of_text), strict=True):
                i = start + item
                tags = [IGNORE if word < 0 else targets[i][word] for word in places]
                weight = float((places >= 0).sum())
                features.append(Feature(i, (arrays_of(window.encoding),), tags, weight=weight, places=places))
    return features


def _first_tokens(windows: Sequence[Window]) -> list[np.ndarray]:
    """For each token of a text's windows the index of its word, if it is the word's first and most central here; else
    -1."""
    words = [window.encoding.word_ids for window in windows]
    kept = [np.full(len(window), -1, dtype=np.int32) for window in windows]
    before = None
    for number, place in central_tokens(windows):
        if (word := words[number][place]) != before:
            kept[number][place] = before = word
    return kept


def _tag_names(examples: Sequence[WordsExample]) -> list[str]:
    tags = {tag for example in examples for tag in example.tags} | {"O"}
    if len(tags) < 2:
        raise DataError(f"{examples[0].where}: all tags are 'O'; there must be entities")
    return sorted(tags, key=lambda tag: (tag != "O", tag[2:], tag))


def _collate_words(features: Sequence[Feature]) -> dict[str, Any]:
    return packed(features) | {"labels": torch.tensor([tag for feature in features for tag in feature.label])}


def _token_logits(output: ModelOutput, features: Sequence[Feature]) -> list[np.ndarray]:
    return per_feature(output.logits, features)


def _decode_words(examples: Any, features: Any, logits: Any, labels: list[str], settings: Any) -> Predictions:
    """Tags of words; a word that has no token gets 'O'."""
    predictions = [{"words": e.words, "gold": e.tags, "predicted": ["O"] * len(e.words)} for e in examples]
    for feature, rows in zip(features, logits, strict=True):
        for word, best in zip(feature.places, rows.argmax(axis=1), strict=True):
            if word >= 0:
                predictions[feature.example]["predicted"][word] = labels[best]
    return predictions


# Questions: spans of the context that answer them.


def _no_labels(examples: Sequence) -> list[str]:
    return []


def _collate_questions(features: Sequence[Feature]) -> dict[str, Any]:
    starts, ends = (torch.tensor(column) for column in zip(*(feature.label for feature in features), strict=True))
    return packed(features) | {"start_positions": starts, "end_positions": ends}


def _span_logits(output: ModelOutput, features: Sequence[Feature]) -> list[np.ndarray]:
    return per_feature(torch.stack([output.start_logits, output.end_logits], dim=-1), features)


# Choices: the one of several texts that fits a text.


def _encode_choices(
    examples: Sequence[ChoiceExample], tokenizer: Tokenizer, labels: list[str], settings: FinetuneSettings
) -> list[Feature]:
    pairs = [(example.text, choice) for example in examples for choice in example.choices]
    sequences = sequences_of(pairs, tokenizer, settings.max_length)
    features = []
    for i, example in enumerate(examples):
        own = [next(sequences) for _ in example.choices]
        truncated = any(cut for _, cut in own)
        features.append(Feature(i, tuple(sequence for sequence, _ in own), example.label, truncated=truncated))
    return features


def _collate_choices(features: Sequence[Feature]) -> dict[str, Any]:
    return padded(features) | {"labels": torch.tensor([feature.label for feature in features])}


def _decode_choices(examples: Any, features: Any, logits: Any, labels: list[str], settings: Any) -> Predictions:
    return [
        {"gold": example.label, "predicted": int(row.argmax()), "scores": row.tolist()}
        for example, row in zip(examples, logits, strict=True)
    ]


def class_counts(features: Sequence[Feature], classes: int) -> np.ndarray:
    """The number of examples, or of words, with each class as their label."""
    labels = np.concatenate([np.atleast_1d(feature.label) for feature in features])
    return np.bincount(labels[labels != IGNORE], minlength=classes)


def single_label(predictions: Predictions) -> str | None:
    """The label, if only one is predicted although there are several true ones; else None, also without labels."""
    gold, predicted = (
        [label for p in predictions for label in _labels_in(p.get(side))] for side in ("gold", "predicted")
    )
    return predicted[0] if len(set(predicted)) == 1 and len(set(gold)) > 1 else None


def _labels_in(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [label for label in values if isinstance(label, str)]


def loss_of(
    task: Task,
    output: ModelOutput,
    arguments: dict[str, Any],
    class_weights: Tensor | None,
    settings: FinetuneSettings,
) -> Tensor:
    """The task's loss, or else the head's own; with class weights, the weighted mean of the cross entropies."""
    if task.loss is not None:
        return task.loss(output, arguments, settings)
    if class_weights is None:
        return output.loss
    logits, labels = output.logits, arguments["labels"]
    return torch.nn.functional.cross_entropy(logits.float(), labels, class_weights, ignore_index=IGNORE)


_VECTORS = Task(
    model=TextEncoder,
    problem_type=None,
    scores=("ndcg_at_10", "mrr_at_10", "recall_at_10", "spearman", "pearson"),
    read=pair_examples.read_vectors,
    labels=_no_labels,
    encode=pair_features.encode_vectors,
    collate=pair_features.collate_vectors,
    logits=pair_features.split_vectors,
    decode=pair_features.decode_vectors,
    score=pair_features.score_vectors,
    options=(*TEXTS, "anchor", "positive", "negatives", *VECTOR_OPTIONS),
    losses=tuple(LOSSES),
)

TASKS: dict[str, Task] = {
    "classification": Task(
        model=AutoModelForSequenceClassification,
        problem_type="single_label_classification",
        scores=("f1_macro", "accuracy", "f1_micro", "matthews"),  # accuracy is high where a rare class is never found
        two_class_scores=("f1_binary", "auc"),
        read=files.read_texts,
        labels=_class_names,
        encode=partial(_encode_texts, target=_class_target),
        collate=partial(_collate_texts, dtype=torch.int64),
        logits=_logits,
        decode=_decode_classes,
        score=_score_classes,
        details=lambda predictions, labels: metrics.per_class(*_sides(predictions), labels),
        weighable=True,
    ),
    "multi-label": Task(
        model=AutoModelForSequenceClassification,
        problem_type="multi_label_classification",
        scores=("f1_micro", "f1_macro", "accuracy"),
        read=files.read_label_lists,
        labels=_multi_label_names,
        encode=partial(_encode_texts, target=_multi_label_target),
        collate=partial(_collate_texts, dtype=torch.float32),
        logits=_logits,
        decode=_decode_multi_label,
        score=lambda predictions, labels: metrics.multi_label(*_label_tables(predictions, labels)),
        details=lambda predictions, labels: metrics.per_class(*_label_tables(predictions, labels), labels),
        options=(*TEXTS, "label_separator"),
    ),
    "regression": Task(
        model=AutoModelForSequenceClassification,
        problem_type="regression",
        scores=("spearman", "pearson", "mse", "mae"),
        read=files.read_scores,
        labels=_no_labels,
        encode=partial(_encode_texts, target=lambda example, ids: example.label),
        collate=partial(_collate_texts, dtype=torch.float32),
        logits=_logits,
        decode=_decode_scores,
        score=lambda predictions, labels: metrics.regression(*_sides(predictions)),
    ),
    "token-classification": Task(
        model=AutoModelForTokenClassification,
        problem_type=None,
        scores=("f1", "precision", "recall", "accuracy"),
        read=files.read_words,
        labels=_tag_names,
        encode=_encode_words,
        collate=_collate_words,
        logits=_token_logits,
        decode=_decode_words,
        score=lambda predictions, labels: metrics.entities(*_sides(predictions)),
        details=lambda predictions, labels: metrics.per_entity_type(*_sides(predictions)),
        splits_words=True,
        weighable=True,
        options=("words", "tags", "stride"),
    ),
    "question-answering": Task(
        model=AutoModelForQuestionAnswering,
        problem_type=None,
        scores=("f1", "exact_match"),
        read=files.read_questions,
        labels=_no_labels,
        encode=answers.encode,
        collate=_collate_questions,
        logits=_span_logits,
        decode=answers.decode,
        score=lambda predictions, labels: metrics.squad(
            [p["answers"] for p in predictions], [p["answer"] for p in predictions]
        ),
        max_length=384,
        options=(
            *("question", "context", "answers"),
            *("stride", "max_question", "n_best", "max_answer", "no_answer", "null_threshold"),
        ),
    ),
    "multiple-choice": Task(
        model=AutoModelForMultipleChoice,
        problem_type=None,
        scores=("accuracy",),
        read=files.read_choices,
        labels=_no_labels,
        encode=_encode_choices,
        collate=_collate_choices,
        logits=_logits,
        decode=_decode_choices,
        score=lambda predictions, labels: {"accuracy": float(np.mean(np.equal(*_sides(predictions))))},
        options=("text", "label", "choices"),
    ),
    "embedding": _VECTORS,
    "sparse-embedding": replace(
        _VECTORS,
        model=SparseEncoder,
        logits=pair_features.split_sparse,
        losses=tuple(name for name, kind in LOSSES.items() if kind.compares or "scores" in kind.learns_from),
        options=(*_VECTORS.options, *SPARSE_OPTIONS),
    ),
    "rerank": Task(
        model=AutoModelForSequenceClassification,
        problem_type=None,
        scores=("ndcg_at_10", "mrr_at_10"),
        read=pair_examples.read_ranked,
        labels=_no_labels,
        encode=pair_features.encode_ranked,
        collate=pair_features.collate_ranked,
        logits=pair_features.split_ranked,
        decode=pair_features.decode_ranked,
        score=pair_features.score_ranked,
        options=("query", "document", "anchor", "positive", "negatives", "label", "loss"),
        outputs=1,
        losses=tuple(RANK_LOSSES),
        loss=pair_features.ranked_loss,
    ),
}
