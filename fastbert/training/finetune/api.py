"""finetune: training for a task from Python, from files or data in memory; with folds, and a small grid of settings."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastbert.diagnostics import devices
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.finetune.examples import DataError, Reading, Source, Table
from fastbert.training.finetune.result import Result
from fastbert.training.finetune.settings import VECTOR_TASKS, FinetuneSettings
from fastbert.training.finetune.tasks import TASKS, Predictions
from fastbert.training.finetune.trials import Start, mean_and_spread, plan, run, run_all
from fastbert.training.vectors.model import SparseEncoder, TextEncoder

# What stands in a tuple, by the number of its items; of embedders, texts that belong together, or two and a score.
_TUPLES = {2: ("text", "label"), 3: ("text", "pair", "label")}


@dataclass(frozen=True)
class Finetuned:
    """The result of `finetune`.

    Attributes:
        model: with the weights of the best checkpoint, in eval mode; of an embedder a TextEncoder or SparseEncoder,
            whose `embedder` or `model` is in it.
        tokenizer: the model's.
        scores: of the test examples, or else the dev examples, by name; with folds, the mean over them.
        spread: with folds, the standard deviation of each score over them.
        metrics: all of the report, as in metrics.json.
        predictions: for each of these examples.
        tried: with `tries`, for each of them its settings and its dev scores.
    """

    model: Any
    tokenizer: Tokenizer
    scores: dict[str, float]
    metrics: dict[str, Any]
    predictions: Predictions
    spread: dict[str, float] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    def pipeline(self, **settings: Any) -> Any:
        """The pipeline of the model's task, or of an embedder Similarity; see `fastbert.pipeline`."""
        from fastbert.tasks import pipeline
        from fastbert.tasks.vector_search import Similarity

        if isinstance(self.model, TextEncoder):
            return Similarity(self.model.embedder, **settings)
        task, model = (None, self.model)
        if isinstance(model, SparseEncoder):
            task, model = "sparse-embedding", model.model
        elif self.metrics["settings"]["task"] == "rerank":
            task = "rerank"
        return pipeline(task, model, tokenizer=self.tokenizer, **settings)

    def predict(self, texts: Any, **settings: Any) -> Any:
        """The answers of the task's pipeline to texts; of an embedder their vectors."""
        if isinstance(self.model, TextEncoder):
            return self.model.embed(texts, **settings)
        return self.pipeline()(texts, **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model and tokenizer into a folder, as transformers reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def finetune(
    model: str | Path,
    train: Any,
    dev: Any = None,
    *,
    task: str,
    test: Any = None,
    output: str | Path | None = None,
    dev_share: float | None = None,
    folds: int | None = None,
    tries: Mapping[str, Sequence[Any]] | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    revision: str | None = None,
    **settings: Any,
) -> Finetuned:
    """Trains a model for a task.

    Args:
        model: the folder or hub id of any encoder.
        train: a file, as `fastbert finetune` reads it; a list of dicts, or of tuples (text, label) or (text, pair,
            label), for an embedder (anchor, positive, negative ...), for a reranker (query, document, label); a
            pandas.DataFrame; or a datasets.Dataset.
        dev: the same: examples by which the best checkpoint is chosen.
        test: the same: examples for the scores.
        task: "classification", "multi-label", "regression", "token-classification", "question-answering",
            "multiple-choice", "embedding", "sparse-embedding" or "rerank".
        output: a new folder for the model and its report; None: they are only returned.
        dev_share: share of the training examples by which the best checkpoint is chosen, where there is no dev
            (default: 0.1).
        folds: so many models are trained, each tested on its part of the examples; returned are the one with the best
            dev score, and the mean and spread of the test scores.
        tries: values of settings, {"lr": [2e-5, 5e-5], "seed": [1, 2]}: each combination is trained, and the one with
            the best dev score is returned.
        resume: whether a run in `output` that was stopped continues; of several runs, also those that are left.
        device: default: a GPU where there is one, else the CPU.
        settings: those of FinetuneSettings (epochs, lr, batch_size ...), and the names of columns (text, label ...).

    Raises:
        DataError: data that are no examples of the task; the message names the file and line, or the row.
        TypeError: there is no such setting.
        ValueError: a setting that is out of range or does not fit; an output folder with a model in it.
    """
    of_run, of_files = ({f.name for f in fields(kind)} for kind in (FinetuneSettings, Reading))
    if unknown := sorted((settings.keys() - of_run - of_files) | ((tries or {}).keys() - of_run)):
        raise TypeError(f"finetune takes no {unknown[0]}; it takes {', '.join(sorted(of_run | of_files))}")
    wanted = FinetuneSettings(task=task, **{name: v for name, v in settings.items() if name in of_run})
    reading = Reading(**{name: v for name, v in settings.items() if name in of_files})
    given = {"train": train, "dev": dev, "test": test}
    sources = {name: _source(name, data, task) for name, data in given.items() if data is not None}
    if reading.pair is None and any(map(_has_pairs, given.values())):
        reading = replace(reading, pair="pair")
    start = Start(str(model), reading, torch.device(device or devices()[-1]), revision)
    trials = plan(sources, wanted, reading, dev_share=dev_share, folds=folds, tries=tries)
    with tempfile.TemporaryDirectory(prefix="fastbert-finetune-") as scratch:
        folder = Path(scratch) / "run" if output is None else Path(output)
        if folds is None and not tries:
            return _finetuned(folder, run(start, trials[0], folder, resume=resume), start.device)
        best, results = run_all(start, trials, folder, resume=resume)
        if folds is not None:
            scores, spread = mean_and_spread(results)
            return _finetuned(folder, results[best], start.device, scores=scores, spread=spread)
        tried = [{**t.chosen, **r.metrics["dev"]} for t, r in zip(trials, results, strict=True)]
        return _finetuned(folder, results[best], start.device, tried=tried)


def _finetuned(folder: Path, result: Result, device: torch.device, **more: Any) -> Finetuned:
    model = TASKS[result.metrics["settings"]["task"]].model.from_pretrained(folder).to(device).eval()
    last = list(result.evaluations.values())[-1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Finetuned(
        model, tokenizer, **{"scores": last.scores, "metrics": result.metrics, **more}, predictions=last.predictions
    )


def _source(name: str, given: Any, task: str) -> Source:
    """A file, or rows in memory as dicts."""
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        return path
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # pandas
        return Table(name, given.to_dict("records"))
    if hasattr(given, "to_list") and hasattr(given, "column_names"):  # datasets
        return Table(name, _with_names(given.to_list(), given.features))
    if isinstance(given, Sequence):
        return Table(name, [_as_row(name, i, example, task) for i, example in enumerate(given)])
    raise TypeError(f"{name} is a {type(given).__name__}; it must be a file, a list, a DataFrame or a Dataset")


def _with_names(rows: list[dict[str, Any]], features: Any) -> list[dict[str, Any]]:
    """Rows of a datasets.Dataset, whose classes are numbers, with their names."""
    for column, feature in (features or {}).items():
        of = getattr(feature, "int2str", None) or getattr(getattr(feature, "feature", None), "int2str", None)
        if of is not None:  # ClassLabel has no name for -1, a missing one
            name = lambda value, of=of: value if value is None or value < 0 else of(value)  # noqa: E731
            for row in rows:
                value = row[column]
                row[column] = list(map(name, value)) if isinstance(value, list) else name(value)
    return rows


def _has_pairs(given: Any) -> bool:
    """True if data are tuples of a text, another and a label."""
    return isinstance(given, list | tuple) and any(isinstance(e, tuple | list) and len(e) == 3 for e in given[:1])


def _as_row(name: str, i: int, example: Any, task: str) -> dict[str, Any]:
    if isinstance(example, Mapping):
        return dict(example)
    columns = _columns(task, example) if isinstance(example, tuple | list) else None
    if columns is None:
        told = "(text, label) or (text, pair, label)"
        if task in VECTOR_TASKS:
            told = "(anchor, positive), (anchor, positive, negative ...), (text, pair, score) or (text, class)"
        if task == "rerank":
            told = "(query, document, label), of which the last two may be lists"
        raise DataError(f"{name}[{i}] is {example!r:.60}; it must be a dict, or a tuple {told}")
    return columns


def _columns(task: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """The items of a tuple by their columns; None where they are too many or too few."""
    names = _TUPLES.get(len(values))
    if task == "rerank":
        names = ("query", "document", "label") if len(values) == 3 else None
    if task in VECTOR_TASKS and len(values) > 1 and all(isinstance(value, str) for value in values):
        anchor, positive, *negatives = values
        return {"anchor": anchor, "positive": positive, "negative": negatives}
    return None if names is None else dict(zip(names, values, strict=True))
