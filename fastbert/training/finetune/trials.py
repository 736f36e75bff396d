"""Runs that belong together: the folds of one source, or the combinations of some settings; and the best of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.checkpoint.files import write_text
from fastbert.training.finetune.card import write_card
from fastbert.training.finetune.examples import Reading, Source
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.recipe import Recipe, better
from fastbert.training.finetune.result import (
    REPORT,
    Result,
    check_free,
    is_finished,
    read_result,
    save_and_report,
)
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.splits import DEV_SHARE, Labelled
from fastbert.training.loop import Outcome, newest_checkpoint
from fastbert.training.vectors.loop import VectorTraining

RUNS = "runs"  # a folder in the output, of a folder for each run, until all are done
TRIALS = "trials.json"  # in the report: each run's settings and scores


@dataclass(frozen=True)
class Start:
    """The common part of runs: the initial model, how files are read, and the device that trains."""

    model: str
    reading: Reading
    device: torch.device
    revision: str | None = None


def training_of(recipe: Recipe, model: Any, folder: Path, **options: Any) -> Finetuning:
    """The run of a recipe, which is on this model; the options are those of Finetuning."""
    kind = VectorTraining if recipe.settings.of_vectors else Finetuning
    return kind(recipe, model, folder, **options)


@dataclass(frozen=True)
class Trial:
    """One run: its name, its examples (train, dev and, where there is one, test), and its settings.

    Attributes:
        labels: all that there are, where the training examples may lack some; None: those of the training examples.
        chosen: the settings that differ from run to run.
    """

    name: str
    sources: Mapping[str, Source]
    settings: FinetuneSettings
    labels: list[str] | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)


class Stopped(KeyboardInterrupt):
    """A signal stopped a run; its newest checkpoint is in its folder."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"stopped after step {outcome.step}")
        self.outcome = outcome


def plan(
    sources: Mapping[str, Source],
    settings: FinetuneSettings,
    reading: Reading,
    *,
    dev_share: float | None = None,
    folds: int | None = None,
    tries: Mapping[str, Sequence[Any]] | None = None,
) -> list[Trial]:
    """The runs to make: one; or one for each fold, or for each combination of `tries`, which has values by setting.

    Args:
        sources: train and, where given, dev and test. Without dev, `dev_share` of train becomes dev.
        reading: how they are read.

    Raises:
        ValueError: arguments that do not go together, or a share or number that the examples do not allow.
    """
    if dev_share is not None and "dev" in sources:
        raise ValueError(f"dev_share is {dev_share}, but dev is given")
    share = DEV_SHARE if dev_share is None else dev_share
    if folds is not None and (clash := [*(n for n in ("dev", "test") if n in sources), *["tries"] * bool(tries)]):
        raise ValueError(f"folds is {folds}, but {clash[0]} is given; each fold has dev and test examples of its own")
    labels = None
    if folds is not None or "dev" not in sources:
        labelled = Labelled.read(sources["train"], settings, reading)
        labels = labelled.labels or None
        if folds is not None:
            drawn = labelled.folds(folds, share, settings.seed)
            return [Trial(f"fold-{n}", parts, settings, labels) for n, parts in enumerate(drawn, start=1)]
        sources = {**sources, **labelled.split(share, settings.seed)}
    chosen = [dict(zip(tries, values, strict=True)) for values in product(*tries.values())] if tries else [{}]
    return [Trial(f"run-{n}", sources, replace(settings, **each), labels, each) for n, each in enumerate(chosen, 1)]


def run(
    start: Start,
    trial: Trial,
    folder: Path,
    *,
    resume: bool = False,
    tell: Callable[[Recipe], None] = lambda recipe: None,
) -> Result:
    """Trains and reports into a folder. With `resume`, a run that was stopped continues, and a finished one is read.

    Args:
        tell: is called with the recipe before the training.

    Raises:
        Stopped: by a signal.
        ValueError: the folder holds a model; or a run, with other settings or data or without `resume`.
    """
    recipe = Recipe.read(
        trial.settings, start.model, trial.sources, start.reading, revision=start.revision, labels=trial.labels
    )
    if resume and is_finished(folder):
        result = read_result(folder)
        made_with = {name: result.metrics["settings"][name] for name in recipe.settings.decisive()}
        if (made_with, result.metrics["data"], result.metrics["model"]) != (
            recipe.settings.decisive(),
            recipe.data(),
            start.model,
        ):
            raise ValueError(f"{folder} holds a run of another model, settings or data; a new run takes another output")
        return result
    newest = newest_checkpoint(folder, "output", resume=resume)
    if newest is None:
        check_free(folder)
    tell(recipe)
    model = recipe.fresh_model(start.model, revision=start.revision).to(start.device)
    running = training_of(recipe, model, folder)
    if newest is not None:
        running.resume(newest)
    outcome = running.run()
    if outcome.signal is not None:
        raise Stopped(outcome)
    return save_and_report(running, start.model)


def run_all(
    start: Start,
    trials: Sequence[Trial],
    output: Path,
    *,
    resume: bool = False,
    tell: Callable[[int, Recipe], None] = lambda number, recipe: None,
) -> tuple[int, list[Result]]:
    """Runs trials one after the other, and keeps the model and report of the one with the best dev score.

    Args:
        output: gets model and report, in the end; until then `runs` in it has a folder for each trial.
        tell: is called with the number, from 0, and the recipe of each, before its training.

    Returns:
        The index of the best, and all results.

    Raises:
        Stopped: by a signal; the same call with `resume` continues.
        ValueError: as `run`, of the output.
    """
    runs = output / RUNS
    if runs.exists() and not resume:
        raise ValueError(f"{runs} holds runs that did not end; --resume continues them; new ones take another output")
    if not runs.exists():
        check_free(output)
    results = [
        run(start, trial, runs / trial.name, resume=resume, tell=partial(tell, number))
        for number, trial in enumerate(trials)
    ]
    score = results[0].metrics["best"]["score"]
    best = max(range(len(results)), key=lambda i: better(score, results[i].metrics["dev"][score]))
    shutil.copytree(runs / trials[best].name, output, dirs_exist_ok=True)
    write_card(output, results[best].metrics)  # under this folder's name
    rows = [
        {"run": trial.name, "settings": dict(trial.chosen), **_scores(result)}
        for trial, result in zip(trials, results, strict=True)
    ]
    write_text(output / REPORT / TRIALS, json.dumps({"best": trials[best].name, "runs": rows}, indent=2) + "\n")
    done = runs.with_name(f".{RUNS}-done")  # at once, so that a kill leaves no half of them to resume
    shutil.rmtree(done, ignore_errors=True)
    runs.rename(done)
    shutil.rmtree(done)
    return best, results


def _scores(result: Result) -> dict[str, dict[str, float]]:
    return {name: result.metrics[name] for name in ("dev", "test") if name in result.metrics}


def mean_and_spread(results: Sequence[Result]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean over folds, and the standard deviation, of each test score that all of them have."""
    names = [name for name in results[0].metrics["test"] if all(name in r.metrics["test"] for r in results)]
    table = {name: [result.metrics["test"][name] for result in results] for name in names}
    return (
        {name: float(np.mean(values)) for name, values in table.items()},
        {name: float(np.std(values, ddof=1)) for name, values in table.items()},
    )
