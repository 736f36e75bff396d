"""A run's output in addition to the model: metrics as JSON, predictions, learning curves, a confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.checkpoint.files import atomic_path, write_text
from fastbert.training.finetune.recipe import Evaluation
from fastbert.training.logs import LOG

_BLUE, _ORANGE, _GREY = "#1f6fb4", "#d95f02", "#666666"
_CELLS_WITH_NUMBERS = 15  # most classes for which cells show their counts


def versions() -> dict[str, str]:
    """Of what made a report."""
    try:
        own = version("fastbert-engine")
    except PackageNotFoundError:
        own = "a source tree that is not installed"
    return {"fastbert": own, "torch": version("torch")}


def write_report(folder: Path, metrics: dict[str, Any], evaluations: dict[str, Evaluation]) -> None:
    """Writes predictions-NAME.jsonl for dev and test, one line per example, in order; and last metrics.json."""
    for name, evaluation in evaluations.items():
        lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in evaluation.predictions)
        write_text(folder / f"predictions-{name}.jsonl", "".join(lines))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, "train" or "dev", of a run's log."""
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def draw_curves(path: Path, train: Sequence[dict], dev: Sequence[dict], score: str, best_step: int) -> None:
    """Plots the losses, and the dev score with its best step, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    steps, dev_steps = [line["step"] for line in train], [line["step"] for line in dev]
    losses.plot(steps, [line["loss"] for line in train], color=_BLUE, linewidth=1.2, label="training")
    losses.plot(dev_steps, [line["loss"] for line in dev], "o-", color=_ORANGE, markersize=4, label="dev")
    losses.set(title="Loss", xlabel="step")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    values = [line[score] for line in dev]
    scores.plot(dev_steps, values, "o-", color=_ORANGE, markersize=4)
    best = values[dev_steps.index(best_step)]
    scores.axvline(best_step, color=_GREY, linewidth=0.8, linestyle="--")
    scores.set(title=f"Dev {score.replace('_', ' ')}: best {best:.4f} at step {best_step:,}", xlabel="step")
    for axes in (losses, scores):
        axes.set_xlim(0, max([*steps, *dev_steps]) * 1.03)
        _plain(axes)
    _save(figure, path)


def draw_confusion(path: Path, gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> None:
    """Plots the counts of true classes (rows) against predicted ones (columns), coloured by their share of the row."""
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(gold, predicted, labels=list(labels))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(3.2 + 0.55 * len(labels), 14)
    figure = Figure(figsize=(side + 0.9, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(labels) <= _CELLS_WITH_NUMBERS else 6
    shown = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
    slant: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, shown)) > 4 else {}
    )
    axes.set_xticks(range(len(labels)), shown, fontsize=size, **slant)
    axes.set_yticks(range(len(labels)), shown, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(counts):,} of {counts.sum():,} right")
    if len(labels) <= _CELLS_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class").outline.set_visible(False)
    _save(figure, path)


def similarities(predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, list[float]], str]:
    """The similarities to be drawn, by what they are of, and the name of the similarity."""
    first = predictions[0]
    if "similarity" in first:
        names = {"similarity": "anchor and positive", "other": "anchor and another text"}
        return {told: [p[name] for p in predictions] for name, told in names.items()}, "similarity"
    if "predicted" in first:
        middle = float(np.median([p["gold"] for p in predictions]))
        return {
            f"score above {middle:g}": [p["predicted"] for p in predictions if p["gold"] > middle],
            f"score of at most {middle:g}": [p["predicted"] for p in predictions if p["gold"] <= middle],
        }, "similarity"
    return {"rank of the first text of the same class": [float(p["rank"]) for p in predictions]}, "rank, 0: none of 10"


def draw_similarities(path: Path, values: dict[str, list[float]], name: str) -> None:
    """Plots histograms of similarities over one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    every = np.concatenate([np.asarray(found) for found in values.values()])
    bins = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), 41)
    for colour, (told, found) in zip((_BLUE, _ORANGE), values.items(), strict=False):
        axes.hist(found, bins=bins.tolist(), alpha=0.6, color=colour, label=told)
    axes.set(xlabel=name, ylabel="examples")
    axes.legend(frameon=False)
    _plain(axes)
    _save(figure, path)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
