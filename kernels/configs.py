"""How each kernel is cut into tiles: pure functions of shape, dtype and architecture.

`architecture` is what `architecture.architecture` says. Where a line was measured it names the GPU and the date;
every other was chosen by counting registers and shared memory, and waits for a GPU. Nothing is tuned at call time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowTile:
    """rows x (block_a + block_b) elements a step, by `programs` a multiprocessor that walk over them (0: as many as
    there are tiles, a step each), the loads `num_stages` - 1 steps ahead."""

    rows: int
    block_a: int
    block_b: int
    num_warps: int
    programs: int
    num_stages: int


def layer_norm_forward(N: int, architecture: str, *, dropout: bool) -> RowTile:
    """A row a warp, if it has 1024 columns at most: nothing to share, 21 warps of 3 KB of loads each at N = 768.

    Dropout's keys of the columns, 80 instructions each, are worth a walk over rows: fewer, larger programs.
    """
    if dropout:
        return _row_tile(N, elements_a_warp=512, least_warps=4, registers=96, num_stages=3)
    return _row_tile(N, elements_a_warp=1024, least_warps=1, registers=0, num_stages=1)


def layer_norm_backward(N: int, architecture: str) -> RowTile:
    """A thread holds dweight and dbias of its elements, so it has 16 of them; one step ahead are 32 KB in flight."""
    return _row_tile(N, elements_a_warp=512, least_warps=4, registers=128, num_stages=2)


def two_parts(N: int) -> tuple[int, int]:
    """Two powers of two whose sum is N or little more: 768 is 512 + 256, 1024 is 512 + 512."""
    block_a = 1 << max((N - 1).bit_length() - 1, 0)
    return block_a, 1 << max(N - block_a - 1, 0).bit_length()


def _row_tile(N: int, elements_a_warp: int, least_warps: int, registers: int, num_stages: int) -> RowTile:
    block_a, block_b = two_parts(N)
    width = 2 * block_a
    num_warps = min(max(width // elements_a_warp, least_warps), 16)
    rows = min(max(num_warps * elements_a_warp // width, 1), 16)
    programs = max(65536 // (32 * num_warps * registers), 1) if registers else 0
    return RowTile(rows, block_a, block_b, num_warps, programs, num_stages if width <= 2048 else 1)


@dataclass(frozen=True)
class SegmentTile:
    """chunk rows x block_n columns a program."""

    chunk: int
    block_n: int
    num_warps: int


def segments(N: int, architecture: str) -> SegmentTile:
    """16 elements a thread, rows of 128 bytes of bf16: 8 KB of loads a program, which is over in one go.

    The interpreter scans element by element, so there a small tile is quick, and rounds are many with few rows.
    """
    if architecture == "interpreter":
        return SegmentTile(8, 8, 1)
    return SegmentTile(64, min(64, 1 << (N - 1).bit_length()), 8)
