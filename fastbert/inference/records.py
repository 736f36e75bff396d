"""Texts from text, jsonl, JSON, csv and parquet files, one record at a time: its text, or the problem there is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.inference.input_files import (
    STDIN,
    CsvRows,
    InputError,
    Lines,
    RecordProblem,
    check_text_column,
    compression_of,
    format_by_suffix,
    json_value,
    json_values,
    open_input,
    open_parquet,
    parquet_rows,
    read_text,
    shown,
    text_of,
)

FORMATS = ("text", "jsonl", "json", "csv", "parquet")
SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Record:
    """One text, or the problem there is in its place."""

    file: int  # index of the input
    line: int  # the one it begins on, or the row of a parquet file, counted from 1
    text: str
    problem: str | None = None
    id: str | int | None = None  # the value of the id column, if one was asked for


@dataclass(frozen=True)
class Reading:
    """How inputs are read.

    Args:
        format: one of FORMATS, or "auto": by the file's suffix, text for stdin.
        field: of a JSON object, its text.
        column: of a csv or parquet file, its text: a name, or, of csv, a number counted from 1.
        header: whether the first line of a csv file names the columns.
        delimiter: between csv fields; None is a tab for .tsv and a comma for others.
        quoted: whether csv fields may stand in double quotes; None: not in a .tsv.
        allow_empty: whether a text of white space alone is a text.
        id_column: of a csv or parquet file, or the field of a JSON object, what identifies a record.
    """

    format: str = "auto"
    field: str = "text"
    column: str = "text"
    header: bool = True
    delimiter: str | None = None
    quoted: bool | None = None
    allow_empty: bool = False
    id_column: str | None = None


class Records:
    """The records of several inputs, in order; iterate over it once.

    Args:
        inputs: paths, or "-" for stdin.
        reading: how to read them.

    Raises:
        InputError: on construction, a path that is no file, an unknown suffix, a parquet file without the column;
            while iterating, a csv file without it, or a file that holds something else than its suffix stands for.
    """

    def __init__(self, inputs: Sequence[str], reading: Reading | None = None) -> None:
        self.inputs, self.reading = list(inputs), reading or Reading()
        self._digest = hashlib.sha256()
        self._digest_at_record = self._digest.copy()
        self._bytes_before = 0
        self._lines: Lines | None = None
        self.total_bytes: int | None = 0  # None where an input has no size
        for name in self.inputs:
            path = Path(name)
            if name == STDIN:
                self.total_bytes = None
            elif path.is_dir() or not path.exists():
                raise InputError(f"{name}: {'is a folder' if path.is_dir() else 'no such file'}")
            elif not path.is_file() or compression_of(name) or self._format(name) in ("json", "parquet"):
                self.total_bytes = None
            elif self.total_bytes is not None:
                self.total_bytes += path.stat().st_size
            if self._format(name) == "text" and self.reading.id_column is not None:
                raise InputError(f"{shown(name)}: a text file has no column {self.reading.id_column!r} of ids")
            if self._format(name) == "parquet":
                if name == STDIN or not path.is_file():
                    raise InputError(f"{shown(name)}: parquet is read from ordinary files alone")
                with open_parquet(name) as file:
                    check_text_column(name, file, self.reading.column)
                    if self.reading.id_column not in (None, *file.schema_arrow.names):
                        raise InputError(f"{name}: no column {self.reading.id_column!r} of ids")

    def _format(self, name: str) -> str:
        if self.reading.format != "auto":
            return self.reading.format
        return "text" if name == STDIN else format_by_suffix(name, SUFFIXES)

    @property
    def bytes_read(self) -> int:
        return self._bytes_before + (self._lines.bytes if self._lines else 0)

    def digest(self) -> str:
        """A hash of all bytes up to the end of the record that came last."""
        return self._digest_at_record.hexdigest()

    def where(self, record: Record) -> str:
        """`file:line` of a record."""
        return f"{shown(self.inputs[record.file])}:{record.line}"

    def __iter__(self) -> Iterator[Record]:
        for index, name in enumerate(self.inputs):
            self._digest.update(b"\0file\0")
            read = {"parquet": self._parquet, "json": self._json}.get(self._format(name), self._by_lines)
            for record in read(index, name):
                self._digest_at_record = self._digest.copy()
                yield record

    def _by_lines(self, index: int, name: str) -> Iterator[Record]:
        with open_input(name) as stream:
            self._lines = lines = Lines(stream, self._digest)
            next_text = self._next_text(name, lines)  # returns a text and its id
            while True:
                line = lines.number + 1
                try:
                    yield self._record(index, line, *next_text())
                except RecordProblem as problem:
                    yield Record(index, line, "", str(problem))
                except StopIteration:
                    break
        self._bytes_before, self._lines = self.bytes_read, None

    def _next_text(self, name: str, lines: Lines) -> Callable[[], tuple[str, str | int | None]]:
        kind, reading = self._format(name), self.reading
        if kind == "jsonl":
            return lambda: self._json_text_and_id(json_value(next(lines)))
        if kind == "text":
            return lambda: (next(lines).removesuffix("\n").removesuffix("\r"), None)
        rows = CsvRows(name, lines, header=reading.header, delimiter=reading.delimiter, quoted=reading.quoted)
        if reading.header and not rows.names:
            return lambda: (next(lines), None)  # an empty file
        column = rows.column(reading.column)
        id_column = None if reading.id_column is None else rows.column(reading.id_column)

        def next_text() -> tuple[str, str | None]:
            if not (row := next(rows)):
                raise RecordProblem("is empty")
            if max(column, id_column or 0) >= len(row):
                raise RecordProblem(f"has {len(row)} fields; text or id is field {max(column, id_column or 0) + 1}")
            return row[column], None if id_column is None else row[id_column]

        return next_text

    def _json(self, index: int, name: str) -> Iterator[Record]:
        text = read_text(name)
        self._digest.update(text.encode())
        for line, value in json_values(shown(name), text):
            try:
                yield self._record(index, line, *self._json_text_and_id(value))
            except RecordProblem as problem:
                yield Record(index, line, "", str(problem))

    def _json_text_and_id(self, value: Any) -> tuple[str, str | int | None]:
        text, name = text_of(value, self.reading.field), self.reading.id_column
        return text, None if name is None else _checked_id(value.get(name), name)

    def _parquet(self, index: int, name: str) -> Iterator[Record]:
        column, id_column = self.reading.column, self.reading.id_column
        columns = [column] if id_column is None else list(dict.fromkeys([column, id_column]))
        with open_parquet(name) as file:
            for number, row in enumerate(parquet_rows(file, columns), start=1):
                text = row[column] or ""
                self._digest.update(text.encode() + b"\0")
                try:
                    id = None if id_column is None else _checked_id(row[id_column], id_column)
                    self._digest.update(repr(id).encode())
                    yield self._record(index, number, text, id)
                except RecordProblem as problem:
                    yield Record(index, number, "", str(problem))

    def _record(self, index: int, line: int, text: str, id: str | int | None) -> Record:
        if not self.reading.allow_empty and (not text or text.isspace()):
            raise RecordProblem("has an empty text")
        return Record(index, line, text, id=id)


def _checked_id(value: Any, name: str) -> str | int:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RecordProblem(f"has {value!r} for an id in {name!r}, not a string or a whole number")
    if isinstance(value, str):
        text_of({name: value}, name)  # half a surrogate pair cannot be written
    return value
