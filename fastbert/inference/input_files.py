"""Readers of compressed files, lines, csv rows, JSON lists and parquet, on which `records.read_rows` is built.

A file's format follows from its suffix, without that of a compression: `reviews.csv.gz` is csv. Files are UTF-8, with
or without a byte order mark. A file whose content does not match its suffix is refused. Lines end at a line feed only
(a carriage return before it is removed), so that line numbers are those an editor shows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

STDIN = "-"
FORMATS = ("text", "jsonl", "json", "csv", "parquet")
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SUFFIXES = {".txt": "text", ".md": "text", **ROWS}
MAX_LINE = 1 << 24  # bytes of a line, characters of a csv field: bounds the memory of one record
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
PEEK = 1 << 16  # leading bytes by which a file's kind is detected
_BUFFER = 1 << 20
_FOREIGN = {
    b"\x1f\x8b": "gzip data (suffix .gz)",
    b"\xfd7zXZ\x00": "xz data (suffix .xz)",
    b"\x28\xb5\x2f\xfd": "zstd data (suffix .zst)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh91AY&SY": "bzip2 data; unpack it",
    b"PAR1": "a parquet file (suffix .parquet)",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}
_DELIMITER_NAMES = {"\t": "tabs", ";": "semicolons", "|": "vertical bars", ",": "commas"}
_WRITTEN_IN_QUOTES = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


class InputError(ValueError):
    """An input that cannot be read, or a bad line where bad lines are fatal; names file and line."""


class RecordProblem(Exception):
    """A problem of one record. The reader that raises it continues with the next record."""


class Row(NamedTuple):
    """One record of a file: its values by column, or its problem."""

    line: int  # its first line, or its row in a parquet file, from 1
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Form:
    """How files are read.

    Args:
        format: one of FORMATS, or "auto": by the file's suffix, text for stdin.
        header: whether the first line of a csv file names the columns.
        delimiter: between csv fields; None is a tab for .tsv and a comma for others.
        quoted: whether csv fields may stand in double quotes; None: not in a .tsv.

    Raises:
        ValueError: a delimiter that is not one character, or is a quote or a line end.
    """

    format: str = "auto"
    header: bool = True
    delimiter: str | None = None
    quoted: bool | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ValueError(f"delimiter is {self.delimiter!r}; it must be one character, no quote or line end")

    @classmethod
    def of(cls, arguments: object) -> Self:
        """Takes the fields from attributes of the same names; a missing or None attribute leaves the default."""
        values = {field.name: getattr(arguments, field.name, None) for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def format_of(self, path: str | Path, formats: Mapping[str, str] = SUFFIXES, option: str = "--input-format") -> str:
        """The format of a file: the configured one, or with "auto" that of its suffix (see format_by_suffix)."""
        if self.format != "auto":
            return self.format
        return "text" if str(path) == STDIN else format_by_suffix(path, formats, option)


class Tally:
    """The number of bytes read of line-based inputs, and a hash of everything that rows were read from."""

    def __init__(self) -> None:
        self.bytes, self.digest = 0, hashlib.sha256()

    def add(self, raw: bytes) -> None:
        self.bytes += len(raw)
        self.digest.update(raw)


def suffix_of(path: str | Path) -> str:
    """The suffix that names a file's format, in lower case, without the suffix of its compression."""
    path = Path(path)
    return Path(path.stem if compression_of(path) else path.name).suffix.lower()


def compression_of(path: str | Path) -> str | None:
    return COMPRESSIONS.get(Path(path).suffix.lower())


def format_by_suffix(path: str | Path, formats: Mapping[str, str], option: str = "--input-format") -> str:
    """The format of a file's suffix in `formats`; "text" for a name without a suffix, such as a pipe's.

    Raises:
        InputError: the suffix is not in `formats`.
    """
    suffix = suffix_of(path)
    if not suffix and "text" in formats.values():
        return "text"
    if suffix not in formats:
        raise InputError(
            f"{path}: the suffix {suffix!r} is none of {', '.join(formats)} (or one of these and "
            f"{', '.join(COMPRESSIONS)}); name the format with {option}"
        )
    return formats[suffix]


def shown(name: str | Path) -> str:
    return "<stdin>" if str(name) == STDIN else str(name)


class _Decompressed(io.RawIOBase):
    """A decompressor's stream whose errors name the file."""

    def __init__(self, name: str, kind: str) -> None:
        self._name, self._kind = name, kind
        try:
            self._stream = self._open()
        except OSError as error:
            raise InputError(f"{name}: {error.strerror or error}") from None

    def _open(self) -> Any:
        if self._kind == "gzip":
            return gzip.open(self._name)
        if self._kind == "xz":
            return lzma.open(self._name)
        try:
            import pyarrow as pa
        except ModuleNotFoundError:
            raise InputError(f"{self._name}: reading zstd needs pyarrow: pip install pyarrow") from None
        return pa.CompressedInputStream(pa.OSFile(self._name), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{self._name} is damaged or no {self._kind} file: {error}") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stream"):
            self._stream.close()
        super().close()


@contextmanager
def open_input(name: str | Path) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of a file, or of stdin for "-", after a check that they look like text.

    Raises:
        InputError: it starts like a file of another kind, or its lines end in carriage returns alone.
    """
    name = str(name)
    if name == STDIN:
        stream: Any = sys.stdin.buffer
        if not hasattr(stream, "peek"):
            stream = io.BufferedReader(stream)
        _refuse_foreign(name, stream.peek(PEEK)[:PEEK])
        yield stream
        return
    kind = compression_of(name)
    with io.BufferedReader(_Decompressed(name, kind) if kind else io.FileIO(name), _BUFFER) as stream:
        _refuse_foreign(name, stream.peek(PEEK)[:PEEK])
        yield stream


def _refuse_foreign(name: str, head: bytes) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError(f"{shown(name)} holds {what}")
    if len(head) > 3 and any(head[i::2].count(0) > 0.4 * len(head) for i in (0, 1)):
        raise InputError(f"{shown(name)} holds UTF-16 text; convert it to UTF-8")
    if b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        raise InputError(f"{shown(name)} has lines that end in carriage returns alone; convert them to line feeds")


class Lines:
    """Iterates over the lines of a stream as text, line ends included, and counts them.

    A bad line raises RecordProblem; the next call continues with the next line.

    Args:
        tally: the bytes of each line are added to it.
        first: whether the stream starts at the start of its file, where there may be a byte order mark.
    """

    def __init__(self, stream: BinaryIO, tally: Tally | None = None, *, first: bool = True) -> None:
        self.number = 0
        self.head = stream.peek(PEEK)[:PEEK] if hasattr(stream, "peek") else b""
        self._stream, self._tally, self._first = stream, tally, first

    def __iter__(self) -> Lines:
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
        if self.number == 1 and self._first:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordProblem(f"is not UTF-8 (byte {raw[error.start]:#04x} at byte {error.start + 1})") from None

    def _read(self) -> bytes:
        raw = self._stream.readline(MAX_LINE + 1)
        if self._tally is not None:
            self._tally.add(raw)
        return raw


def read_text(path: str | Path) -> str:
    """All of a file's text; its lines end in line feeds."""
    with open_input(path) as stream:
        raw = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8 (byte {raw[error.start]:#04x})") from None


class CsvRows:
    """The rows of a csv file: lists of fields, empty for an empty line. After a RecordProblem, the next call continues.

    In a .tsv, quotes are ordinary characters unless `quoted` is set; in other files, fields may be quoted.

    Args:
        name: the file's name, for errors.
        lines: the file's lines, from the first on.
        form: its header, delimiter and quoted apply.

    Raises:
        InputError: the header line cannot be read or names a column twice; a .tsv that was written with quotes.
    """

    def __init__(self, name: str | Path, lines: Lines, form: Form) -> None:
        csv.field_size_limit(MAX_LINE)
        self.names: list[str] = []  # column names; empty without a header line
        self._shown, self._lines = shown(name), lines
        is_tsv = suffix_of(name) == ".tsv"
        self._delimiter = form.delimiter or ("\t" if is_tsv else ",")
        self._quotes_unsaid = is_tsv and form.quoted is None
        if self._quotes_unsaid:
            self._refuse_quotes(lines.head)
        none = self._quotes_unsaid or form.quoted is False
        quoting: Literal[0, 3] = csv.QUOTE_NONE if none else csv.QUOTE_MINIMAL
        self._rows = csv.reader(lines, delimiter=self._delimiter, quoting=quoting, strict=True)
        if form.header:
            self._read_names()

    def _read_names(self) -> None:
        try:
            self.names = [name.strip() for name in next(self._rows, [])]
        except (RecordProblem, csv.Error) as error:
            raise InputError(f"{self._shown}:1: cannot read the header line: {error}") from None
        if self._lines.number and not any(self.names):
            raise InputError(f"{self._shown}:1: the header line names no column; if it is none, give --no-header")
        if twice := [name for name in self.names if name and self.names.count(name) > 1]:
            raise InputError(
                f"{self._shown}:1: the header line names {twice[0]!r} twice; if it names no columns, give --no-header"
            )

    def __next__(self) -> list[str]:
        try:
            row = next(self._rows)
        except csv.Error as error:
            raise RecordProblem(f"is no csv: {error}") from None
        if row and self.names and len(row) != len(self.names):
            quotes = self._quotes_unsaid and any('"' in field for field in row)
            hint = "; if fields stand in quotes, give --quoted" if quotes else ""
            raise RecordProblem(f"has {len(row)} fields; the header line names {len(self.names)}{hint}")
        return row

    def column(self, wanted: str) -> int:
        """The index of a column, given by its name or by its number from 1; a name has precedence.

        Raises:
            InputError: there is no such column.
        """
        if wanted in self.names:
            return self.names.index(wanted)
        is_number = wanted.isdecimal() and int(wanted) > 0
        if not self.names:
            if is_number:
                return int(wanted) - 1
            raise InputError(f"{self._shown}: without a header line, the column is a number from 1, not {wanted!r}")
        if is_number and int(wanted) <= len(self.names) and not self._other_delimiter():
            return int(wanted) - 1
        raise InputError(f"{self._shown}:1: {self._missing(wanted)}")

    def _missing(self, column: str) -> str:
        """The message for a column that is not in the header line, with the option that may help."""
        message = no_column(column, self.names)
        if other := self._other_delimiter():
            shell = {"\t": r"'\t'"}.get(other, f"'{other}'")
            return f"{message}; the line looks separated by {_DELIMITER_NAMES[other]}: give --delimiter {shell}"
        return f"{message}; if line 1 names no columns, give --no-header and the column's number"

    def _other_delimiter(self) -> str | None:
        if len(self.names) != 1:
            return None
        return next((other for other in _DELIMITER_NAMES if other in self.names[0]), None)

    def _refuse_quotes(self, head: bytes) -> None:
        """Refuses a .tsv whose first lines were written with fields in quotes."""
        lines = list(io.StringIO(head.decode("utf-8-sig", "ignore")))
        if len(lines) > 1 and not lines[-1].endswith("\n"):
            lines.pop()  # it may continue after `head`
        plain, _ = self._sample(lines, csv.QUOTE_NONE)
        quoted, error = self._sample(lines, csv.QUOTE_MINIMAL)
        fits = not error or ("unexpected end of data" in error and len(quoted) > 1)
        widths = {len(row) for row in quoted}
        in_quotes = lambda field: len(field) > 1 and field[0] == field[-1] == '"'  # noqa: E731
        header_in_quotes = bool(plain) and all(map(in_quotes, plain[0]))
        rows_merge = fits and len(widths) == 1 and {len(row) for row in plain} != widths
        doubled = fits and any(_WRITTEN_IN_QUOTES.fullmatch(field) for row in plain for field in row)
        if header_in_quotes or rows_merge or doubled:
            raise InputError(
                f"{self._shown} looks written with fields in quotes: give --quoted, or --unquoted to read quotes as "
                "characters of the text"
            )

    def _sample(self, lines: list[str], quoting: Literal[0, 3]) -> tuple[list[list[str]], str]:
        """The rows of some lines up to the first error, and that error, if there is one."""
        rows: list[list[str]] = []
        try:
            rows.extend(
                row for row in csv.reader(lines, delimiter=self._delimiter, quoting=quoting, strict=True) if row
            )
        except csv.Error as error:
            return rows, str(error)
        return rows, ""


def json_values(path: str | Path, text: str) -> Iterator[tuple[int, Any]]:
    """The line and value of each element of a JSON list, or of each of several concatenated JSON values.

    Raises:
        InputError: the text is neither.
    """
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, 0, " \t\r\n")
    is_list = text[at : at + 1] == "["
    at = _skip(text, at + is_list, " \t\r\n")
    while at < len(text) and not (is_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{getattr(error, 'lineno', line)}: is not JSON: {error}") from None
        yield line, value
        at = _skip(text, at, " \t\r\n")
        if is_list:
            if text[at : at + 1] not in (",", "]"):
                raise InputError(f"{path}:{line + text.count(chr(10), counted, at)}: the JSON list does not go on")
            follows = text[at] == ","
            at = _skip(text, at + follows, " \t\r\n")
            if follows and text[at : at + 1] == "]":
                raise InputError(f"{path}:{line + text.count(chr(10), counted, at)}: the JSON list ends with a comma")
    if is_list and (at >= len(text) or text[at + 1 :].strip()):
        raise InputError(f"{path}: the JSON list does not end where the file does")


def json_object(value: Any, *, escapes: bool) -> dict[str, Any]:
    """Returns `value` if it is an object; with `escapes`, also checks that its strings can be encoded.

    JSON escapes can spell half a surrogate pair, which a Python string can hold and UTF-8 cannot.
    """
    if not isinstance(value, dict):
        raise RecordProblem(f"holds a JSON {type(value).__name__}, not an object")
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RecordProblem("has half a surrogate pair, which is no character") from None
    return value


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def no_column(column: str, names: Iterable[str]) -> str:
    return f"no column {column!r}; there are {', '.join(map(repr, names))}"


@contextmanager
def open_parquet(path: str | Path, columns: Sequence[str] = (), text: str | None = None) -> Iterator[Any]:
    """A pyarrow ParquetFile. Its errors, also those while it is read, are raised as InputError.

    Args:
        columns: required columns.
        text: the column that must hold strings.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no parquet file: {error}") from None
    with file:
        for column in columns:
            if column not in file.schema_arrow.names:
                raise InputError(f"{path}: {no_column(column, file.schema_arrow.names)}")
        if text is not None:
            kind = file.schema_arrow.field(text).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: column {text!r} is of type {kind}, not string")
        try:
            yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
