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
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbert.inference.input_files import (
    SUFFIXES,
    Form,
    InputError,
    Lines,
    RecordProblem,
    compression_of,
    open_input,
    open_parquet,
    suffix_of,
)
from fastbert.inference.records import jsonl_rows, read_rows, text_of

_BLANK = re.compile(rb"\n\s*\n")
_LINE = re.compile(rb"\n")
_WINDOW = 1 << 20  # bytes looked at together


@dataclass(frozen=True)
class DocumentReading(Form):
    """How `fastbert prepare` reads inputs.

    Args:
        separator: what ends a document of a text file: "blank-line", "line" or "file".
        field: of a JSON object, its text.
        column: of a csv or parquet file, its text.
    """

    separator: str = "blank-line"
    field: str = "text"
    column: str = "text"


class Piece(NamedTuple):
    """A range of a file: bytes, or row groups of a parquet file."""

    path: Path
    format: str  # one of input_files.FORMATS
    start: int
    stop: int
    bytes: int  # of text, more or less


class Document(NamedTuple):
    """One document, or the problem there is in its place."""

    text: str
    piece: Piece
    position: int  # line or row it begins at, counted from 0 at the piece's start
    problem: str | None = None

    def where(self) -> str:
        """`file:line` (row of a row group for parquet), counted from 1."""
        path, start = self.piece.path, self.piece.start
        if self.piece.format == "parquet":
            return f"{path}: row {self.position + 1} of row group {start + 1}"
        line = self.position + 1
        if start:
            with open_input(path) as file:
                while start and (block := file.read(min(start, _WINDOW))):
                    line, start = line + block.count(b"\n"), start - len(block)
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
        InputError: a parquet file that cannot be read, or has no such column of strings; a file
            whose content is not what its suffix says.
    """
    kind = reading.format_of(path)
    if kind == "parquet":
        return _row_groups(path, reading.column)
    total = path.stat().st_size
    if kind == "csv":
        next(read_rows(path, reading, kind, [reading.column]), None)  # for its errors
    else:
        with open_input(path):
            pass
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
    with open_parquet(path, [column], column) as file:
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
    column = reading.field if piece.format in ("json", "jsonl") else reading.column
    if piece.format == "text":
        yield from _texts(piece, reading.separator)
        return
    if piece.format == "jsonl":
        rows = jsonl_rows(Lines(BytesIO(_content(piece)), first=piece.start == 0))
    else:
        groups = range(piece.start, piece.stop) if piece.format == "parquet" else None
        rows = read_rows(piece.path, reading, piece.format, [column], groups=groups)
    for row in rows:
        try:
            text = text_of(row, column, piece.format)
            yield Document(text if piece.format == "parquet" else text.strip(), piece, row.line - 1)
        except RecordProblem as problem:
            yield Document("", piece, row.line - 1, str(problem))


def _content(piece: Piece) -> bytes:
    with open_input(piece.path) as file:
        if compression_of(piece.path):
            return file.read()
        file.seek(piece.start)
        return file.read(piece.stop - piece.start)


def _texts(piece: Piece, separator: str) -> Iterator[Document]:
    data = _content(piece)
    ends = {"blank-line": _BLANK, "line": _LINE, "file": None}[separator]
    line = counted = start = 0
    for end in (*(ends.finditer(data) if ends else ()), None):
        at, stop = start, end.start() if end else len(data)
        raw, start = data[at:stop], end.end() if end else stop
        if piece.start + at == 0:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        at = stop - len(raw.lstrip())
        line, counted = line + data.count(b"\n", counted, at), at
        try:
            yield Document(raw.decode().strip(), piece, line)
        except UnicodeDecodeError as error:
            where = f"byte {raw[error.start]:#04x} at byte {error.start + 1} of the document"
            yield Document("", piece, line, f"is not UTF-8 ({where})")
