"""Makes examples of tokenized documents: pairs of segments as in the BERT paper, or runs of sentences.

Segments are ranges of the documents' tokens; `assemble` copies the tokens once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np

from fastbert.training.shards import Examples

PAIR_SPECIALS, RUN_SPECIALS = 3, 2  # [CLS] a [SEP] b [SEP] and [CLS] a [SEP]
LEAST_LENGTH = PAIR_SPECIALS + 2


class TokenizedDocuments(NamedTuple):
    """Concatenated documents: sentence s is tokens[sentences[s] : sentences[s + 1]], none is empty."""

    tokens: np.ndarray  # (T,)
    sentences: list[int]  # (S+1,) offsets into tokens
    documents: list[int]  # (D+1,) offsets into sentences


class Segments(NamedTuple):
    """One example: tokens [start, stop) and, for a pair, [second_start, second_stop)."""

    start: int
    stop: int
    second_start: int = 0
    second_stop: int = 0
    label: int = 0  # 1: the second segment is from another document


def pairs(documents: TokenizedDocuments, max_length: int, short_seq_prob: float, rng: Random) -> Iterator[Segments]:
    """Pairs for next-sentence prediction, by the rules of BERT's create_pretraining_data.

    Sentences of a document are collected until they reach max_length minus three special tokens, and split in two at
    a random sentence. With probability `short_seq_prob`, a document uses a random shorter length throughout. In half
    of the cases, and if there is one sentence only, the second segment comes from a random place of another document;
    the sentences it replaces are used again. A pair that is too long loses tokens of its longer segment, each at
    random from the front or the back.

    Raises:
        ValueError: there is only one document.
    """
    offsets, firsts = documents.sentences, documents.documents
    count, room = len(firsts) - 1, max_length - PAIR_SPECIALS
    if count == 1:
        raise ValueError("one document alone, and pairs take half of their second segments from another")
    below = lambda n: int(rng.random() * n)  # noqa: E731  (the one draw that no version of Python changes)
    for document in range(count):
        start, last = firsts[document], firsts[document + 1]
        target = 2 + below(room - 1) if rng.random() < short_seq_prob else room
        end = start
        while start < last:
            end += 1
            if end < last and offsets[end] - offsets[start] < target:
                continue
            middle = start + 1 + below(end - start - 1)
            if end - start > 1 and rng.random() >= 0.5:
                second, label = (middle, end), 0
            else:
                other = below(count - 1)
                other += other >= document
                second, label = _from_other(documents, other, target - (offsets[middle] - offsets[start]), below), 1
                end = middle
            a = [offsets[start], offsets[middle]]
            b = [offsets[second[0]], offsets[second[1]]]
            _truncate(a, b, room, rng)
            yield Segments(a[0], a[1], b[0], b[1], label)
            start = end


def _from_other(documents: TokenizedDocuments, other: int, length: int, below: Callable[[int], int]) -> tuple[int, int]:
    """The range of sentences of a document from a random one on that reaches a length, or the document's end."""
    first, last = documents.documents[other], documents.documents[other + 1]
    start = first + below(last - first)
    end = start + 1
    while end < last and documents.sentences[end] - documents.sentences[start] < length:
        end += 1
    return start, end


def _truncate(a: list[int], b: list[int], room: int, rng: Random) -> None:
    while (a[1] - a[0]) + (b[1] - b[0]) > room:
        longer = a if a[1] - a[0] > b[1] - b[0] else b
        if rng.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1


def runs(documents: TokenizedDocuments, max_length: int, short_seq_prob: float, rng: Random) -> Iterator[Segments]:
    """Runs of whole sentences of one document, as long as max_length allows: RoBERTa's DOC-SENTENCES.

    RoBERTa found them slightly better than runs across documents, and used the latter only to fill padded batches
    evenly. Packed batches are full anyway. A sentence longer than a run is cut. With probability `short_seq_prob`,
    all runs of a document have at most a random length.
    """
    offsets, firsts = documents.sentences, documents.documents
    room = max_length - RUN_SPECIALS
    for first, last in pairwise(firsts):
        most = 2 + int(rng.random() * (room - 1)) if rng.random() < short_seq_prob else room
        start, end = offsets[first], offsets[last]
        while start < end:
            stop = end
            if start + most < end:
                stop = offsets[bisect_right(offsets, start + most, first, last + 1) - 1]
                stop = stop if stop > start else start + most
            yield Segments(start, stop)
            start = stop


def assemble(documents: TokenizedDocuments, segments: Iterable[Segments], cls: int, sep: int) -> Examples:
    """Copies the segments' tokens from the documents and adds the special tokens."""
    rows = list(segments)
    source, dtype = documents.tokens, documents.tokens.dtype
    head, tail = np.array([cls], dtype), np.array([sep], dtype)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    seconds: list[int] = []
    for row in rows:
        parts += (head, source[row.start : row.stop], tail)
        first = row.stop - row.start + 2
        seconds.append(first)
        if row.second_stop:
            parts += (source[row.second_start : row.second_stop], tail)
            first += row.second_stop - row.second_start + 1
        lengths.append(first)
    return Examples(
        tokens=np.concatenate(parts) if parts else source[:0],
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        seconds=np.array(seconds, dtype=np.int32),
        labels=np.array([row.label for row in rows], dtype=np.uint8),
    )
