"""Documents from text, jsonl, JSON, csv and parquet files: pieces that can be read apart from each other, in any order.

A piece is a range of a file that begins and ends between two documents, found by its size alone, so that many
processes can read one file and the pieces are the same for any number of them. In a text file, documents end at a
blank line, or each line is one, or the whole file. A csv or JSON file and a compressed file is one piece.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbert.inference.input_files import (
    CsvRows,
    InputError,
    Lines,
    RecordProblem,
    check_text_column,
    compression_of,
    format_by_suffix,
    json_text,
    json_values,
    open_input,
    open_parquet,
    parquet_rows,
    read_text,
    suffix_of,
    text_of,
)
from fastbert.inference.records import SUFFIXES

FORMATS = ("text", "jsonl", "json", "csv", "parquet")
SEPARATORS = ("blank-line", "line", "file")
_BLANK = re.compile(rb"\n\s*\n")
_LINE = re.compile(rb"\n")
_WINDOW = 1 << 20  # bytes looked at together


@dataclass(frozen=True)
class DocumentReading:
    """How inputs are read.

    Args:
        format: one of FORMATS, or "auto": by each file's suffix.
        separator: what ends a document of a text file: "blank-line", "line" or "file".
        field: of a JSON object, its text.
        column: of a csv or parquet file, its text.
        header, delimiter, quoted: of a csv file, as CsvRows takes them.
    """

    format: str = "auto"
    separator: str = "blank-line"
    field: str = "text"
    column: str = "text"
    header: bool = True
    delimiter: str | None = None
    quoted: bool | None = None

    def format_of(self, path: Path) -> str:
        return format_by_suffix(path, SUFFIXES) if self.format == "auto" else self.format


class Piece(NamedTuple):
    """A range of a file: bytes, or row groups of a parquet file."""

    path: Path
    format: str  # one of FORMATS
    start: int
    stop: int
    bytes: int  # of text, more or less


class Document(NamedTuple):
    """One document, or the problem there is in its place."""

    text: str
    piece: Piece
    position: int  # byte, row, or line of a csv or JSON file it begins at, counted from the piece's start
    problem: str | None = None

    def where(self) -> str:
        """`file:line` (row of a row group for parquet), counted from 1."""
        path, start = self.piece.path, self.piece.start
        if self.piece.format == "parquet":
            return f"{path}: row {self.position + 1} of row group {start + 1}"
        if self.piece.format in ("csv", "json"):
            return f"{path}:{self.position + 1}"
        line, left = 1, start + self.position
        with open_input(path) as file:
            while left and (block := file.read(min(left, _WINDOW))):
                line, left = line + block.count(b"\n"), left - len(block)
        return f"{path}:{line}"


def find_files(inputs: Sequence[str | os.PathLike], reading: DocumentReading | None = None) -> list[Path]:
    """The files named, and those below the folders named, sorted by path.

    In a folder, hidden files are left out, and, with a warning, those of a suffix that `reading` has no format for.

    Raises:
        InputError: a path that does not exist, a folder without files, a file that is empty or holds white space.
    """
    found: list[Path] = []
    for name in map(Path, inputs):
        if name.is_dir():
            below = sorted(path for path in name.rglob("*") if path.is_file() and not _hidden(path.relative_to(name)))
            if not below:
                raise InputError(f"{name}: the folder holds no files")
            found += _known(name, below, reading or DocumentReading())
        elif not name.is_file():
            raise InputError(f"{name}: {'not an ordinary file' if name.exists() else 'no such file'}")
        else:
            found.append(name)
    for path in found:
        with open(path, "rb") as file:
            if not any(block.strip() for block in iter(lambda: file.read(_WINDOW), b"")):
                raise InputError(f"{path} is empty" if not path.stat().st_size else f"{path} holds white space alone")
    return found


def _known(folder: Path, paths: list[Path], reading: DocumentReading) -> list[Path]:
    """The paths of a known format; warns of the number of others."""
    if reading.format != "auto":
        return paths
    unknown = {path: suffix_of(path) for path in paths if suffix_of(path) not in ("", *SUFFIXES)}
    if len(unknown) == len(paths):
        raise InputError(f"{folder}: the folder holds no file of a suffix among {', '.join(SUFFIXES)}")
    if unknown:
        suffixes = ", ".join(sorted(set(unknown.values())))
        warnings.warn(f"{folder}: {len(unknown)} files of other suffixes are left out: {suffixes}", stacklevel=3)
    return [path for path in paths if path not in unknown]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def cut(path: Path, reading: DocumentReading, size: int) -> list[Piece]:
    """Cuts a file into pieces of about `size` bytes.

    Raises:
        InputError: a parquet file that cannot be read, or has no such column of strings; a file that holds something
            else than its suffix stands for.
    """
    kind = reading.format_of(path)
    if kind == "parquet":
        return _row_groups(path, reading.column)
    total = path.stat().st_size
    with open_input(path) as file:
        if kind == "csv":
            _csv_rows(path, Lines(file), reading)
    if compression_of(path) or kind in ("csv", "json") or (kind == "text" and reading.separator == "file"):
        return [Piece(path, kind, 0, total, total)]
    separator = _BLANK if kind == "text" and reading.separator == "blank-line" else _LINE
    cuts = [0]
    with open(path, "rb") as file:
        for target in range(size, total, size):
            if target > cuts[-1]:
                cuts.append(_next_document(file, target, separator, total))
    cuts = sorted({*cuts, total})
    return [Piece(path, kind, start, stop, stop - start) for start, stop in pairwise(cuts)]


def _next_document(file: BinaryIO, position: int, separator: re.Pattern, total: int) -> int:
    """The first byte behind a separator that begins at `position` or later; the end where there is none."""
    file.seek(position)
    held, searched = b"", 0
    while block := file.read(_WINDOW):
        held += block
        if found := separator.search(held, searched):
            return position + found.end()
        searched = max(0, len(held) - (_WINDOW >> 4))  # a run of blank lines may reach over the windows' edge
    return total


def _row_groups(path: Path, column: str) -> list[Piece]:
    with open_parquet(path) as file:
        check_text_column(path, file, column)
        metadata = file.metadata
    pieces = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(i) for i in range(group.num_columns))
        size = next(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
        pieces.append(Piece(path, "parquet", number, number + 1, size))
    return pieces


def group(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """Puts pieces together, in their order, to groups of about `size` bytes; a small rest joins the last group."""
    groups: list[list[Piece]] = []
    held = size
    for piece in pieces:
        if held + piece.bytes / 2 >= size:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += piece.bytes
    if len(groups) > 1 and held < size / 2:
        rest = groups.pop()
        groups[-1] += rest
    return groups


def documents(piece: Piece, reading: DocumentReading) -> Iterator[Document]:
    """The documents of a piece, in order. What is empty between separators of a text file is no document."""
    kind = piece.format
    if kind == "parquet":
        yield from _parquet(piece, reading.column)
        return
    if kind in ("csv", "json"):
        yield from (_csv if kind == "csv" else _json)(piece, reading)
        return
    with open_input(piece.path) as file:
        if compression_of(piece.path):
            data = file.read()
        else:
            file.seek(piece.start)
            data = file.read(piece.stop - piece.start)
    separator = {"blank-line": _BLANK, "line": _LINE, "file": None}[reading.separator] if kind == "text" else _LINE
    for start, raw in _split(data, separator):
        if piece.start + start == 0:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if kind == "text" and not raw.strip():
            continue
        lead = len(raw) - len(raw.lstrip()) if kind == "text" else 0  # where the error's line is
        try:
            text = _decoded(raw)
            text = (json_text(text, reading.field) if kind == "jsonl" else text).strip()
            if not text:
                raise RecordProblem("has an empty text")
            yield Document(text, piece, start + lead)
        except RecordProblem as problem:
            yield Document("", piece, start + lead, str(problem))


def _split(data: bytes, separator: re.Pattern | None) -> Iterator[tuple[int, bytes]]:
    start = 0
    for found in separator.finditer(data) if separator else ():
        yield start, data[start : found.start()]
        start = found.end()
    if start < len(data):
        yield start, data[start:]


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordProblem(
            f"is not UTF-8 (byte {raw[error.start]:#04x} at byte {error.start + 1} of the document)"
        ) from None


def _csv_rows(path: Path, lines: Lines, reading: DocumentReading) -> tuple[CsvRows, int]:
    """The rows of a csv file, and the index of the text among their fields."""
    rows = CsvRows(path, lines, header=reading.header, delimiter=reading.delimiter, quoted=reading.quoted)
    return rows, rows.column(reading.column)


def _csv(piece: Piece, reading: DocumentReading) -> Iterator[Document]:
    with open_input(piece.path) as stream:
        rows, column = _csv_rows(piece.path, Lines(stream), reading)
        while True:
            try:
                if not (row := next(rows)):
                    continue
                if column >= len(row):
                    raise RecordProblem(f"has {len(row)} fields; the text is field {column + 1}")
                yield _document(row[column], piece, rows.line - 1)
            except RecordProblem as problem:
                yield Document("", piece, rows.line - 1, str(problem))
            except StopIteration:
                return


def _json(piece: Piece, reading: DocumentReading) -> Iterator[Document]:
    for line, value in json_values(piece.path, read_text(piece.path)):
        try:
            yield _document(text_of(value, reading.field), piece, line - 1)
        except RecordProblem as problem:
            yield Document("", piece, line - 1, str(problem))


def _parquet(piece: Piece, column: str) -> Iterator[Document]:
    with open_parquet(piece.path) as file:
        for number, row in enumerate(parquet_rows(file, [column], range(piece.start, piece.stop))):
            yield _document(row[column] or "", piece, number)


def _document(text: str, piece: Piece, position: int) -> Document:
    text = text.strip() if piece.format != "parquet" else text
    return Document(text, piece, position, None if text and not text.isspace() else "has an empty text")
