"""`fastbert finetune`: trains a model for a task and writes a report."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.cli.options import given
from fastbert.progress import say
from fastbert.tokenizer.unknown_tokens import unknown_warning
from fastbert.training.distributed import device_of, join
from fastbert.training.finetune.examples import DataError, Reading
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.recipe import Recipe
from fastbert.training.finetune.result import REPORT, Result, check_free, is_finished, save_and_report
from fastbert.training.finetune.settings import VECTOR_TASKS, FinetuneSettings
from fastbert.training.finetune.tasks import TASKS
from fastbert.training.finetune.trials import (
    RUNS,
    Start,
    Stopped,
    Trial,
    mean_and_spread,
    plan,
    run_all,
    training_of,
)
from fastbert.training.logs import summary_writer
from fastbert.training.loop import newest_checkpoint

FEW_STEPS = 50  # a run of fewer optimizer steps is unlikely to learn
NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy", "seqeval": "seqeval", "matplotlib": "matplotlib"}


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert finetune`; returns the exit code."""
    folder, newest = prepare_output(args)
    device = torch.device(device_of(args.device))
    if args.folds is not None or args.tries is not None:
        return _several(args, folder, device)
    with join(device) as processes:
        processes.wait()  # until all have looked into the folder, before one writes
        recipe = read_recipe(args)
        model = recipe.fresh_model(args.model, revision=args.revision).to(device)
        return carry_out(training_of(recipe, model, folder, processes=processes), newest, args.model)


def prepare_output(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Checks the output folder before anything is loaded; returns it and the checkpoint in it to resume from.

    Raises:
        ValueError: the folder is a file, or holds files that would be overwritten; or torchrun started several
            processes, and the task or the options need one.
        ModuleNotFoundError: a library for the report or the log is not installed.
    """
    folder = Path(args.output)
    several = args.task not in VECTOR_TASKS or getattr(args, "folds", None) or getattr(args, "tries", None)
    if several and (number := int(os.environ.get("WORLD_SIZE", 1))) > 1 and "RANK" in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {number}; a run of {' or '.join(VECTOR_TASKS)} takes several processes, others one, "
            "without torchrun"
        )
    newest = newest_checkpoint(folder, "--output", resume=args.resume)
    check_libraries("fine-tuning")
    if args.tensorboard:
        summary_writer("--tensorboard is given", "leave it out")
    unfinished = args.resume and (folder / RUNS).exists()  # of several runs
    if not unfinished and (newest is None or is_finished(folder)):
        check_free(folder, "--output")
    return folder, newest


def check_libraries(what: str) -> None:
    """Raises ModuleNotFoundError if a library for the report is not installed."""
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}: pip install 'fastbert-engine[train]'", name=missing[0]
        )


def read_recipe(args: argparse.Namespace, model: str | None = None, labels: list[str] | None = None) -> Recipe:
    """Reads the data and settings of the arguments, for `model` (default: theirs) and its labels, if it has any.

    Raises:
        ValueError: the task does not read an option; settings, files or model are wrong.
    """
    (trial,) = _plan(args)
    start, reading = model or args.model, Reading.of(args)
    options = {"revision": args.revision, "labels": labels or trial.labels}
    return Recipe.read(trial.settings, start, trial.sources, reading, **options)


def _plan(args: argparse.Namespace, **several: Any) -> list[Trial]:
    """The runs that the arguments ask for."""
    others = {name for task in TASKS.values() for name in task.options} - {*TASKS[args.task].options}
    if idle := [option for name, option in given_options(args) if name in others]:
        raise ValueError(f"{idle[0]} is given; --task {args.task} has no use for it")
    paths = {name: Path(path) for name in ("train", "dev", "test") if (path := getattr(args, name)) is not None}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    settings = FinetuneSettings(**given(args, FinetuneSettings))
    return plan(paths, settings, Reading.of(args), dev_share=args.dev_share, **several)


def _several(args: argparse.Namespace, folder: Path, device: torch.device) -> int:
    """Trains with folds, or with each combination of some settings, and prints a table."""
    trials = _plan(args, folds=args.folds, tries=dict(args.tries or []))
    start = Start(args.model, Reading.of(args), device, args.revision)

    def tell(number: int, recipe: Recipe) -> None:
        chosen = ", ".join(f"{name} {value}" for name, value in trials[number].chosen.items())
        say(f"run {number + 1} of {len(trials)}: {chosen or trials[number].name}")
        if number == 0 or args.folds is not None:
            _say_data(recipe)

    try:
        best, results = run_all(start, trials, folder, resume=args.resume, tell=tell)
    except Stopped as stopped:
        return stopped.outcome.exit_code()
    print(table(trials, results, best))
    say(f"the model of {trials[best].name} is in {folder}, its report in {folder / REPORT}")
    return 0


def table(trials: Sequence[Trial], results: Sequence[Result], best: int) -> str:
    """A line for each run: its settings and dev scores, or the test scores of a fold; a star marks the best by dev.

    With folds, the mean and spread follow.
    """
    part = "dev" if trials[0].chosen else "test"
    scores = list(dict.fromkeys(name for result in results for name in result.metrics[part]))

    def shown(figures: Mapping[str, float]) -> list[str]:
        return [f"{figures[name]:.4f}" if name in figures else "" for name in scores]

    lines = [["", *trials[0].chosen, *scores]]
    for trial, result in zip(trials, results, strict=True):
        mark = "*" if trial is trials[best] else ""
        lines.append([trial.name + mark, *map(str, trial.chosen.values()), *shown(result.metrics[part])])
    if not trials[0].chosen:
        for name, figures in zip(("mean", "spread"), mean_and_spread(results), strict=True):
            lines.append([name, *shown(figures)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{part} scores", *rows])


def carry_out(run: Finetuning, newest: Path | None, start: str) -> int:
    """Trains, resuming from the checkpoint `newest` if there is one, and reports; `start` is the initial model."""
    first = run.processes.first
    if first:
        _say_data(run.recipe)
        say(f"{len(run.plan):,} optimizer steps in {run.recipe.settings.epochs:,} epochs")
    if first and len(run.plan) < FEW_STEPS:
        say(
            f"warning: {len(run.plan)} optimizer steps in all; below {FEW_STEPS} a model hardly learns: "
            "more --epochs or a smaller --batch-size make more"
        )
    if newest is not None:
        run.resume(newest)
    if newest is not None and first:
        say(f"resuming from {newest}: {run.step:,} of {len(run.plan):,} steps done, {run.where()}")
    outcome = run.run()
    run.processes.wait()  # for the checkpoint that the first one writes
    if outcome.signal is None and first:
        evaluations = save_and_report(run, start).evaluations
        for name, evaluation in evaluations.items():
            say(f"{name}: " + ", ".join(f"{score} {value:.4f}" for score, value in evaluation.scores.items()))
        say(f"the model of step {run.best_step:,} is in {run.folder}, its report in {run.folder / REPORT}")
    return outcome.exit_code()


def given_options(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and spellings of the options whose values are not the default."""
    found = []
    for action in args.parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        if long and getattr(args, action.dest, action.default) != action.default:
            found.append((action.dest, long[0]))
    return found


def _say_data(recipe: Recipe) -> None:
    train, dev, test = (None if d is None else len(d.examples) for d in (recipe.train, recipe.dev, recipe.test))
    labels = f", {len(recipe.labels)} labels" if recipe.labels else ""
    say(f"{train:,} examples to train on, {dev:,} dev" + (f", {test:,} test" if test else "") + labels)
    for data in (recipe.train, recipe.dev, recipe.test):
        if data is not None and data.truncated:
            say(
                f"{data.path}: {data.truncated:,} of {len(data.examples):,} examples are cut to "
                f"{recipe.settings.max_length} tokens"
            )
        if data is not None and (warning := unknown_warning(str(data.path), *data.unknown(recipe.tokenizer))):
            say(warning)
