"""`fastbert evaluate`: the report of finetune on a trained model, for a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastbert.cli.finetune import check_libraries
from fastbert.cli.options import given, load_options
from fastbert.progress import say
from fastbert.training.finetune.evaluate import evaluate
from fastbert.training.finetune.examples import DataError, Reading
from fastbert.training.finetune.report import draw_confusion, write_report
from fastbert.training.finetune.settings import TEXT_OPTIONS, FinetuneSettings


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert evaluate`; returns the exit code."""
    check_libraries("evaluating")
    test = Path(args.test)
    if not test.is_file():
        raise DataError(f"{test}: {'is a folder' if test.is_dir() else 'no such file'}")
    folder = None if args.output is None else Path(args.output)
    if folder is not None and (folder / "metrics.json").exists():
        raise ValueError(f"{folder} holds a report already; another takes another --output")
    settings = {name: value for name, value in given(args, FinetuneSettings).items() if name in TEXT_OPTIONS}
    found = evaluate(args.model, test, Reading.of(args), load_options(args), **settings)
    recipe, predictions = found.recipe, found.evaluation.predictions
    if folder is not None:
        write_report(folder, found.metrics, {"test": found.evaluation})
        if recipe.settings.task == "classification":
            gold, predicted = ([p[side] for p in predictions] for side in ("gold", "predicted"))
            draw_confusion(folder / "confusion-matrix-test.png", gold, predicted, recipe.labels)
    if cut := found.metrics["data"]["test"]["truncated"]:
        say(f"{test}: {cut:,} of {len(predictions):,} examples are cut to {recipe.settings.max_length} tokens")
    print(f"{recipe.settings.task}, {len(predictions):,} examples")
    for name, value in found.evaluation.scores.items():
        print(f"  {name:<16} {value:.4f}")
    for label, row in found.metrics["classes"].get("test", {}).items():
        print(
            f"  {label}: " + ", ".join(f"{n} {v:.4f}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items())
        )
    if folder is not None:
        say(f"the report is in {folder}")
    return 0
