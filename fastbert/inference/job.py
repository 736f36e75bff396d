"""The runs behind `fastbert embed` and `fastbert predict`: records window by window, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fastbert.inference.ahead import ahead
from fastbert.inference.base_embedder import BaseEmbedder, TokenCounts, Tokenized
from fastbert.inference.batching import WINDOW, blocks
from fastbert.inference.input_files import InputError
from fastbert.inference.output import FileOutput, OutputError, Progress, StreamOutput
from fastbert.inference.records import Record, Records

WINDOW_CHARS = 1 << 21  # characters of text at which a window ends


def windows(records: Iterable[Record], size: int = WINDOW, chars: int = WINDOW_CHARS) -> Iterator[list[Record]]:
    """Splits records into lists of at most `size` records; a list also ends when its texts reach `chars` characters."""
    return blocks(records, lambda record: len(record.text), size, chars)


def run_records(
    records: Records,
    output: FileOutput | StreamOutput,
    prepare: Callable[[list[Record]], Any],
    process: Callable[[list[Record], Any], tuple[Any, dict[str, int]]],
    *,
    window: int = WINDOW,
    skip_bad: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Progress:
    """Processes all records, resuming where `output` was interrupted; returns the progress of all runs together.

    Windows start at the same records as in an uninterrupted run. Batches, and so the last bits of what is computed,
    are then the same.

    Args:
        prepare: what is done with a window's records, bad ones among them, in a thread, ahead of `process`.
        process: from a window's records, and what `prepare` made of them, to what `output` appends for them, and
            numbers to add to the fields of Progress.
        report: called with a message for each bad line that is skipped.

    Raises:
        InputError: a bad line, unless `skip_bad`; or the input differs from that of the interrupted run.
    """
    progress = replace(output.resumed) if output.resumed else Progress()
    if output.done:
        output.finish(progress)
        return progress
    stream = iter(records)
    if output.resumed:
        _replay(stream, records, progress)
    # With what has been read up to its end: while a window is processed, the next ones are read.
    read = ((block, records.digest()) for block in windows(stream, window))
    for (block, digest), prepared in ahead(read, lambda item: prepare(item[0])):
        bad = [record for record in block if record.problem is not None]
        for record in bad:
            if not skip_bad:
                raise InputError(f"{records.where(record)} {record.problem}")
            report(f"{records.where(record)} {record.problem}: skipped")
        made, counts = process(block, prepared)
        for name, number in {"records": len(block), "skipped": len(bad), **counts}.items():
            setattr(progress, name, getattr(progress, name) + number)
        progress.input_sha256 = digest
        output.append(block, made, progress)
    output.finish(progress)
    return progress


def embed_records(
    embedder: BaseEmbedder,
    records: Records,
    output: FileOutput | StreamOutput,
    *,
    max_tokens: int,
    prompt: str = "",
    long: str = "cut",
    advance: Callable[[int], None] = lambda tokens: None,
    **options: Any,
) -> Progress:
    """Embeds all records: see run_records, which takes the `options`.

    Args:
        prompt: put before each text.
        long: "cut" or "mean", of a text with too many tokens; see Embedder.embed.
        advance: called with the number of tokens of each batch.

    Raises:
        OutputError: a vector is not finite.
    """

    def prepare(block: list[Record]) -> tuple[list[int], Tokenized, TokenCounts]:
        good, counts = [i for i, record in enumerate(block) if record.problem is None], TokenCounts()
        return good, embedder.tokenize_block([block[i].text for i in good], prompt, counts), counts

    def process(
        block: list[Record], prepared: tuple[list[int], Tokenized, TokenCounts]
    ) -> tuple[np.ndarray, dict[str, int]]:
        good, tokenized, counts = prepared
        tokens = 0

        def count(_: int, batch: int) -> None:
            nonlocal tokens
            tokens += batch
            advance(batch)

        vectors = np.full((len(block), embedder.width), np.nan, dtype=np.float32)
        vectors[good] = embedder.embed_block(tokenized, max_tokens=max_tokens, long=long, report=count)
        for i in good:
            if not np.isfinite(vectors[i]).all():
                raise OutputError(f"{records.where(block[i])}: the vector is not finite; try another dtype")
        told = {"tokens": tokens, "words": counts.tokens, "unknown": counts.unknown, "cut": counts.cut}
        return vectors, told

    return run_records(records, output, prepare, process, **options)


def _replay(stream: Iterator[Record], records: Records, progress: Progress) -> None:
    """Reads past the records that the interrupted run had done, and checks that they are the same."""
    read = sum(1 for _, _ in zip(range(progress.records), stream, strict=False))
    if read < progress.records or records.digest() != progress.input_sha256:
        raise InputError(
            f"cannot go on: the first {progress.records} records are not those of the interrupted run; "
            "give the same input, or --restart to begin again"
        )
