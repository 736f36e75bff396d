"""The reader of text, jsonl, JSON, csv, tsv, parquet, CoNLL and SQuAD files, and the records that are made of them.

`read_rows` yields the rows of a file. Each row has its values by column, or a problem. An error of the file itself is
raised as InputError. The commands embed, predict, prepare and finetune all use it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fastbert.checkpoint.json_files import HALF_PAIR
from fastbert.inference.conll import read_sentences
from fastbert.inference.input_files import (
    FORMATS,
    STDIN,
    CsvRows,
    Form,
    InputError,
    Lines,
    RecordProblem,
    Row,
    Tally,
    compression_of,
    json_object,
    json_values,
    open_input,
    open_parquet,
    read_text,
    shown,
)
from fastbert.inference.squad import read_questions


def read_rows(
    name: str | Path,
    form: Form,
    kind: str,
    columns: Sequence[str] | None,
    *,
    tally: Tally | None = None,
    blank_rows: bool = False,
    groups: Sequence[int] | None = None,
) -> Iterator[Row]:
    """The rows of a file of any format, or of stdin for "-", in order; reading continues after a row with a problem.

    Args:
        kind: the file's format, one of FORMATS, "conll", "squad", or "questions": JSON, a list of rows or else SQuAD's.
        columns: the columns to read of a csv or parquet file: names, or in csv also numbers from 1; None for all. A
            line of a text file is the value of the first column; a JSON object keeps all its values. Of CoNLL, see
            conll.read_sentences; of SQuAD, what a row calls squad.COLUMNS.
        tally: counts and hashes the input.
        blank_rows: whether an empty line of a csv file is a row with a problem, or skipped.
        groups: row groups of a parquet file; None for all.

    Raises:
        InputError: a csv or parquet file lacks a column, or a file is of another format.
    """
    known = dict.fromkeys((*FORMATS, *_WHOLE))
    if kind not in known:
        raise InputError(f"{shown(name)}: the format is {kind!r}; it must be one of {', '.join(known)}")
    if kind in _WHOLE:
        yield from _WHOLE[kind](shown(name), _whole_text(name, tally), columns)
    elif kind == "parquet":
        yield from _parquet_rows(name, columns, tally, groups)
    else:
        with open_input(name) as stream:
            lines = Lines(stream, tally)
            if kind == "jsonl":
                yield from jsonl_rows(lines)
            elif kind == "text":
                assert columns is not None, "the line of a text file needs a name"
                column = columns[0]
                yield from _rows(lines, lambda: {column: next(lines).removesuffix("\n").removesuffix("\r")})
            else:
                yield from _csv_rows(name, lines, form, columns, blank_rows)


def _rows(lines: Lines, following: Callable[[], dict[str, Any] | None]) -> Iterator[Row]:
    """The rows that calls of `following` return until it raises StopIteration; None is skipped."""
    while True:
        line = lines.number + 1
        try:
            values = following()
        except RecordProblem as problem:
            yield Row(line, {}, str(problem))
        except StopIteration:
            return
        else:
            if values is not None:
                yield Row(line, values)


def _csv_rows(
    name: str | Path, lines: Lines, form: Form, columns: Sequence[str] | None, blank_rows: bool
) -> Iterator[Row]:
    rows = CsvRows(name, lines, form)
    if form.header and not lines.number:
        return iter(())  # an empty file
    if columns is None and not form.header:  # all, named by their numbers
        return _rows(lines, lambda: _numbered(next(rows), blank_rows))
    columns = rows.names if columns is None else columns
    places = [rows.column(column) for column in columns]

    def following() -> dict[str, Any] | None:
        if not (row := next(rows)):
            if blank_rows:
                raise RecordProblem("is empty")
            return None
        if max(places, default=0) >= len(row):
            raise RecordProblem(f"has {len(row)} fields; there is no field {max(places) + 1}")
        return {column: row[place] for column, place in zip(columns, places, strict=True)}

    return _rows(lines, following)


def _numbered(row: list[str], blank_rows: bool) -> dict[str, Any] | None:
    if not row and blank_rows:
        raise RecordProblem("is empty")
    return {str(number): cell for number, cell in enumerate(row, start=1)} or None


def jsonl_rows(lines: Lines) -> Iterator[Row]:
    """The rows of lines that each hold a JSON object."""

    def following() -> dict[str, Any]:
        if not (line := next(lines)).strip():
            raise RecordProblem("is empty")
        try:
            value = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            raise RecordProblem(f"is not JSON: {error}") from None
        return json_object(value, escapes=HALF_PAIR.search(line) is not None)

    return _rows(lines, following)


def _whole_text(name: str | Path, tally: Tally | None) -> str:
    text = read_text(name)
    if tally is not None:
        tally.digest.update(text.encode())
    return text


def _json_rows(name: str, text: str, columns: Sequence[str] | None) -> Iterator[Row]:
    escapes = HALF_PAIR.search(text) is not None
    for line, value in json_values(name, text):
        try:
            yield Row(line, json_object(value, escapes=escapes))
        except RecordProblem as problem:
            yield Row(line, {}, str(problem))


def _question_rows(name: str, text: str, columns: Sequence[str] | None) -> Iterator[Row]:
    return (_json_rows if text.lstrip().startswith("[") else read_questions)(name, text, columns)


# Formats that are read as a whole, by name of the file, text and columns.
_WHOLE = {"json": _json_rows, "conll": read_sentences, "squad": read_questions, "questions": _question_rows}


def text_of(row: Row, column: str, kind: str, *, allow_empty: bool = False) -> str:
    """The text in a column of a row; `kind` is the file's format. A null in a parquet file is an empty text.

    Raises:
        RecordProblem: the row or its text has a problem.
    """
    if row.problem is not None:
        raise RecordProblem(row.problem)
    if column not in row.values:
        raise RecordProblem(f"has no field {column!r}")
    text = row.values[column]
    if text is None and kind == "parquet":
        text = ""
    if not isinstance(text, str):
        raise RecordProblem(f"has a field {column!r} of type {type(text).__name__}, not a string")
    if not allow_empty and (not text or text.isspace()):
        raise RecordProblem("has an empty text")
    return text


def _parquet_rows(
    name: str | Path, columns: Sequence[str] | None, tally: Tally | None, groups: Sequence[int] | None
) -> Iterator[Row]:
    """Rows of row groups (all by default), with one batch in memory at a time."""
    with open_parquet(name, columns or ()) as file:
        batches = file.iter_batches(row_groups=groups, columns=columns, batch_size=1024)
        for number, values in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
            if tally is not None:
                tally.digest.update(repr(list(values.values())).encode())
            yield Row(number, values)


@dataclass(frozen=True)
class Record:
    """One text, or its problem."""

    file: int  # index of the input
    line: int  # its first line, or its row in a parquet file, from 1
    text: str
    problem: str | None = None
    id: str | int | None = None  # the value of the id column, if one is configured
    values: dict[str, Any] | None = None  # of all columns, where a command repeats them
    input: Any = None  # what is made of them for a task, where it is more than a text


@dataclass(frozen=True)
class Reading(Form):
    """How `fastbert embed` reads inputs.

    Args:
        field: field of a JSON object that holds the text.
        column: column of a csv or parquet file that holds the text: a name, or in csv a number from 1.
        allow_empty: whether a text may be empty or white space alone.
        id_column: column of a csv or parquet file, or field of a JSON object, that identifies a record.
    """

    field: str = "text"
    column: str = "text"
    allow_empty: bool = False
    id_column: str | None = None


class Records:
    """The records of several inputs, in order; iterate over it once.

    Args:
        inputs: paths, or "-" for stdin.
        reading: how to read them.

    Raises:
        InputError: on construction, a path is not a file, a suffix is unknown, or a parquet file lacks the column;
            while iterating, a csv file lacks the column, or a file's content does not match its suffix.
    """

    reading: Any  # a Form: of a subclass, of its own kind

    def __init__(self, inputs: Sequence[str], reading: Form | None = None) -> None:
        self.inputs, self.reading = list(inputs), reading or Reading()
        self._tally = Tally()
        self._digest_at_record = self._tally.digest.copy()
        self.total_bytes: int | None = 0  # None if an input has no size
        for name in self.inputs:
            path = Path(name)
            if name != STDIN and (path.is_dir() or not path.exists()):
                raise InputError(f"{name}: {'is a folder' if path.is_dir() else 'no such file'}")
            kind = self._kind(name)
            if kind == "parquet" and (name == STDIN or not path.is_file()):
                raise InputError(f"{shown(name)}: parquet is read from ordinary files alone")
            self._check(name, kind)
            if name == STDIN or not path.is_file() or compression_of(name) or kind == "parquet" or kind in _WHOLE:
                self.total_bytes = None
            elif self.total_bytes is not None:
                self.total_bytes += path.stat().st_size

    def _check(self, name: str, kind: str) -> None:
        """Raises InputError for a file that can be seen to lack a column before it is read."""
        if kind == "text" and self.reading.id_column is not None:
            raise InputError(f"{shown(name)}: a text file has no column {self.reading.id_column!r} of ids")
        if kind == "parquet":
            with open_parquet(name, self._columns(kind) or (), self._text(kind)):
                pass

    def _kind(self, name: str) -> str:
        """The format of an input."""
        return str(self.reading.format_of(name))

    def _text(self, kind: str) -> str:
        """The name of the text's column."""
        return self.reading.field if kind in ("json", "jsonl") else self.reading.column

    def _columns(self, kind: str) -> list[str] | None:
        """The columns to read; None for all."""
        text = self._text(kind)
        return list(dict.fromkeys([text, self.reading.id_column or text]))

    def _record(self, file: int, row: Row, kind: str) -> Record:
        """The content of a row.

        Raises:
            RecordProblem: the row, or what it should hold, has a problem.
        """
        text = text_of(row, self._text(kind), kind, allow_empty=self.reading.allow_empty)
        return Record(file, row.line, text, id=_id_of(row, self.reading.id_column))

    @property
    def bytes_read(self) -> int:
        return self._tally.bytes

    def digest(self) -> str:
        """A hash of all bytes up to the end of the last record."""
        return self._digest_at_record.hexdigest()

    def where(self, record: Record) -> str:
        """`file:line` of a record."""
        return f"{shown(self.inputs[record.file])}:{record.line}"

    def __iter__(self) -> Iterator[Record]:
        for index, name in enumerate(self.inputs):
            self._tally.digest.update(b"\0file\0")
            kind = self._kind(name)
            for row in read_rows(name, self.reading, kind, self._columns(kind), tally=self._tally, blank_rows=True):
                self._digest_at_record = self._tally.digest.copy()
                try:
                    yield self._record(index, row, kind)
                except RecordProblem as problem:
                    yield Record(index, row.line, "", str(problem))


def _id_of(row: Row, column: str | None) -> str | int | None:
    value = None if column is None else row.values.get(column)
    if column is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise RecordProblem(f"has {value!r} for an id in {column!r}, not a string or a whole number")
    return value
