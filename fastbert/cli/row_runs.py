"""The common part of the commands that read rows: checks, output, messages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from fastbert.inference.input_files import STDIN, InputError
from fastbert.inference.output import FileOutput, Format, OutputError, StreamOutput, journal_path
from fastbert.inference.records import Reading, Records
from fastbert.progress import Progress

BAD_LINES_SHOWN = 20  # each run shows so many messages, then only counts


def check_streams(args: argparse.Namespace) -> None:
    """Exits with a usage error if stdin or stdout is asked for what it cannot do."""
    usage: Callable[[str], NoReturn] = args.parser.error
    if args.inputs.count(STDIN) > 1:
        usage("stdin (-) can be read once")
    if args.output == STDIN:
        if args.resume or args.restart:
            usage("--resume and --restart need a file: -o OUT")
        if args.output_format not in (None, "jsonl"):
            usage(f"{args.output_format} cannot be written to stdout: -o OUT")


def check_output(args: argparse.Namespace) -> None:
    """Checks the output's path before the model is loaded, so that errors show at once."""
    out = Path(args.output)
    if out.is_dir():
        raise OutputError(f"{out} is a folder")
    if out.exists() and any(name != STDIN and out.samefile(name) for name in args.inputs):
        raise OutputError(f"{out} is an input, too")


@contextmanager
def writing(
    args: argparse.Namespace, format: Format, settings: Callable[[], dict[str, Any]], total: int | None
) -> Iterator[tuple[FileOutput | StreamOutput, Progress]]:
    """The output of a run, and its progress line.

    Args:
        settings: what, with the input, determines the output; called for a file.
        total: bytes of input; None if unknown.
    """
    output: StreamOutput | FileOutput
    if args.output == STDIN:
        output = StreamOutput(format, sys.stdout.buffer)
    else:
        output = FileOutput(Path(args.output), format, settings(), resume=args.resume, restart=args.restart)
    progress = Progress(shown=False if args.quiet else None)
    progress.begin(total)
    try:
        yield output, progress
    except KeyboardInterrupt:
        if args.output != STDIN and journal_path(Path(args.output)).exists():
            progress.line.say(f"{args.output} is not complete; --resume continues it")
        raise
    finally:
        progress.line.close()
        output.close()


def bad_lines(progress: Progress) -> Callable[[str], None]:
    """Makes a function that prints the first messages on bad lines, and once that there are more."""
    number = count(1)

    def report(message: str) -> None:
        if (bad := next(number)) <= BAD_LINES_SHOWN + 1:
            more = "more bad lines: skipped, and counted at the end"
            progress.line.say(message if bad <= BAD_LINES_SHOWN else more)

    return report


def read_texts(file: str, field: str = "text", column: str = "text") -> Iterator[str]:
    """The texts of a file, of a field of JSON objects or a column; a bad line ends it."""
    records = Records([file], Reading(field=field, column=column))
    for record in records:
        if record.problem is not None:
            raise InputError(f"{records.where(record)} {record.problem}")
        yield record.text
