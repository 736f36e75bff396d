"""The output of a run: the model with the best weights, and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.training.finetune.card import write_card
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.recipe import Evaluation
from fastbert.training.finetune.report import (
    draw_confusion,
    draw_curves,
    draw_similarities,
    read_log,
    similarities,
    versions,
    write_report,
)

REPORT = "report"  # a folder in that of the model


@dataclass(frozen=True)
class Result:
    """The report of a run."""

    metrics: dict[str, Any]  # as in metrics.json
    evaluations: dict[str, Evaluation]  # of dev and, where there is one, test


def save_and_report(run: Finetuning, start: str) -> Result:
    """Loads the best weights, saves model and report, and removes the checkpoints; `start`: the initial model."""
    recipe, folder = run.recipe, run.folder
    run.load_best()
    evaluations = {"dev": run.evaluate(recipe.dev)}
    if recipe.test is not None:
        evaluations["test"] = run.evaluate(recipe.test)
    run.model.save_pretrained(folder)
    recipe.tokenizer.save_pretrained(folder)
    train_log, dev_log = read_log(folder, "train"), read_log(folder, "dev")
    report = folder / REPORT
    assert run.best_step is not None, "no evaluation has been made"
    draw_curves(report / "learning-curves.png", train_log, dev_log, run.best_score, run.best_step)
    name, last = list(evaluations.items())[-1]
    if recipe.settings.task == "classification":
        gold, predicted = ([p[side] for p in last.predictions] for side in ("gold", "predicted"))
        draw_confusion(report / f"confusion-matrix-{name}.png", gold, predicted, recipe.labels)
    if recipe.settings.of_vectors:
        draw_similarities(report / f"similarities-{name}.png", *similarities(last.predictions))
    metrics = _metrics(run, evaluations, start, sum(line["seconds"] for line in train_log))
    write_card(folder, metrics)
    write_report(report, metrics, evaluations)
    run.remove_checkpoints()
    return Result(metrics, evaluations)


def check_free(folder: Path, option: str = "output") -> None:
    """Raises ValueError for a folder that holds a model, which a new run would replace; `option` names the folder."""
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already; a new run takes another {option}")


def is_finished(folder: Path) -> bool:
    """True if the run of a folder has ended with its report."""
    return (folder / REPORT / "metrics.json").exists()


def read_result(folder: Path) -> Result:
    """The result of a finished run."""
    report = folder / REPORT
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    evaluations = {}
    for name in (name for name in ("dev", "test") if name in metrics):
        lines = (report / f"predictions-{name}.jsonl").read_text(encoding="utf-8").split("\n")
        evaluations[name] = Evaluation(metrics[name], [json.loads(line) for line in lines if line])
    return Result(metrics, evaluations)


def _metrics(run: Finetuning, evaluations: dict[str, Evaluation], start: str, seconds: float) -> dict[str, Any]:
    recipe = run.recipe
    return {
        **{name: evaluation.scores for name, evaluation in evaluations.items()},
        "classes": {
            name: details
            for name, e in evaluations.items()
            if (details := run.task.details(e.predictions, recipe.labels))
        },
        "best": {"score": run.best_score, "step": run.best_step},
        "steps": run.step,
        "training_seconds": seconds,
        "model": start,
        "settings": run.all_settings(),
        "labels": recipe.labels,
        "data": recipe.data(),
        "versions": versions(),
    }
