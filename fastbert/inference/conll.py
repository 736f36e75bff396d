"""Sentences of CoNLL files: words, and their tags, in columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fastbert.inference.input_files import InputError, Row

_ID = re.compile(r"\d+(?:[-.]\d+)?")
_COMMENT = re.compile(r"#\s*\w[^\t]* = ")
_DOCUMENT = "-DOCSTART-"
_CONLLU_COLUMNS, _CONLLU_TAG = 10, 4  # the tag is UPOS, counted from 1
COLUMNS = ("words", "tags")  # of a row
_SUFFIXES = ".conll .conllu .conllup .iob .iob2 .bio .bioes .txt .tsv .train .dev .test .testa .testb"
SUFFIXES = dict.fromkeys(_SUFFIXES.split(), "conll")


def read_sentences(name: str, text: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """A row for each sentence, of its words and tags; sentences end at blank lines and at -DOCSTART-.

    If a line has tabs, only they separate columns, and a word may contain blanks. By default the word is the first
    column and the tag the last; where all lines have one column, there are no tags. If the first column of all lines
    is an id, as in CoNLL-U, the word is the second column, lines of a range (1-2) or an empty node (1.1) are left out,
    and with ten columns the tag is UPOS, the fourth.

    Args:
        name: the file's, for errors.
        columns: what a row calls COLUMNS; one that is a number is that of the file's column, from 1.

    Raises:
        InputError: a line has too few columns.
    """
    lines = [*text.split("\n"), ""]
    has_tabs = "\t" in text
    rows = [_columns(line, has_tabs) for line in lines]
    is_word = [bool(row) and row[0] != _DOCUMENT for row in rows]
    of_words = [row for row, is_one in zip(rows, is_word, strict=True) if is_one]
    has_ids = has_tabs and all(_ID.fullmatch(row[0]) and len(row) > 2 for row in of_words)
    has_tags = any(len(row) > 1 for row in of_words)
    names = tuple(columns or COLUMNS)
    word, tag = (int(column) if column.isdecimal() else None for column in names)
    word = word or (2 if has_ids else 1)
    sentence: list[tuple[str, str]] = []
    start = 1
    for number, row in enumerate(rows, start=1):
        if is_word[number - 1]:
            if has_tags and len(row) < 2:
                raise InputError(f"{name}:{number}: one column, {row[0]!r}; there must be a word and its tag")
            column = tag or (_CONLLU_TAG if has_ids and len(row) == _CONLLU_COLUMNS else len(row))
            if max(word, column) > len(row):
                raise InputError(f"{name}:{number}: {len(row)} columns; word and tag are columns {word} and {column}")
            if has_ids and not row[0].isdecimal():
                continue
            start = start if sentence else number
            sentence.append((row[word - 1], row[column - 1]))
        elif sentence and (not lines[number - 1].strip() or row):
            parts = (list(part) for part in zip(*sentence, strict=True))
            yield Row(start, dict(zip(names[: 1 + has_tags], parts, strict=False)))
            sentence = []


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
