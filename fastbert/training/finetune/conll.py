"""Reads sentences of CoNLL files, and converts their tags to BIO."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from fastbert.inference.input_files import InputError

_ID = re.compile(r"\d+(?:[-.]\d+)?")
_COMMENT = re.compile(r"#\s*\w[^\t]* = ")
_PREFIXED = re.compile(r"([A-Z])-(.+)")
_CONLLU_COLUMNS, _CONLLU_TAG = 10, 4  # the tag is UPOS, counted from 1
_TO_BIO = {"S": "B", "U": "B", "E": "I", "L": "I", "M": "I", "B": "B", "I": "I"}
_SCHEMES = ("BIES", "BILU", "BMES")  # in addition to O


def read_sentences(
    path: Path, text: str, word: int | None = None, tag: int | None = None
) -> Iterator[tuple[int, list[str], list[str]]]:
    """The first line, words and tags of each sentence; sentences end at blank lines and at -DOCSTART-.

    If a line has tabs, only they separate columns, and a word may contain blanks. By default the word is the first
    column and the tag the last. If the first column of all lines is an id, as in CoNLL-U, the word is the second
    column, lines of a range (1-2) or an empty node (1.1) are left out, and with ten columns the tag is UPOS, the
    fourth.

    Args:
        word, tag: columns, counted from 1, instead of the defaults.

    Raises:
        InputError: a line has too few columns.
    """
    lines = [*text.split("\n"), ""]
    has_tabs = "\t" in text
    rows = [_columns(line, has_tabs) for line in lines]
    has_ids = has_tabs and all(_ID.fullmatch(row[0]) and len(row) > 2 for row in rows if row and row[0] != "-DOCSTART-")
    word = word or (2 if has_ids else 1)
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, row in enumerate(rows, start=1):
        if row and row[0] != "-DOCSTART-":
            if len(row) < 2:
                raise InputError(f"{path}:{number}: one column, {row[0]!r}; there must be a word and its tag")
            column = tag or (_CONLLU_TAG if has_ids and len(row) == _CONLLU_COLUMNS else len(row))
            if max(word, column) > len(row):
                raise InputError(f"{path}:{number}: {len(row)} columns; word and tag are columns {word} and {column}")
            if has_ids and not row[0].isdecimal():
                continue
            start = start if words else number
            words.append(row[word - 1])
            tags.append(row[column - 1])
        elif words and (not lines[number - 1].strip() or row):
            yield start, words, tags
            words, tags = [], []


def _columns(line: str, has_tabs: bool) -> list[str]:
    """The columns of a line; none for a comment.

    In a file with tabs, a line that begins with # and has no tab is a comment. In a file without tabs, a comment also
    has an equals sign: `# O` is a word and its tag.
    """
    if line.startswith("#") and "\t" not in line and (has_tabs or _COMMENT.match(line)):
        return []
    if "\t" not in line.strip():
        return line.split()
    return [column.strip() for column in line.strip().split("\t")]


def to_bio(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """Converts the tags of a file's sentences to BIO; returns them unchanged if they follow no known scheme throughout.

    Known schemes are BIO, IOB1 (B- only between adjacent entities of a type), BIOES, BILOU, BMES, and plain types. With
    plain types, a run of a type is one entity if the file has O; otherwise, as for parts of speech, each word is one.
    """
    tags = {tag for sentence in sentences for tag in sentence}
    prefixed = {tag: found.groups() for tag in tags if (found := _PREFIXED.fullmatch(tag))}
    if not prefixed:
        return [_plain_to_bio(sentence, merge="O" in tags) for sentence in sentences]
    prefixes = {prefix for prefix, _ in prefixed.values()}
    if prefixed.keys() != tags - {"O"}:
        return [list(sentence) for sentence in sentences]
    if prefixes <= {"B", "I"}:
        if all(map(_is_iob1, sentences)) and not all(map(_is_bio, sentences)):
            return [_iob1_to_bio(sentence) for sentence in sentences]
    elif any(prefixes <= set(scheme) for scheme in _SCHEMES):
        return [[_TO_BIO[tag[0]] + tag[1:] if tag != "O" else tag for tag in sentence] for sentence in sentences]
    return [list(sentence) for sentence in sentences]


def _plain_to_bio(sentence: Sequence[str], *, merge: bool) -> list[str]:
    return [
        tag if tag == "O" else ("I-" if merge and tag == before else "B-") + tag
        for before, tag in pairwise(["O", *sentence])
    ]


def _is_bio(sentence: Sequence[str]) -> bool:
    return all(tag[0] != "I" or before[1:] == tag[1:] for before, tag in pairwise(["O", *sentence]))


def _is_iob1(sentence: Sequence[str]) -> bool:
    return all(tag[0] != "B" or before[1:] == tag[1:] for before, tag in pairwise(["O", *sentence]))


def _iob1_to_bio(sentence: Sequence[str]) -> list[str]:
    return [
        "B" + tag[1:] if tag[0] == "I" and before[1:] != tag[1:] else tag for before, tag in pairwise(["O", *sentence])
    ]
