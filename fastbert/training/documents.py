"""Documents from text, jsonl, JSON, csv and parquet files, cut into pieces that can be read independently.

A piece is a range of a file that starts and ends between two documents. Its bounds depend on a size alone. So many
processes can read one file, and the pieces are the same for any number of them. In a text file, a document ends at a
blank line, or is a line, or is the whole file. A csv, JSON or compressed file is one piece.
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
_WINDOW = 1 << 20  # bytes searched at a time


@dataclass(frozen=True)
class DocumentReading(Form):
    """How `fastbert prepare` reads inputs.

    Args:
        separator: end of a document in a text file: "blank-line", "line" or "file".
        field: field of a JSON object that holds the text.
        column: column of a csv or parquet file that holds the text.
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
    bytes: int  # of text, approximately


class Document(NamedTuple):
    """One document, or its problem."""

    text: str
    piece: Piece
    position: int  # its first line or row, counted from 0 at the start of the piece
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
    """The given files, and those below the given folders, sorted by path.

    In a folder, hidden files are left out. Files with a suffix that `reading` does not know are left out with a
    warning.

    Raises:
        InputError: a path does not exist, a folder has no files, or a file is empty or only white space.
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
    """The paths of a known format; warns of the others."""
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
        InputError: a parquet file cannot be read or lacks the column of strings, or a file's content does not match
            its suffix.
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
    """The first byte after the next separator from `position` on; the end of the file if there is none."""
    file.seek(position)
    held, searched = b"", 0
    while block := file.read(_WINDOW):
        held += block
        if found := separator.search(held, searched):
            return position + found.end()
        searched = max(0, len(held) - (_WINDOW >> 4))  # a run of blank lines may cross the window's edge
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
    """Groups consecutive pieces to about `size` bytes; a small remainder joins the last group."""
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
    """The documents of a piece, in order. Empty documents of a text file are skipped."""
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
