"""`fastbert predict` and `fastbert zero-shot`: a task's answer to each row of files, with the row's own columns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastbert.cli.options import pipeline_of
from fastbert.cli.row_runs import bad_lines, check_output, check_streams, writing
from fastbert.inference.batching import WINDOW
from fastbert.inference.input_files import STDIN
from fastbert.inference.row_output import RowFormat, format_of_rows
from fastbert.progress import say
from fastbert.tasks.names import task_of
from fastbert.tasks.predict import PREDICTED, Predicting, predict_records
from fastbert.tasks.rows import TaskReading, TaskRows

ZERO_SHOT = "zero-shot-classification"
# The pipelines' arguments by the command's options.
_OF_TEXTS = ("max_length", "stride", "truncation")
_OF_QUESTIONS = {
    "max_length": "max_seq_len",
    "stride": "doc_stride",
    "max_answer": "max_answer_len",
    "unanswerable": "handle_impossible_answer",
}
_WITHOUT_TOP = ("token-classification", "multiple-choice")


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert predict` or `fastbert zero-shot`; returns the exit code."""
    check_streams(args)
    try:
        reading = TaskReading.of(args)
    except ValueError as error:
        args.parser.error(str(error))
    task = args.task or task_of(args.model, args.revision)
    if task not in (*PREDICTED, ZERO_SHOT):
        raise ValueError(f"the model's head is for {task}; fastbert predict runs {', '.join(PREDICTED)}")
    records = TaskRows(args.inputs, reading, task)
    to_file = args.output != STDIN
    format = RowFormat(format_of_rows(args.output, args.output_format) if to_file else "jsonl")
    if to_file:
        check_output(args)
    given = _arguments(args, task)
    window = args.window or WINDOW
    if task == ZERO_SHOT:
        names = {"hypothesis_template": args.template, "multi_label": args.multi_label}
        given |= {"candidate_labels": args.labels, **{name: value for name, value in names.items() if value}}
        window = args.window or max(1, WINDOW // len(args.labels.split(",")))  # each label makes a pair of a row
    if args.max_tokens is not None:
        given["max_tokens"] = args.max_tokens
    model = pipeline_of(args, task, **given)
    wanted = Predicting(args.top_k, args.threshold, args.prefix)

    def settings() -> dict[str, Any]:
        return {
            "task": task,
            **{name: value for name, value in given.items() if name != "max_tokens"},
            **vars(wanted),
            "dtype": model.runner.dtype,
            "precision": args.precision,
            "quantize": args.quantize,
            "device": model.runner.device,
            "window": window,
            **{f"input {name}": _as_json(value) for name, value in vars(reading).items()},
            "inputs": args.inputs if len(args.inputs) > 1 else None,
            "output format": args.output_format or Path(args.output).suffix,
            "model (a hash of its weights and vocabulary)": model.runner.fingerprint()[:16],
        }

    with writing(args, format, settings, records.total_bytes) as (output, progress):
        done = predict_records(
            model,
            records,
            output,
            wanted,
            window=window,
            skip_bad=args.bad_lines == "skip",
            report=bad_lines(progress),
            advance=lambda tokens: progress.update(records.bytes_read, progress.tokens + tokens),
        )
    if done.skipped:
        say(f"{done.skipped:,} of {done.records:,} lines skipped")
    if not args.quiet:
        where = args.output if to_file else "stdout"
        before = f", {output.resumed.records:,} of them by the run before" if output.resumed else ""
        say(f"{done.records - done.skipped:,} rows to {where}{before}; {progress.spent()}")
    if done.cut:
        became = "were cut" if args.truncation else "ran in several windows each"
        say(f"{done.cut:,} rows were too long for the model, and {became}")
    return 0


def _arguments(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """The pipeline's arguments; exits with a usage error if one is given that the task has no use for."""
    names = _OF_QUESTIONS if task == "question-answering" else {name: name for name in _OF_TEXTS}
    names = names | ({"long": "long"} if task == "text-classification" else {})
    written = () if task in _WITHOUT_TOP else ("top_k",)  # no argument of the pipeline
    options = ("top_k", "long", *_OF_TEXTS, *_OF_QUESTIONS)
    asked = {option: value for option in options if (value := getattr(args, option, None)) not in (None, False)}
    if idle := [option for option in asked if option not in names and option not in written]:
        shown = idle[0].replace("_", "-")
        args.parser.error(f"--{shown} is given; the model's task is {task}, which has no use for it")
    return {names[option]: value for option, value in asked.items() if option in names}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
