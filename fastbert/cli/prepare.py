"""`fastbert prepare`: runs it from its arguments, with a progress bar and a summary."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fastbert.progress import Progress, say
from fastbert.tokenizer.unknown_tokens import unknown_warning
from fastbert.training.documents import DocumentReading
from fastbert.training.prepare import JOURNAL, PrepareSettings, Summary, prepare
from fastbert.training.shards import Counts


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert prepare`; returns the exit code. Usage errors exit, other errors are raised."""
    try:
        settings = PrepareSettings(
            max_length=args.max_length,
            pairs=args.pairs,
            short_seq_prob=args.short_seq_prob,
            held_out=args.held_out,
            seed=args.seed,
            shard_bytes=args.shard_mib << 20,
            skip_bad=args.bad_documents == "skip",
            reading=DocumentReading.of(args),
        )
    except ValueError as error:
        args.parser.error(str(error))
    progress = Progress(shown=False if args.quiet else None)
    try:
        summary = prepare(
            args.inputs,
            args.output,
            settings,
            vocab=args.vocab,
            learn_vocab=args.learn_vocab,
            lower=args.lower,
            processes=args.processes,
            resume=args.resume,
            restart=args.restart,
            progress=progress,
        )
    except KeyboardInterrupt:
        if (Path(args.output) / JOURNAL).exists():
            say(f"{args.output} is not complete; --resume continues it")
        raise
    finally:
        progress.line.close()
    told = [] if args.quiet else _summary(summary, progress, args.output)
    for line in chain(_findings(summary, settings, args.inputs), told):
        say(line)
    return 0


def _findings(done: Summary, settings: PrepareSettings, inputs: list[str]) -> Iterator[str]:
    """Warnings, shown also with --quiet: skipped documents, cut sentences, a vocabulary that does not fit."""
    counts = sum(done.splits.values(), Counts())
    if counts.skipped:
        yield f"{counts.skipped:,} documents skipped"
    if counts.too_long:
        become = "the rest of them is dropped" if settings.pairs else "they are split over several examples"
        yield (
            f"{counts.too_long:,} of {counts.sentences:,} sentences have more than the {settings.room:,} tokens of "
            f"text that --max-length {settings.max_length:,} leaves room for: {become}"
        )
    named = ", ".join(inputs[:3]) + (f" and {len(inputs) - 3:,} more" if len(inputs) > 3 else "")
    text_tokens = counts.tokens - settings.specials * counts.examples
    if warning := unknown_warning(named, counts.unknown, text_tokens):
        yield warning


def _summary(done: Summary, progress: Progress, output: str) -> Iterator[str]:
    """A line for each split, and a line on the run."""
    for split, counts in done.splits.items():
        yield (
            f"{split}: {counts.documents:,} documents, {counts.sentences:,} sentences, "
            f"{counts.examples:,} examples, {counts.tokens:,} tokens"
        )
    before = f", {done.resumed:,} of them by the run before" if done.resumed else ""
    yield (
        f"{done.shards:,} shards, {done.bytes:,} bytes, vocabulary of {done.vocabulary.size:,} tokens to {output}"
        f"{before}; {progress.spent('tokens of text')}"
    )
