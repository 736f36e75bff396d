"""`fastbert prepare`: from its arguments to a run, with a bar and a summary."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastbert.training.documents import DocumentReading
from fastbert.training.pool import Progress
from fastbert.training.prepare import JOURNAL, PrepareSettings, Summary, prepare
from fastbert.training.shards import Counts
from fastbert.unknown_tokens import unknown_warning


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert prepare`; returns the exit code. Usage errors exit, others are raised."""
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
    meter = _Meter(quiet=args.quiet)
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
            progress=meter,
        )
    except KeyboardInterrupt:
        if (Path(args.output) / JOURNAL).exists():
            print(f"fastbert: {args.output} is not complete; --resume goes on with it", file=sys.stderr)
        raise
    finally:
        meter.close()
    for line in _findings(summary, settings, args.inputs):
        _say(line)
    meter.summary(summary, args.output)
    return 0


def _findings(done: Summary, settings: PrepareSettings, inputs: list[str]) -> Iterator[str]:
    """What the user must know, also with --quiet: documents skipped, sentences cut, a vocabulary that does not fit."""
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


def _say(message: str) -> None:
    print(f"fastbert: {message}", file=sys.stderr)


class _Meter(Progress):
    """The bar while a run goes on, where stderr is a terminal and tqdm is installed, and the summary at its end."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._bar = quiet, None
        self._tokens, self._start = 0, time.monotonic()

    def begin(self, total_bytes: int) -> None:
        self._start = time.monotonic()
        if self._quiet or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            return
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)

    def update(self, read_bytes: int, tokens: int) -> None:
        self._tokens = tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate():,.0f} tokens/s", refresh=False)
            self._bar.update(read_bytes - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def summary(self, done: Summary, output: str) -> None:
        """A line for each split, and one on the run."""
        if self._quiet:
            return
        for split, counts in done.splits.items():
            _say(
                f"{split}: {counts.documents:,} documents, {counts.sentences:,} sentences, "
                f"{counts.examples:,} examples, {counts.tokens:,} tokens"
            )
        before = f", {done.resumed:,} of them by the run before" if done.resumed else ""
        _say(
            f"{done.shards:,} shards, {done.bytes:,} bytes, vocabulary of {done.vocabulary.size:,} tokens to {output}"
            f"{before}; {self._tokens:,} tokens of text in {time.monotonic() - self._start:.1f} s, "
            f"{self._rate():,.0f} tokens/s"
        )

    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._start, 1e-9)
