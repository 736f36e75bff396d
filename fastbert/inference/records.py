"""Texts from text, jsonl and csv files, one record at a time: where each stands, or what is wrong with it.

Lines end at a line feed (a carriage return before it goes too) and nowhere else, so that their numbers are
those an editor and `sed -n` show. Files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

STDIN = "-"
FORMATS = ("text", "jsonl", "csv")
MAX_LINE = 1 << 24  # bytes of a line, characters of a csv field: what one record may cost in memory
_BY_SUFFIX = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}


class InputError(ValueError):
    """An input that cannot be read at all, or a bad line where those are fatal; names file and line."""


@dataclass(frozen=True)
class Record:
    """One text, or the problem there is in its place."""

    file: int  # index of the input
    line: int  # the one it begins on, counted from 1
    text: str
    problem: str | None = None


@dataclass(frozen=True)
class Reading:
    """How inputs are read.

    Args:
        format: "text", "jsonl", "csv", or "auto": by the file's suffix, text for stdin.
        field: of a JSON object, its text.
        column: of a csv file, its text: a name in the header line, or a number counted from 1.
        header: whether the first line of a csv file names the columns.
        delimiter: between csv fields; None is a tab for .tsv and a comma for others.
        quoted: whether csv fields may stand in double quotes.
        allow_empty: whether a text of white space alone is a text.
    """

    format: str = "auto"
    field: str = "text"
    column: str = "text"
    header: bool = True
    delimiter: str | None = None
    quoted: bool = True
    allow_empty: bool = False


class RecordProblem(Exception):
    """What is wrong with one record."""


def format_by_suffix(path: str | Path, formats: dict[str, str]) -> str:
    """The format that `formats` has for a file's suffix; "text" for a name without one, such as a pipe's.

    Raises:
        InputError: the suffix is none of them.
    """
    suffix = Path(path).suffix.lower()
    if not suffix:
        return "text"
    if suffix not in formats:
        raise InputError(
            f"{path}: the suffix {suffix!r} is none of {', '.join(formats)}; name the format with --input-format"
        )
    return formats[suffix]


class _Lines:
    """The lines of a stream as text, counted and hashed; a bad one raises, the next call goes on after it."""

    def __init__(self, stream: BinaryIO, digest: Any) -> None:
        self.number, self.bytes = 0, 0
        self._stream, self._digest = stream, digest

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._read()
        if not raw:
            raise StopIteration
        self.number += 1
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = self._read()
            raise RecordProblem(f"is longer than {MAX_LINE >> 20} MiB")
        if self.number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordProblem(f"is not UTF-8 (byte {raw[error.start]:#04x} at byte {error.start + 1})") from None

    def _read(self) -> bytes:
        raw = self._stream.readline(MAX_LINE + 1)
        self.bytes += len(raw)
        self._digest.update(raw)
        return raw


class Records:
    """The records of several inputs, in order; iterate over it once.

    Args:
        inputs: paths, or "-" for stdin.
        reading: how to read them.

    Raises:
        InputError: while iterating, a csv file without the column; on construction, a path that is no file.
    """

    def __init__(self, inputs: Sequence[str], reading: Reading | None = None) -> None:
        self.inputs, self.reading = list(inputs), reading or Reading()
        self._digest = hashlib.sha256()
        self._digest_at_record = self._digest.copy()
        self._bytes_before, self._lines = 0, None
        self.total_bytes: int | None = 0  # None where an input has no size
        for name in self.inputs:
            path = Path(name)
            if name != STDIN and self.reading.format == "auto" and not path.is_dir():
                format_by_suffix(name, _BY_SUFFIX)
            if name == STDIN:
                self.total_bytes = None
            elif path.is_dir() or not path.exists():
                raise InputError(f"{name}: {'is a folder' if path.is_dir() else 'no such file'}")
            elif self.total_bytes is not None:
                self.total_bytes = self.total_bytes + path.stat().st_size if path.is_file() else None

    @property
    def bytes_read(self) -> int:
        return self._bytes_before + (self._lines.bytes if self._lines else 0)

    def digest(self) -> str:
        """A hash of all bytes up to the end of the record that came last."""
        return self._digest_at_record.hexdigest()

    def where(self, record: Record) -> str:
        """`file:line` of a record."""
        return f"{_shown(self.inputs[record.file])}:{record.line}"

    def __iter__(self) -> Iterator[Record]:
        for index, name in enumerate(self.inputs):
            self._digest.update(b"\0file\0")
            with _open(name) as stream:
                self._lines = lines = _Lines(stream, self._digest)
                for record in self._records(index, name, lines):
                    self._digest_at_record = self._digest.copy()
                    yield record
            self._bytes_before, self._lines = self.bytes_read, None

    def _records(self, index: int, name: str, lines: _Lines) -> Iterator[Record]:
        suffix = "" if name == STDIN else Path(name).suffix.lower()
        kind = self.reading.format
        if kind == "auto":
            kind = "text" if name == STDIN else format_by_suffix(name, _BY_SUFFIX)
        if kind == "csv":
            next_text = self._csv(name, lines, "\t" if suffix == ".tsv" else ",")
        elif kind == "jsonl":
            next_text = lambda: json_text(next(lines), self.reading.field)  # noqa: E731
        else:
            next_text = lambda: next(lines).removesuffix("\n").removesuffix("\r")  # noqa: E731
        while True:
            line = lines.number + 1
            try:
                text = next_text()
                if not self.reading.allow_empty and (not text or text.isspace()):
                    raise RecordProblem("has an empty text")
                yield Record(index, line, text)
            except RecordProblem as problem:
                yield Record(index, line, "", str(problem))
            except StopIteration:
                return

    def _csv(self, name: str, lines: _Lines, delimiter: str) -> Callable[[], str]:
        csv.field_size_limit(MAX_LINE)
        rows = csv.reader(
            lines,
            delimiter=self.reading.delimiter or delimiter,
            quoting=csv.QUOTE_MINIMAL if self.reading.quoted else csv.QUOTE_NONE,
            strict=True,
        )
        names: list[str] = []
        if self.reading.header:
            try:
                names = next(rows)
            except StopIteration:
                return lambda: next(lines)
            except (RecordProblem, csv.Error) as error:
                raise InputError(f"{_shown(name)}:1: cannot read the header line: {error}") from None
        column = self._column(name, names)

        def next_text() -> str:
            try:
                row = next(rows)
            except csv.Error as error:
                raise RecordProblem(f"is no csv: {error}") from None
            if not row:
                raise RecordProblem("is empty")
            if column >= len(row):
                raise RecordProblem(f"has {len(row)} fields; the text is field {column + 1}")
            return row[column]

        return next_text

    def _column(self, name: str, names: list[str]) -> int:
        wanted = self.reading.column
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) > 0 and (not names or int(wanted) <= len(names)):
            return int(wanted) - 1
        if not self.reading.header:
            raise InputError(f"{_shown(name)}: without a header line, the column is a number from 1, not {wanted!r}")
        raise InputError(f"{_shown(name)}:1: no column {wanted!r}; there are {', '.join(map(repr, names))}")


def json_text(line: str, field: str) -> str:
    if not line.strip():
        raise RecordProblem("is empty")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordProblem(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecordProblem(f"holds a JSON {type(value).__name__}, not an object")
    if field not in value:
        raise RecordProblem(f"has no field {field!r}")
    text = value[field]
    if not isinstance(text, str):
        raise RecordProblem(f"has a field {field!r} of type {type(text).__name__}, not a string")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise RecordProblem(f"has half a surrogate pair in field {field!r}")
    return text


def _shown(name: str) -> str:
    return "<stdin>" if name == STDIN else name


@contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    if name == STDIN:
        yield sys.stdin.buffer
        return
    with open(name, "rb", buffering=1 << 20) as file:
        yield file
