"""The readers of input files that all commands share: compression, lines, csv rows, JSON lists, parquet rows.

A file's format follows from its suffix, after that of a compression: `reviews.csv.gz` is csv. Files are UTF-8, with
or without a byte order mark. Bytes of another kind than the suffix stands for are refused by name. Lines end at a
line feed (a carriage return before it is removed) and nowhere else, so that their numbers are those an editor shows.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

STDIN = "-"
MAX_LINE = 1 << 24  # bytes of a line, characters of a csv field: what one record may cost in memory
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
PEEK = 1 << 16  # bytes that a file's kind is judged by
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
    """An input that cannot be read at all, or a bad line where those are fatal; names file and line."""


class RecordProblem(Exception):
    """A problem of one record. The reader that raises it continues with the next record."""


def suffix_of(path: str | Path) -> str:
    """The suffix that stands for a file's format, in lower case, without that of its compression."""
    path = Path(path)
    return Path(path.stem if compression_of(path) else path.name).suffix.lower()


def compression_of(path: str | Path) -> str | None:
    return COMPRESSIONS.get(Path(path).suffix.lower())


def format_by_suffix(path: str | Path, formats: Mapping[str, str], option: str = "--input-format") -> str:
    """The format that `formats` has for a file's suffix; "text" for a name without one, such as a pipe's.

    Raises:
        InputError: the suffix is none of them.
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
    """The bytes of a file, decompressed, or of stdin for "-"; they begin as text does.

    Raises:
        InputError: it begins as a file of another kind, or its lines end in carriage returns alone.
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
    """The lines of a stream as text, with their ends, counted and hashed; after a bad one, the next call continues.

    Args:
        digest: an object of hashlib that is updated with each line's bytes.
    """

    def __init__(self, stream: BinaryIO, digest: Any = None) -> None:
        self.number, self.bytes = 0, 0
        self.head = stream.peek(PEEK)[:PEEK] if hasattr(stream, "peek") else b""
        self._stream, self._digest = stream, digest

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
        if self.number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordProblem(f"is not UTF-8 (byte {raw[error.start]:#04x} at byte {error.start + 1})") from None

    def _read(self) -> bytes:
        raw = self._stream.readline(MAX_LINE + 1)
        self.bytes += len(raw)
        if self._digest is not None:
            self._digest.update(raw)
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

    In a .tsv, quotes are characters like any other unless `quoted` is set; elsewhere, fields may stand in them.

    Args:
        name: the file's, which errors name.
        lines: of the file, from its first.
        header: whether the first row names the columns.
        delimiter: between fields; None is a tab for .tsv and a comma for others.
        quoted: whether fields may stand in double quotes; None goes by the suffix.

    Raises:
        InputError: the header line cannot be read or names a column twice; a .tsv that was written with quotes.
    """

    def __init__(
        self,
        name: str | Path,
        lines: Lines,
        *,
        header: bool = True,
        delimiter: str | None = None,
        quoted: bool | None = None,
    ) -> None:
        csv.field_size_limit(MAX_LINE)
        self.line = 1  # the one that the last row begins on
        self.names: list[str] = []  # of the columns; empty without a header line
        self._shown, self._lines = shown(name), lines
        is_tsv = suffix_of(name) == ".tsv"
        self._delimiter = delimiter or ("\t" if is_tsv else ",")
        self._quotes_unsaid = is_tsv and quoted is None
        if self._quotes_unsaid:
            self._refuse_quotes(lines.head)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if self._quotes_unsaid or quoted is False else csv.QUOTE_MINIMAL
        self._rows = csv.reader(lines, delimiter=self._delimiter, quoting=quoting, strict=True)
        if header:
            self._read_names()

    def _read_names(self) -> None:
        try:
            self.names = [name.strip() for name in next(self._rows, [])]
        except (RecordProblem, csv.Error) as error:
            raise InputError(f"{self._shown}:1: cannot read the header line: {error}") from None
        if twice := [name for name in self.names if name and self.names.count(name) > 1]:
            raise InputError(
                f"{self._shown}:1: the header line names {twice[0]!r} twice; if it names no columns, give --no-header"
            )

    def __iter__(self) -> CsvRows:
        return self

    def __next__(self) -> list[str]:
        self.line = self._lines.number + 1
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
        raise InputError(f"{self._shown}:1: {self.missing(wanted)}")

    def missing(self, column: str) -> str:
        """The message for a column that the header line does not name, with the option that may be missing."""
        message = f"no column {column!r}; there are {', '.join(map(repr, self.names))}"
        if not self.names:
            return f"no column {column!r}; without a header line, columns are numbers from 1"
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
            lines.pop()  # it may go on past the bytes looked at
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
    """The line and value of each element of a JSON list, or of each of the objects that follow one another.

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


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def json_value(line: str) -> Any:
    if not line.strip():
        raise RecordProblem("is empty")
    try:
        return json.loads(line.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise RecordProblem(f"is not JSON: {error}") from None


def json_text(line: str, field: str) -> str:
    """The text in a field of a line's object."""
    return text_of(json_value(line), field)


def text_of(value: Any, field: str) -> str:
    """The text in a field of a JSON object."""
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


@contextmanager
def open_parquet(path: str | Path) -> Iterator[Any]:
    """A pyarrow ParquetFile; what is wrong with it, also while it is read, is an InputError."""
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
        try:
            yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None


def check_text_column(path: str | Path, file: Any, column: str) -> None:
    """Raises InputError unless a parquet file has a column of strings of this name."""
    import pyarrow as pa

    schema = file.schema_arrow
    if column not in schema.names:
        raise InputError(f"{path}: no column {column!r}; there are {', '.join(map(repr, schema.names))}")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {column!r} is of type {kind}, not string")


def parquet_rows(file: Any, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file's row groups (all of them by default), without holding more than a batch."""
    for batch in file.iter_batches(row_groups=groups, columns=list(columns), batch_size=1024):
        yield from batch.to_pylist()
