"""Extractive question answering: overlapping windows of contexts, and the best span over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbert.inference.windows import shortened, windows_of
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.finetune.examples import QuestionExample
from fastbert.training.finetune.features import TOKENIZED_TOGETHER, Feature
from fastbert.training.finetune.settings import FinetuneSettings

_REPORTED = 3  # spans of the n best in a prediction


def encode(
    examples: Sequence[QuestionExample], tokenizer: Tokenizer, labels: list[str], settings: FinetuneSettings
) -> list[Feature]:
    """Windows [CLS] question [SEP] context [SEP]; the label is the first answer's first and last token.

    A window without the whole answer is labelled (0, 0), at [CLS], like that of a question without answers.

    Raises:
        ValueError: a window is too short for a question and a stride.
    """
    assert settings.max_length is not None, "Recipe.read fills it in"
    room = settings.max_length - settings.max_question - tokenizer.num_special_tokens_to_add(pair=True)
    if settings.stride >= room:
        raise ValueError(
            f"stride is {settings.stride}; max_length {settings.max_length} leaves {room} tokens of context next to a "
            f"question of {settings.max_question} (max_question), and a window must begin with new ones"
        )
    features = []
    for start in range(0, len(examples), TOKENIZED_TOGETHER):
        chunk = examples[start : start + TOKENIZED_TOGETHER]
        pairs = [(shortened(e.question, tokenizer, settings.max_question), e.context) for e in chunk]
        for window in windows_of(tokenizer, pairs, settings.max_length, overlap=settings.stride, longer="only_second"):
            encoding = window.encoding
            of_context = np.array([part == 1 for part in encoding.sequence_ids])
            places = np.where(of_context[:, None], np.array(encoding.offsets), -1).astype(np.int32)
            sequence = (np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int8))
            label = answer_tokens(chunk[window.item], places)
            features.append(Feature(start + window.item, (sequence,), label, places=places))
    return features


def answer_tokens(example: QuestionExample, places: np.ndarray) -> tuple[int, int]:
    """First and last token of the first answer in a window; (0, 0) if the window does not hold all of it."""
    context = np.flatnonzero(places[:, 0] >= 0)
    if not example.answers or not len(context):
        return 0, 0
    begin = example.answers[0].start
    end = begin + len(example.answers[0].text)
    inside = context[(places[context, 0] < end) & (places[context, 1] > begin)]
    whole = len(inside) and places[inside[0], 0] <= begin and places[inside[-1], 1] >= end
    return (int(inside[0]), int(inside[-1])) if whole else (0, 0)


def decode(
    examples: Sequence[QuestionExample],
    features: Sequence[Feature],
    logits: Sequence[np.ndarray],  # of each feature (T, 2): start, end
    labels: list[str],
    settings: FinetuneSettings,
) -> list[dict[str, Any]]:
    """For each question the best span of all its windows, as the context's own text.

    With `no_answer`, the answer is "" if the lowest score of [CLS] over the windows exceeds that of the span by more
    than `null_threshold`.
    """
    spans: list[list[tuple[float, int, int]]] = [[] for _ in examples]
    null = np.full(len(examples), np.inf)
    for feature, window in zip(features, logits, strict=True):
        assert feature.places is not None, "`encode` sets them"
        spans[feature.example] += window_spans(window, feature.places, settings.n_best, settings.max_answer)
        null[feature.example] = min(null[feature.example], float(window[0].sum()))
    predictions = []
    for example, found, nothing in zip(examples, spans, null, strict=True):
        best = sorted(set(found), key=lambda span: (-span[0], span[1:]))[: settings.n_best]
        n_best = [{"answer": example.context[b:e], "start": b, "score": score} for score, b, e in best[:_REPORTED]]
        prediction: dict[str, Any] = {"id": example.id, "answer": "", "answers": [a.text for a in example.answers]}
        if best and not (settings.no_answer and nothing - best[0][0] > settings.null_threshold):
            prediction |= {"answer": n_best[0]["answer"], "start": n_best[0]["start"]}
        predictions.append(prediction | {"n_best": n_best, "no_answer_score": float(nothing)})
    return predictions


def window_spans(logits: np.ndarray, places: np.ndarray, n_best: int, max_answer: int) -> list[tuple[float, int, int]]:
    """(score, from, to), in characters, of the valid spans made of the `n_best` starts and ends."""
    context = np.flatnonzero(places[:, 0] >= 0)
    starts, ends = (context[np.argsort(-logits[context, i], kind="stable")[:n_best]] for i in (0, 1))
    return [
        (float(logits[first, 0] + logits[last, 1]), int(places[first, 0]), int(places[last, 1]))
        for first in starts
        for last in ends
        if first <= last < first + max_answer
    ]
