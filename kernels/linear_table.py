"""Selects the fused Triton kernel or cuBLAS and an activation kernel: from a table of measurements, else by a rule.

`linear_table.csv` is written by `benchmarks/tune_linear.py` on a GPU; each row names that GPU and the date. A row
applies to all products of its N and K whose number of rows falls into its bucket of M.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from fastbert.kernels.configs import LinearTile

FILE = Path(__file__).with_suffix(".csv")
LARGEST = 65536
# Without a row of the table, products with an activation and at most this many rows use the fused kernel: they do not
# fill the GPU, so saving a launch outweighs a slower product. Not measured; see README.md.
FUSED_ROWS = 512


@dataclass(frozen=True)
class Row:
    """A measured product: `tile` is the fastest of the Triton kernel, or None where cuBLAS was faster."""

    architecture: str
    dtype: str  # float16, bfloat16
    M: int  # the bucket
    N: int
    K: int
    activation: str
    keeps_z: bool  # training: the kernel also stores z
    tile: LinearTile | None
    cublas_us: float
    triton_us: float  # with the fastest tile
    device: str
    date: str

    @property
    def key(self) -> tuple:
        return self.architecture, self.dtype, self.M, self.N, self.K, self.activation, self.keeps_z


def bucket(M: int) -> int:
    """M rounded up to a power of two, between 16 and LARGEST. One measurement represents a bucket."""
    return min(max(1 << (M - 1).bit_length(), 16), LARGEST)


def find(architecture: str, dtype: str, M: int, N: int, K: int, activation: str, keeps_z: bool) -> Row | None:
    """The row for a product, None if it was not measured."""
    return _rows().get((architecture, dtype, bucket(M), N, K, activation, keeps_z))


@cache
def _rows() -> dict[tuple, Row]:
    return {row.key: row for row in read(FILE)}


def read(path: Path) -> list[Row]:
    """The rows of a table file."""
    with path.open(newline="") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def write(path: Path, rows: list[Row]) -> None:
    """Replaces a table file atomically: concurrent readers see the old one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), "tile": row.tile or "cublas"} for row in rows)
    partial.replace(path)


def _row(cells: dict[str, str]) -> Row:
    return Row(
        architecture=cells["architecture"],
        dtype=cells["dtype"],
        **{name: int(cells[name]) for name in ("M", "N", "K")},
        activation=cells["activation"],
        keeps_z=cells["keeps_z"] == "True",
        tile=None if cells["tile"] == "cublas" else LinearTile.parse(cells["tile"]),
        **{name: float(cells[name]) for name in ("cublas_us", "triton_us")},
        device=cells["device"],
        date=cells["date"],
    )
