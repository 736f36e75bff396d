"""Predictions for rows: what a task's answer to a row adds to its columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastbert.inference.job import run_records
from fastbert.inference.output import FileOutput, OutputError, Progress, StreamOutput
from fastbert.inference.records import Record
from fastbert.inference.windows import Window, count_tokens
from fastbert.tasks.base import Pipeline
from fastbert.tasks.rows import TaskRows

# The tasks that finetune trains, by the pipelines that answer them.
PREDICTED = ("text-classification", "token-classification", "question-answering", "multiple-choice")
HALF = 0.5


@dataclass(frozen=True)
class Predicting:
    """The part of the answers that is written.

    Args:
        top_k: how many classes or answers, best first, in the column PREFIX_top; None for no such column.
        threshold: the least probability of a label that is predicted: of several labels 0.5 by default; of one class,
            a row whose best is below has none.
        prefix: how the names of the new columns begin.
    """

    top_k: int | None = None
    threshold: float | None = None
    prefix: str = "prediction"


def columns(pipeline: Pipeline, answer: Any, windows: list[Window], wanted: Predicting) -> dict[str, Any]:
    """The new columns of a row, by their names without the prefix; "" is the prediction itself."""
    made: dict[str, Any] = _COLUMNS[pipeline.task](pipeline, answer, wanted)
    cut = {"truncated": any(window.cut for window in windows)} if pipeline.defaults.get("truncation") else {}
    return made | {"windows": len(windows), "tokens": count_tokens(windows), **cut}


def _classes(pipeline: Pipeline, answer: list[dict[str, Any]], wanted: Predicting) -> dict[str, Any]:
    config = pipeline.runner.config
    found = [{"label": each["label"], "score": each["score"]} for each in answer]
    if config.problem_type == "regression" or config.num_labels == 1:
        return {"": found[0]["score"]}
    return _chosen(found, wanted, several=config.problem_type == "multi_label_classification")


def _entities(pipeline: Pipeline, answer: list[dict[str, Any]], wanted: Predicting) -> dict[str, Any]:
    least = wanted.threshold or 0.0
    names = ("entity_group", "score", "word", "start", "end")
    return {"": [{name: each[name] for name in names} for each in answer if each["score"] >= least]}


def _answers(pipeline: Pipeline, answer: Any, wanted: Predicting) -> dict[str, Any]:
    ranked = answer if isinstance(answer, list) else [answer]
    top = {} if wanted.top_k is None else {"top": ranked[: wanted.top_k]}
    best: dict[str, Any] = ranked[0] if ranked else {"answer": "", "score": 0.0, "start": 0, "end": 0}
    sure = wanted.threshold is None or best["score"] >= wanted.threshold
    place = {name: best[name] for name in ("score", "start", "end")}
    return {"": best["answer"] if sure else None, **place, **top}


def _choice(pipeline: Pipeline, answer: dict[str, Any], wanted: Predicting) -> dict[str, Any]:
    sure = wanted.threshold is None or answer["score"] >= wanted.threshold
    return {"": answer["label"] if sure else None, "score": answer["score"], "scores": answer["scores"]}


def _labels(pipeline: Pipeline, answer: dict[str, Any], wanted: Predicting) -> dict[str, Any]:
    found = [{"label": n, "score": s} for n, s in zip(answer["labels"], answer["scores"], strict=True)]
    return _chosen(found, wanted, several=pipeline.settings().multi_label)


def _chosen(found: list[dict[str, Any]], wanted: Predicting, *, several: bool) -> dict[str, Any]:
    """The best class; or, if several may be right, those that are likely enough."""
    top = {} if wanted.top_k is None else {"top": found[: wanted.top_k]}
    if several:
        least = HALF if wanted.threshold is None else wanted.threshold
        likely = [each for each in found if each["score"] >= least]
        return {"": [each["label"] for each in likely], "scores": [each["score"] for each in likely], **top}
    sure = wanted.threshold is None or found[0]["score"] >= wanted.threshold
    return {"": found[0]["label"] if sure else None, "score": found[0]["score"], **top}


_COLUMNS: dict[str, Callable[[Any, Any, Predicting], dict[str, Any]]] = {
    "text-classification": _classes,
    "token-classification": _entities,
    "question-answering": _answers,
    "multiple-choice": _choice,
    "zero-shot-classification": _labels,
}


def settings_of(pipeline: Pipeline, wanted: Predicting) -> dict[str, Any]:
    """The arguments of the pipeline's call."""
    if pipeline.task == "text-classification":
        return {"top_k": None}
    if pipeline.task == "token-classification":
        return {"aggregation_strategy": "first"}
    return {"top_k": wanted.top_k or 1} if pipeline.task == "question-answering" else {}


class Prepared(NamedTuple):
    """Inputs of one call: their places among all, themselves, their windows, and the call's settings."""

    places: list[int]
    inputs: list[Any]
    windows: list[Window]
    settings: Any


def prepared_inputs(pipeline: Pipeline, inputs: list[Any], wanted: Predicting) -> list[Prepared]:
    """The windows of inputs; texts and lists of words apart."""
    given, made = settings_of(pipeline, wanted), []
    by_words = [i for i, each in enumerate(inputs) if isinstance(each, list)]
    texts = [i for i, each in enumerate(inputs) if not isinstance(each, list)]
    for places, more in ((texts, {}), (by_words, {"is_split_into_words": True})):
        if places:
            settings = pipeline.settings(**given, **more)
            checked = [pipeline.check(inputs[i], i) for i in places]
            made.append(Prepared(places, checked, pipeline.prepare(checked, settings), settings))
    return made


def answered(pipeline: Pipeline, parts: Iterable[Prepared], wanted: Predicting) -> Iterator[tuple[int, dict[str, Any]]]:
    """The place of each input, and its new columns."""
    for part in parts:
        answers = pipeline.answers(part.inputs, part.windows, pipeline.run(part.windows), part.settings)
        for place, (answer, own) in zip(part.places, answers, strict=True):
            yield place, columns(pipeline, answer, own, wanted)


def predict_records(
    pipeline: Pipeline,
    records: TaskRows,
    output: FileOutput | StreamOutput,
    wanted: Predicting,
    *,
    advance: Callable[[int], None] = lambda tokens: None,
    **options: Any,
) -> Progress:
    """Predicts for all rows: see run_records, which takes the `options`.

    Args:
        advance: called with the number of tokens of each window of rows.

    Raises:
        OutputError: a column of the input has a new one's name; a score that is not finite.
    """

    def prepare(block: list[Record]) -> tuple[list[Record], list[Prepared]]:
        good = [record for record in block if record.problem is None]
        return good, prepared_inputs(pipeline, [record.input for record in good], wanted)

    def process(
        block: list[Record], prepared: tuple[list[Record], list[Prepared]]
    ) -> tuple[list[dict[str, Any] | None], dict[str, int]]:
        good, parts = prepared
        made = {id(good[place]): row for place, row in answered(pipeline, parts, wanted)}
        tokens = sum(row["tokens"] for row in made.values())
        advance(tokens)
        rows = [None if r.problem is not None else _joined(records, r, made[id(r)], wanted.prefix) for r in block]
        cut = sum(row["windows"] > 1 or row.get("truncated", False) for row in made.values())
        return rows, {"tokens": tokens, "cut": cut}

    return run_records(records, output, prepare, process, **options)


def _joined(records: TaskRows, record: Record, made: dict[str, Any], prefix: str) -> dict[str, Any]:
    new = {f"{prefix}_{name}".rstrip("_"): value for name, value in made.items()}
    values = record.values or {}
    where: dict[str, Any] = {"file": records.inputs[record.file]} if len(records.inputs) > 1 else {}
    where["line"] = record.line
    if twice := new.keys() & values.keys():
        raise OutputError(f"{records.where(record)}: the input has a column {min(twice)!r}, too; give another --prefix")
    where = {name: value for name, value in where.items() if name not in values}  # the input's own column stays
    for value in new.values():
        if isinstance(value, float) and not math.isfinite(value):
            raise OutputError(f"{records.where(record)}: a score is not finite; try another dtype")
    return where | values | new
