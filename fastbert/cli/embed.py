"""`fastbert embed`: runs it from its arguments, with a progress bar and a summary."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastbert.cli.options import embedder_of
from fastbert.cli.row_runs import bad_lines, check_output, check_streams, writing
from fastbert.inference.base_embedder import MAX_TOKENS, BaseEmbedder
from fastbert.inference.batching import WINDOW
from fastbert.inference.input_files import STDIN
from fastbert.inference.job import embed_records
from fastbert.inference.output import Progress as Done
from fastbert.inference.output import make_format
from fastbert.inference.records import Reading, Records
from fastbert.progress import Progress, say
from fastbert.tokenizer.unknown_tokens import unknown_warning

SUFFIXES = {".npy": "npy", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert embed`; returns the exit code. Usage errors exit, other errors are raised."""
    format_name = _output_format(args)
    try:
        reading = Reading.of(args)
    except ValueError as error:
        args.parser.error(str(error))
    records = Records(args.inputs, reading)
    _check_paths(args, format_name)
    embedder = embedder_of(
        args,
        pooling=args.pooling,
        normalize=args.normalize,
        max_length=args.max_length,
        truncate_dim=args.truncate_dim,
    )
    prompt = embedder.prompt_of(args.prompt_name, args.prompt)
    options: dict[str, Any] = {"max_tokens": args.max_tokens or MAX_TOKENS, "window": args.window or WINDOW}
    options |= {"long": args.long} if args.long != "cut" else {}
    format = make_format(format_name, embedder.width, args.inputs, ids=args.id_column is not None)

    def settings() -> dict:
        return _settings(args, embedder, prompt, reading, format_name, options)

    with writing(args, format, settings, records.total_bytes) as (output, progress):
        done = embed_records(
            embedder,
            records,
            output,
            prompt=prompt,
            skip_bad=args.bad_lines == "skip",
            report=bad_lines(progress),
            advance=lambda tokens: progress.update(records.bytes_read, progress.tokens + tokens),
            **options,
        )
    if done.skipped:
        say(f"{done.skipped:,} of {done.records:,} lines skipped")
    became = f"cut to {embedder.max_length} tokens" if args.long == "cut" else "the mean of several windows"
    for line in () if args.quiet else _summary(done, output.resumed, progress, args.output, became):
        say(line)
    names = ["stdin" if name == STDIN else name for name in args.inputs]
    if warning := unknown_warning(", ".join(names), done.unknown, done.words):
        say(warning)
    return 0


def _output_format(args: argparse.Namespace) -> str:
    """The output's format; exits with a usage error if the arguments do not go together."""
    usage: Callable[[str], NoReturn] = args.parser.error
    check_streams(args)
    if args.output == STDIN:
        return "jsonl"
    format = args.output_format or SUFFIXES.get(Path(args.output).suffix.lower())
    if format is None:
        usage(f"-o {args.output}: the suffix is none of {', '.join(SUFFIXES)}; name an --output-format")
    if format == "npy" and args.id_column is not None:
        usage("--id-column: a .npy file has no room for ids; write .parquet or .jsonl")
    return format


def _check_paths(args: argparse.Namespace, format_name: str) -> None:
    """Checks the paths before the model is loaded, so that errors show at once."""
    if args.output == STDIN:
        return
    check_output(args)
    make_format(format_name, 1, args.inputs)


def _settings(
    args: argparse.Namespace,
    embedder: BaseEmbedder,
    prompt: str,
    reading: Reading,
    format_name: str,
    options: dict[str, Any],
) -> dict:
    """The settings that, with the input, determine the output. A run is resumed only with equal ones."""
    return {
        "pooling": embedder.pooling if isinstance(embedder.pooling, str) else ",".join(embedder.pooling),
        "prompt": prompt,
        "truncate_dim": embedder.truncate_dim,
        "normalize": embedder.normalize,
        "max_length": embedder.max_length,
        "dtype": embedder.dtype,
        "precision": args.precision,
        "quantize": args.quantize,
        "device": embedder.device,
        **options,
        **{f"input {name}": value for name, value in vars(reading).items()},
        "inputs": args.inputs if len(args.inputs) > 1 else None,  # then rows name their file
        "output format": format_name,
        "model (a hash of its weights, vocabulary and settings)": embedder.fingerprint()[:16],
    }


def _summary(done: Done, resumed: Done | None, progress: Progress, out: str, became: str) -> Iterator[str]:
    """A line on the run, and one on texts that were too long: what they became."""
    before = f", {resumed.records:,} of them by the run before" if resumed else ""
    where = "stdout" if out == STDIN else out
    yield f"{done.records - done.skipped:,} texts to {where}{before}; {progress.spent()}"
    if done.cut:
        yield f"{done.cut:,} of {done.records - done.skipped:,} texts are {became}"
