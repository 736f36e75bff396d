"""Output files of rows with columns of any type: jsonl, csv and parquet. A killed run can be resumed: see output.py.

While a run lasts, its rows are JSON lines. csv and parquet are made of them at its end, when all columns are known.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import atomic_path
from fastbert.inference.output import ROW_GROUP, OutputError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_BREAK = re.compile(r"[\t\r\n]")
Rows = Sequence[dict[str, Any] | None]  # None: a line that was skipped


class RowFormat:
    """Rows as JSON lines, csv or parquet. In csv, a list or object is JSON, and a missing value is empty."""

    def __init__(self, name: str) -> None:
        self._name = name
        if name == "parquet":
            try:
                import pyarrow.parquet  # noqa: F401
            except ModuleNotFoundError:
                raise OutputError(
                    "parquet output needs pyarrow: pip install pyarrow, or write .jsonl or .csv"
                ) from None

    def prefix(self) -> bytes:
        return b""

    def encode(self, records: Sequence[Any], rows: Rows) -> bytes:
        lines = (json.dumps(_plain(row), ensure_ascii=False, default=str) + "\n" for row in rows if row is not None)
        return "".join(lines).encode()

    def finish(self, partial: Path, out: Path, records: int) -> None:
        if self._name == "jsonl":
            os.replace(partial, out)
            return
        (_write_csv if self._name == "csv" else _write_parquet)(partial, out)
        partial.unlink()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON can hold it: a number that is none is null.

    Raises:
        OutputError: a column of bytes.
    """
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row = {**row, name: None}
        elif isinstance(value, bytes):
            raise OutputError(f"column {name!r} holds bytes, which the output cannot; leave it out of the input")
    return row


def _rows_of(partial: Path) -> Iterator[dict[str, Any]]:
    with partial.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write_csv(partial: Path, out: Path) -> None:
    columns = list(dict.fromkeys(name for row in _rows_of(partial) for name in row))
    is_tsv = out.suffix.lower() == ".tsv"  # where a quote is a character like any other
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if is_tsv else {}
    with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", **form)
        for number, row in enumerate(chain([dict(zip(columns, columns, strict=True))], _rows_of(partial))):
            cells = [_cell(row.get(name)) for name in columns]
            if is_tsv and any(isinstance(cell, str) and _BREAK.search(cell) for cell in cells):
                raise OutputError(f"{out}: row {number} holds a tab or a line break, which a .tsv cannot; write .csv")
            writer.writerow(cells)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _write_parquet(partial: Path, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def groups() -> Iterator[list[dict[str, Any]]]:
        rows = _rows_of(partial)
        while group := list(islice(rows, ROW_GROUP)):
            yield group

    def names(group: list[dict[str, Any]]) -> list[str]:  # pyarrow takes those of the first row
        return list(dict.fromkeys(name for row in group for name in row))

    try:
        schemas = [pa.Table.from_pylist([dict.fromkeys(names(g)) | r for r in g]).schema for g in groups()]
        schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
        with atomic_path(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for group in groups():
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    except (pa.ArrowException, OverflowError) as error:
        raise OutputError(f"{out}: the rows make no parquet columns ({error}); {partial} has them as jsonl") from None


def format_of_rows(out: str, named: str | None) -> str:
    """The format called `named`, or else that of the output's suffix.

    Raises:
        OutputError: the suffix is none of FORMATS.
    """
    found = named or FORMATS.get(Path(out).suffix.lower())
    if found is None:
        raise OutputError(f"-o {out}: the suffix is none of {', '.join(FORMATS)}; name an --output-format")
    return found
