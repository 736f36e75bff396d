"""finetune: training for a task from Python, from files or data in memory; with folds, and a small grid of settings."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.diagnostics import devices
from fastbert.model import BertPreTrainedModel
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.finetune.examples import DataError, Reading, Source, Table
from fastbert.training.finetune.loop import Finetuning, Recipe, better, read_examples, task_of
from fastbert.training.finetune.result import save_and_report
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.tasks import Predictions

_TEXT, _PAIR = ("text", "label"), ("text", "pair", "label")  # what stands in a tuple
DEV_SHARE = 0.1  # of the examples, where none are given to choose the best checkpoint by


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` returns.

    Attributes:
        model: with the weights of the best checkpoint, in eval mode.
        tokenizer: the model's.
        scores: of the test examples, or else the dev examples, by name; with folds, the mean over them.
        spread: with folds, the standard deviation of each score over them.
        metrics: all of the report, as in metrics.json.
        predictions: for each of these examples.
        tried: with `tries`, for each of them its settings and its dev score.
    """

    model: BertPreTrainedModel
    tokenizer: Tokenizer
    scores: dict[str, float]
    metrics: dict[str, Any]
    predictions: Predictions
    spread: dict[str, float] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    def pipeline(self, **settings: Any) -> Any:
        """The pipeline of the model's task; see `fastbert.pipeline`."""
        from fastbert.tasks import pipeline

        return pipeline(None, self.model, tokenizer=self.tokenizer, **settings)

    def predict(self, texts: Any, **settings: Any) -> Any:
        """The answers of the task's pipeline to texts."""
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
    device: torch.device | str | None = None,
    revision: str | None = None,
    **settings: Any,
) -> Finetuned:
    """Trains a model for a task.

    Args:
        model: the folder or hub id of any encoder.
        train: a file, as `fastbert finetune` reads it; a list of dicts, or of tuples (text, label) or (text, pair,
            label); a pandas.DataFrame; or a datasets.Dataset.
        dev: the same: examples by which the best checkpoint is chosen.
        test: the same: examples for the scores.
        task: "classification", "multi-label", "regression", "token-classification", "question-answering" or
            "multiple-choice".
        output: a new folder for the model and its report; None: they are only returned.
        dev_share: share of the training examples by which the best checkpoint is chosen, where there is no dev
            (default: 0.1).
        folds: so many models are trained, each tested on its part of the examples; returned are the last one, and the
            mean and spread of the scores.
        tries: values of settings, {"lr": [2e-5, 5e-5], "seed": [1, 2]}: each combination is trained, and the one with
            the best dev score is returned.
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
    sources = {name: _source(name, data) for name, data in given.items() if data is not None}
    if isinstance(train, list) and train and isinstance(train[0], tuple) and len(train[0]) == len(_PAIR):
        reading = replace(reading, pair="pair")
    runs = _Runs(str(model), wanted, reading, torch.device(device or devices()[-1]), revision)
    if folds is not None:
        if dev is not None or tries is not None:
            raise ValueError(
                "folds is given; neither dev nor tries goes with it, as each fold has its own dev examples"
            )
        return runs.folds(sources, folds, output, dev_share or DEV_SHARE)
    if "dev" not in sources:
        sources |= runs.split(sources["train"], dev_share or DEV_SHARE, wanted.seed)
    elif dev_share is not None:
        raise ValueError(f"dev_share is {dev_share}, but dev is given")
    return runs.best(sources, tries or {}, output)


@dataclass(frozen=True)
class _Runs:
    """Runs from one model with one kind of data."""

    model: str
    settings: FinetuneSettings
    reading: Reading
    device: torch.device
    revision: str | None

    def one(self, sources: Mapping[str, Source], settings: FinetuneSettings, output: str | Path | None) -> Finetuned:
        recipe = Recipe.read(settings, self.model, sources, self.reading, revision=self.revision)
        with tempfile.TemporaryDirectory(prefix="fastbert-finetune-") as scratch:
            folder = Path(scratch) / "run" if output is None else Path(output)
            if (folder / "config.json").exists():
                raise ValueError(f"{folder} holds a model already; a new run takes another output")
            model = recipe.fresh_model(self.model, revision=self.revision).to(self.device)
            run = Finetuning(recipe, model, folder)
            outcome = run.run()
            if outcome.signal is not None:
                raise KeyboardInterrupt(f"stopped after step {outcome.step}")
            result = save_and_report(run, self.model)
        evaluation = list(result.evaluations.values())[-1]
        return Finetuned(model.eval(), recipe.tokenizer, evaluation.scores, result.metrics, evaluation.predictions)

    def best(self, sources: Mapping[str, Source], tries: Mapping[str, Sequence[Any]], output: Any) -> Finetuned:
        if not tries:
            return self.one(sources, self.settings, output)
        score = self.settings.best or task_of(self.settings).scores[0]
        found: list[tuple[float, Finetuned]] = []
        tried: list[dict[str, Any]] = []
        for values in product(*tries.values()):
            chosen = dict(zip(tries, values, strict=True))
            result = self.one(sources, replace(self.settings, **chosen), None)
            value = result.metrics["dev"][score]
            tried.append({**chosen, score: value})
            found.append((better(score, value), result))
        best = max(range(len(found)), key=lambda i: found[i][0])
        result = replace(found[best][1], tried=tried)
        if output is not None:
            result.save_pretrained(output)
        return result

    def split(self, source: Source, share: float, seed: int) -> dict[str, Source]:
        """The training examples without some that become the dev examples: of each class as many, where there are."""
        if not 0 < share < 1:
            raise ValueError(f"dev_share is {share}; it must be above 0 and below 1")
        rows, classes = self._rows(source)
        from sklearn.model_selection import train_test_split

        places = np.arange(len(rows))
        try:
            parts = train_test_split(places, test_size=share, random_state=seed, stratify=classes)
        except ValueError:  # a class with too few examples to be in both parts
            parts = train_test_split(places, test_size=share, random_state=seed)
        return {name: _part(source, rows, p) for name, p in zip(("train", "dev"), parts, strict=True)}

    def folds(self, sources: Mapping[str, Source], count: int, output: Any, share: float) -> Finetuned:
        from sklearn.model_selection import KFold, StratifiedKFold

        source = sources["train"]
        rows, classes = self._rows(source)
        if not 2 <= count <= len(rows):
            raise ValueError(f"folds is {count}; it must be 2 to {len(rows)}, the number of examples")
        enough = classes is not None and min(np.unique(classes, return_counts=True)[1]) >= count
        kind = StratifiedKFold if enough else KFold
        parts = kind(count, shuffle=True, random_state=self.settings.seed).split(rows, classes if enough else None)
        results = []
        for number, (rest, held) in enumerate(parts, start=1):
            own = self.split(_part(source, rows, np.sort(rest)), share, self.settings.seed)
            own["test"] = _part(source, rows, np.sort(held))
            results.append(self.one(own, self.settings, output if number == count else None))
        table = {name: [result.scores[name] for result in results] for name in results[0].scores}
        return replace(
            results[-1],
            scores={name: float(np.mean(values)) for name, values in table.items()},
            spread={name: float(np.std(values, ddof=1)) for name, values in table.items()},
        )

    def _rows(self, source: Source) -> tuple[list[dict[str, Any]], np.ndarray | None]:
        """The rows of a source, and the class of each, where it has one."""
        examples = read_examples(task_of(self.settings), source, self.reading)
        names = [getattr(example, "label", None) for example in examples]
        classes = np.array(names) if all(isinstance(name, str) for name in names) else None
        return [_row_of(example, self.reading) for example in examples], classes


def _row_of(example: Any, reading: Reading) -> dict[str, Any]:
    """An example as a row that is read as the same one."""
    values = vars(example)
    row = {
        getattr(reading, name): values[name]
        for name in ("text", "label", "words", "tags", "question", "context", "id")
        if name in values
    }
    if values.get("pair") is not None:
        row[str(reading.pair)] = values["pair"]
    if "choices" in values:
        names = reading.choices
        row |= {names[0]: values["choices"]} if len(names) == 1 else dict(zip(names, values["choices"], strict=True))
    if "answers" in values:
        answers = values["answers"]
        row[reading.answers] = {"text": [a.text for a in answers], "answer_start": [a.start for a in answers]}
    return row


def _part(source: Source, rows: list[dict[str, Any]], places: np.ndarray) -> Table:
    return Table(str(source), [rows[i] for i in places])


def _source(name: str, given: Any) -> Source:
    """A file, or rows in memory as dicts."""
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        return path
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # pandas
        return Table(name, given.to_dict("records"))
    if hasattr(given, "to_list") and hasattr(given, "column_names"):  # datasets
        return Table(name, given.to_list())
    if isinstance(given, Sequence):
        return Table(name, [_as_row(name, i, example) for i, example in enumerate(given)])
    raise TypeError(f"{name} is a {type(given).__name__}; it must be a file, a list, a DataFrame or a Dataset")


def _as_row(name: str, i: int, example: Any) -> dict[str, Any]:
    if isinstance(example, Mapping):
        return dict(example)
    if isinstance(example, tuple | list) and len(example) in (2, 3):
        return dict(zip(_TEXT if len(example) == 2 else _PAIR, example, strict=True))
    raise DataError(
        f"{name}[{i}] is {example!r:.60}; it must be a dict, or a tuple (text, label) or (text, pair, label)"
    )
