"""The runs behind `fastbert embed` and `fastbert predict`: records window by window, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fastbert.inference.batching import WINDOW, blocks
from fastbert.inference.embed import Embedder, TokenCounts
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
    process: Callable[[list[Record]], tuple[Any, dict[str, int]]],
    *,
    window: int = WINDOW,
    skip_bad: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Progress:
    """Processes all records, resuming where `output` was interrupted; returns the progress of all runs together.

    Windows start at the same records as in an uninterrupted run. Batches, and so the last bits of what is computed,
    are then the same.

    Args:
        process: from a window's records, bad ones among them, to what `output` appends for them, and numbers to add to
            the fields of Progress.
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
    for block in windows(stream, window):
        bad = [record for record in block if record.problem is not None]
        for record in bad:
            if not skip_bad:
                raise InputError(f"{records.where(record)} {record.problem}")
            report(f"{records.where(record)} {record.problem}: skipped")
        made, counts = process(block)
        for name, number in {"records": len(block), "skipped": len(bad), **counts}.items():
            setattr(progress, name, getattr(progress, name) + number)
        progress.input_sha256 = records.digest()
        output.append(block, made, progress)
    output.finish(progress)
    return progress


def embed_records(
    embedder: Embedder,
    records: Records,
    output: FileOutput | StreamOutput,
    *,
    max_tokens: int,
    prompt: str = "",
    advance: Callable[[int], None] = lambda tokens: None,
    **options: Any,
) -> Progress:
    """Embeds all records: see run_records, which takes the `options`.

    Args:
        prompt: put before each text.
        advance: called with the number of tokens of each batch.

    Raises:
        OutputError: a vector is not finite.
    """

    def process(block: list[Record]) -> tuple[np.ndarray, dict[str, int]]:
        good = [i for i, record in enumerate(block) if record.problem is None]
        counts, tokens = TokenCounts(), 0

        def count(_: int, batch: int) -> None:
            nonlocal tokens
            tokens += batch
            advance(batch)

        vectors = np.full((len(block), embedder.width), np.nan, dtype=np.float32)
        texts = [block[i].text for i in good]
        vectors[good] = embedder.embed(texts, prompt=prompt, max_tokens=max_tokens, progress=count, counts=counts)
        for i in good:
            if not np.isfinite(vectors[i]).all():
                raise OutputError(f"{records.where(block[i])}: the vector is not finite; try another dtype")
        told = {"tokens": tokens, "words": counts.tokens, "unknown": counts.unknown, "cut": counts.cut}
        return vectors, told

    return run_records(records, output, process, **options)


def _replay(stream: Iterator[Record], records: Records, progress: Progress) -> None:
    """Reads past the records that the interrupted run had done, and checks that they are the same."""
    read = sum(1 for _, _ in zip(range(progress.records), stream, strict=False))
    if read < progress.records or records.digest() != progress.input_sha256:
        raise InputError(
            f"cannot go on: the first {progress.records} records are not those of the interrupted run; "
            "give the same input, or --restart to begin again"
        )
