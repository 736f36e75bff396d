"""`fastbert embed`: from its arguments to a run, with a bar and a summary."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from fastbert.cli import placement
from fastbert.inference.embed import MAX_TOKENS, Embedder
from fastbert.inference.input_files import STDIN
from fastbert.inference.job import WINDOW, embed_records
from fastbert.inference.output import (
    FileOutput,
    OutputError,
    Progress,
    StreamOutput,
    journal_path,
    make_format,
)
from fastbert.inference.records import Reading, Records
from fastbert.unknown_tokens import unknown_warning

SUFFIXES = {".npy": "npy", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
BAD_LINES_SHOWN = 20  # each run names these many, then counts


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert embed`; returns the exit code. Usage errors exit, others are raised."""
    format_name = _output_format(args)
    reading = Reading(
        format=args.input_format,
        field=args.field,
        column=args.column,
        header=args.header,
        delimiter=args.delimiter,
        quoted=args.quoted,
        allow_empty=args.allow_empty,
        id_column=args.id_column,
    )
    records = Records(args.inputs, reading)
    _check_paths(args, format_name)
    embedder = Embedder.from_pretrained(
        args.model,
        pooling=args.pooling,
        normalize=args.normalize,
        max_length=args.max_length,
        truncate_dim=args.truncate_dim,
        revision=args.revision,
        **placement(args),
    )
    prompt = embedder.prompt_of(args.prompt_name, args.prompt)
    options = {"max_tokens": args.max_tokens or MAX_TOKENS, "window": args.window or WINDOW}
    format = make_format(format_name, embedder.width, args.inputs, ids=args.id_column is not None)
    output: StreamOutput | FileOutput
    if args.output == STDIN:
        output = StreamOutput(format, sys.stdout.buffer)
    else:
        settings = _settings(args, embedder, prompt, reading, format_name, options)
        output = FileOutput(Path(args.output), format, settings, resume=args.resume, restart=args.restart)
    meter = _Meter(records, quiet=args.quiet)
    try:
        with meter.bar():
            done = embed_records(
                embedder,
                records,
                output,
                prompt=prompt,
                skip_bad=args.bad_lines == "skip",
                report=meter.bad_line,
                advance=meter.advance,
                **options,
            )
    except KeyboardInterrupt:
        if args.output != STDIN and journal_path(Path(args.output)).exists():
            print(f"fastbert: {args.output} is not complete; --resume goes on with it", file=sys.stderr)
        raise
    finally:
        output.close()
    meter.summary(done, output.resumed, args.output, embedder.max_length)
    names = ["stdin" if name == STDIN else name for name in args.inputs]
    if warning := unknown_warning(", ".join(names), done.unknown, done.words):
        print(f"fastbert: {warning}", file=sys.stderr)
    return 0


def _output_format(args: argparse.Namespace) -> str:
    """The output's format; ends with a usage error where the arguments do not go together."""
    usage: Callable[[str], NoReturn] = args.parser.error
    if args.inputs.count(STDIN) > 1:
        usage("stdin (-) can be read once")
    if args.delimiter is not None and len(args.delimiter) != 1:
        usage("--delimiter must be one character")
    if args.output == STDIN:
        if args.resume or args.restart:
            usage("--resume and --restart need a file: -o OUT")
        if args.output_format not in (None, "jsonl"):
            usage(f"{args.output_format} cannot be written to stdout: -o OUT")
        return "jsonl"
    format = args.output_format or SUFFIXES.get(Path(args.output).suffix.lower())
    if format is None:
        usage(f"-o {args.output}: the suffix is none of {', '.join(SUFFIXES)}; name an --output-format")
    if format == "npy" and args.id_column is not None:
        usage("--id-column: a .npy file has no room for ids; write .parquet or .jsonl")
    return format


def _check_paths(args: argparse.Namespace, format_name: str) -> None:
    """Finds out before the model is loaded what would fail after it."""
    if args.output == STDIN:
        return
    out = Path(args.output)
    if out.is_dir():
        raise OutputError(f"{out} is a folder")
    if out.exists() and any(name != STDIN and out.samefile(name) for name in args.inputs):
        raise OutputError(f"{out} is an input, too")
    make_format(format_name, 1, args.inputs)


def _settings(
    args: argparse.Namespace,
    embedder: Embedder,
    prompt: str,
    reading: Reading,
    format_name: str,
    options: dict[str, int],
) -> dict:
    """What the output follows from beside the input: a run can only be gone on with by the same."""
    return {
        "pooling": embedder.pooling if isinstance(embedder.pooling, str) else ",".join(embedder.pooling),
        "prompt": prompt,
        "truncate_dim": embedder.truncate_dim,
        "normalize": embedder.normalize,
        "max_length": embedder.max_length,
        "dtype": str(embedder.model.dtype).removeprefix("torch."),
        "precision": args.precision,
        "quantize": args.quantize,
        "device": embedder.model.device.type,
        **options,
        **{f"input {name}": value for name, value in vars(reading).items()},
        "inputs": args.inputs if len(args.inputs) > 1 else None,  # rows name their file then
        "output format": format_name,
        "model (a hash of its weights, vocabulary and settings)": embedder.fingerprint()[:16],
    }


class _Meter:
    """The bar while a run goes on, the bad lines it meets, and the summary at its end; all on stderr."""

    def __init__(self, records: Records, *, quiet: bool) -> None:
        self._records, self._quiet = records, quiet
        self._bar = None
        self._tokens, self._bad, self._start = 0, 0, time.monotonic()

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Shows how much of the input is read, where stderr is a terminal and tqdm is installed."""
        self._start = time.monotonic()
        if self._quiet or not sys.stderr.isatty():
            yield
            return
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            yield
            return
        total = self._records.total_bytes
        with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as self._bar:
            yield
        self._bar = None

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate():,.0f} tokens/s", refresh=False)
            self._bar.update(self._records.bytes_read - self._bar.n)

    def bad_line(self, message: str) -> None:
        self._bad += 1
        if self._bad <= BAD_LINES_SHOWN:
            self._say(message)
        elif self._bad == BAD_LINES_SHOWN + 1:
            self._say("more bad lines: skipped, and counted at the end")

    def summary(self, done: Progress, resumed: Progress | None, out: str, max_length: int) -> None:
        """One line on what was done and one on the texts cut; bad lines are counted also for --quiet."""
        if done.skipped:
            self._say(f"{done.skipped:,} of {done.records:,} lines skipped")
        if self._quiet:
            return
        before = f", {resumed.records:,} of them by the run before" if resumed else ""
        where = "stdout" if out == STDIN else out
        self._say(
            f"{done.records - done.skipped:,} texts to {where}{before}; {self._tokens:,} tokens in "
            f"{time.monotonic() - self._start:.1f} s, {self._rate():,.0f} tokens/s"
        )
        if done.cut:
            self._say(f"{done.cut:,} of {done.records - done.skipped:,} texts are cut to {max_length} tokens")

    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._start, 1e-9)

    def _say(self, message: str) -> None:
        line = f"fastbert: {message}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)
