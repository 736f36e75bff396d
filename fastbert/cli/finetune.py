"""`fastbert finetune`: trains a model for a task and writes a report."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastbert.cli.options import device_of
from fastbert.progress import say
from fastbert.tokenizer.unknown_tokens import unknown_warning
from fastbert.training.finetune.examples import DataError, Reading
from fastbert.training.finetune.loop import Finetuning, Recipe
from fastbert.training.finetune.result import REPORT, save_and_report
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.tasks import TASKS
from fastbert.training.logs import summary_writer
from fastbert.training.loop import newest_checkpoint

FEW_STEPS = 50  # a run of fewer optimizer steps is unlikely to learn
NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy", "seqeval": "seqeval", "matplotlib": "matplotlib"}


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert finetune`; returns the exit code."""
    folder, newest = prepare_output(args)
    device = torch.device(device_of(args.device))
    recipe = read_recipe(args)
    model = recipe.fresh_model(args.model, revision=args.revision).to(device)
    return carry_out(Finetuning(recipe, model, folder), newest, args.model)


def prepare_output(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Checks the output folder before anything is loaded; returns it and the checkpoint in it to resume from.

    Raises:
        ValueError: the folder is a file, or holds files that would be overwritten; or torchrun started several
            processes.
        ModuleNotFoundError: a library for the report or the log is not installed.
    """
    folder = Path(args.output)
    if (number := int(os.environ.get("WORLD_SIZE", 1))) > 1 and "RANK" in os.environ:
        raise ValueError(f"WORLD_SIZE is {number}; training for a task takes one process, without torchrun")
    newest = newest_checkpoint(folder, "--output", resume=args.resume)
    check_libraries("fine-tuning")
    if args.tensorboard:
        summary_writer("--tensorboard is given", "leave it out")
    if (folder / REPORT / "metrics.json").exists():
        raise ValueError(f"{folder} holds a model that is fine-tuned already; a new run takes another --output")
    if newest is None and (folder / "config.json").exists():  # for example the initial model
        raise ValueError(f"{folder} holds a model already; a new run takes another --output")
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
    others = {name for task in TASKS.values() for name in task.options} - {*TASKS[args.task].options}
    if idle := [option for name, option in given_options(args) if name in others]:
        raise ValueError(f"{idle[0]} is given; --task {args.task} has no use for it")
    settings = FinetuneSettings(**given(args, FinetuneSettings))
    reading = Reading.of(args)
    paths = {name: Path(path) for name in ("train", "dev", "test") if (path := getattr(args, name)) is not None}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    return Recipe.read(settings, model or args.model, paths, reading, revision=args.revision, labels=labels)


def carry_out(run: Finetuning, newest: Path | None, start: str) -> int:
    """Trains, resuming from the checkpoint `newest` if there is one, and reports; `start` is the initial model."""
    _say_data(run.recipe)
    say(f"{len(run.plan):,} optimizer steps in {run.recipe.settings.epochs:,} epochs")
    if len(run.plan) < FEW_STEPS:
        say(
            f"warning: {len(run.plan)} optimizer steps in all; below {FEW_STEPS} a model hardly learns: "
            "more --epochs or a smaller --batch-size make more"
        )
    if newest is not None:
        run.resume(newest)
        say(f"resuming from {newest}: {run.step:,} of {len(run.plan):,} steps done, {run.where()}")
    outcome = run.run()
    if outcome.signal is None:
        evaluations = save_and_report(run, start).evaluations
        for name, evaluation in evaluations.items():
            say(f"{name}: " + ", ".join(f"{score} {value:.4f}" for score, value in evaluation.scores.items()))
        say(f"the model of step {run.best_step:,} is in {run.folder}, its report in {run.folder / REPORT}")
    return outcome.exit_code()


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The given arguments that are fields of `kind`; omitted ones keep their defaults."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


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
