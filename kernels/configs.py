"""Tile configurations of the kernels: pure functions of shape, dtype and architecture.

`architecture` is the result of `architecture.architecture`. A measured line names the GPU and the date; all others
were chosen by counting registers and shared memory, and are yet to be measured. Nothing is tuned at call time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """An attention kernel owns a tile of `attention_block` rows and walks the others in steps of `step` rows."""

    step: int
    num_warps: int
    num_stages: int
    tma: bool = False  # read full steps by the tensor memory accelerator, if rows are aligned for it


# Keys: architecture, and True for heads wider than 64. Values: forward, forward with dropout, dQ, dK/dV; for 16 bits
# and tiles of 128 rows (64 for wide heads on gfx942). Those of NVIDIA start from torch's flex attention on A100 and
# H100 (torch/_inductor/template_heuristics/triton.py, 2.13), with fewer rows per step where registers would spill.
_ATTENTION = {
    ("sm_80", False): (Attention(64, 4, 3), Attention(64, 8, 3), Attention(64, 8, 2), Attention(32, 8, 2)),
    ("sm_80", True): (Attention(64, 8, 3), Attention(64, 8, 3), Attention(32, 8, 2), Attention(16, 8, 2)),
    ("sm_90", False): (Attention(128, 4, 3), Attention(64, 8, 3), Attention(64, 8, 3), Attention(64, 8, 3)),
    ("sm_90", True): (Attention(64, 8, 3), Attention(64, 8, 3), Attention(64, 8, 2), Attention(32, 8, 2)),
    ("gfx942", False): (Attention(64, 4, 1), Attention(64, 4, 1), Attention(64, 4, 1), Attention(64, 4, 1)),
    ("gfx942", True): (Attention(64, 4, 1), Attention(64, 4, 1), Attention(32, 4, 1), Attention(32, 4, 1)),
}


def attention_block(architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> int:
    """Rows of the tile that a program owns, the same for forward and backward, which share a schedule."""
    if architecture == "interpreter":
        return 16
    if dtype == torch.float32:  # products are unrolled scalar FMAs: more rows spill, and take minutes to compile
        return 32 if head_dim <= 64 else 16
    if head_dim > 64 and max_seqlen <= 64 and _as_sm_80(architecture):
        return 16 if max_seqlen <= 16 else 32  # a backward of 64 rows in four warps spills a thousand bytes
    largest = 64 if head_dim > 64 and architecture.startswith("gfx") else 128
    return next(block for block in (16, 32, 64, largest) if block >= min(max_seqlen, largest))


def attention(
    kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int, *, plain: bool = True
) -> Attention:
    """The configuration of `fwd` (`plain`: without dropout), `dq` or `dkdv`.

    It depends on max_seqlen only by its class: up to 16, 32, 64, below 256, below 512, or more.
    """
    if architecture == "interpreter":
        return Attention(16, 1, 1)
    block = attention_block(architecture, dtype, head_dim, max_seqlen)
    wide = head_dim > 64
    if dtype == torch.float32:
        return Attention(16, 8, 2)
    if max_seqlen <= 64:  # a single step
        forward = kernel == "fwd"
        if wide and not forward and architecture.startswith("sm_"):  # twice as many threads per row
            return Attention(min(block, 32), min(block // 4, 8), 2)
        return Attention(block if forward else min(block, 32), block // (16 if forward and not wide else 8), 1)
    if _as_sm_80(architecture):
        architecture = "sm_80"
    plain_forward, forward, dq, dkdv = _ATTENTION[("gfx942" if architecture[0] == "g" else architecture), wide]
    chosen = {"fwd": plain_forward if plain else forward, "dq": dq, "dkdv": dkdv}[kernel]
    if architecture != "sm_90":
        return chosen
    if chosen.step == 128 and (max_seqlen < 512 or head_dim <= 32):  # half a step is wasted at a sequence's end
        chosen = Attention(64, chosen.num_warps, chosen.num_stages)
    if wide and kernel == "dkdv" and attention_in_one_launch(architecture, dtype, head_dim, max_seqlen):
        chosen = Attention(16, chosen.num_warps, chosen.num_stages)
    tma = max_seqlen >= 256 and head_dim in (16, 32, 64, 128)
    return Attention(chosen.step, chosen.num_warps, chosen.num_stages, tma)


def attention_in_one_launch(architecture: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> bool:
    """True if the dK/dV kernel writes dQ too: a tile has all keys of its sequence, and registers suffice.

    Except on Hopper, each warp holds all keys in registers for dQ's product: more than 64 keys of 64 columns spill
    hundreds of bytes. In fp32, more than 32 columns spill a thousand.
    """
    if dtype == torch.float32 and head_dim > 32:
        return False
    block = attention_block(architecture, dtype, head_dim, max_seqlen)
    if _as_sm_80(architecture):
        block = min(block, 16 if head_dim > 64 else 64)
    return max_seqlen <= block


def _as_sm_80(architecture: str) -> bool:
    """True for NVIDIA except Hopper: products use mma, with operands in registers."""
    return architecture.startswith("sm_") and architecture != "sm_90"


@dataclass(frozen=True)
class Tile:
    """A block of an elementwise kernel."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class StripTile(Tile):
    """A strip of columns, whose rows are split over `splits` programs, `rows` each."""

    splits: int
    rows: int


def activation_forward(N: int) -> Tile:
    """32 elements per thread: four 16-byte vectors of bf16 in flight."""
    return Tile(8, 512, 4) if N >= 512 else Tile(32, 128, 4)


def activation_bwd(M: int, N: int, multiprocessors: int) -> StripTile:
    """32 elements of each tensor and 32 sums per thread; four programs per multiprocessor, of at least 128 rows."""
    block_m, block_n = 32, 128
    strips = -(-N // block_n)
    splits = max(min(-(-4 * multiprocessors // strips), M // 128), 1)
    rows = -(-M // (splits * block_m)) * block_m
    return StripTile(block_m, block_n, 4, -(-M // rows), rows)


@dataclass(frozen=True)
class LinearTile:
    """A program of the matrix product computes block_m x block_n of y, in steps of block_k along K."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:  # the format of the table
        return f"{self.block_m}x{self.block_n}x{self.block_k}-{self.num_warps}-{self.num_stages}"

    @property
    def resident(self) -> int:
        """Programs that a Hopper multiprocessor holds for 16-bit operands: 255 registers per thread, 227 KB shared."""
        shared = (self.block_m + self.block_n) * self.block_k * 2 * self.num_stages
        return max(min(8 // self.num_warps, 227 * 1024 // shared), 1)

    @property
    def parts(self) -> int:
        """Parts in which the epilogue (bias, activation, store) runs, so that its temporaries fit next to the sums."""
        return 2 if self.block_m * self.block_n >= 64 * 128 * self.num_warps // 2 else 1

    @classmethod
    def parse(cls, text: str) -> LinearTile:
        """The inverse of str(). Raises ValueError if `text` is no tile."""
        return cls(*map(int, text.replace("x", "-").split("-")))


# From the largest down. A step's operands are (block_m + block_n) * block_k * 2 bytes in bf16, times the stages: 144 KB
# of 227 with 128x256x64-8-3. The sums take block_m * block_n / (32 num_warps) registers per thread: at most 128 of 255.
# Tiles of fewer than 64 rows use mma instead of wgmma; they are for latency, with a deep pipeline along K.
_LINEAR_TILES = {
    "sm_90": (
        LinearTile(128, 256, 64, 8, 3),
        LinearTile(128, 128, 64, 4, 3),
        LinearTile(64, 128, 64, 4, 4),
        LinearTile(64, 64, 128, 4, 4),
        LinearTile(64, 32, 128, 4, 6),
        LinearTile(16, 64, 128, 4, 6),
        LinearTile(16, 32, 128, 4, 6),
    ),
    "sm_80": (
        LinearTile(128, 256, 32, 8, 3),
        LinearTile(128, 128, 32, 4, 4),
        LinearTile(64, 128, 32, 4, 4),
        LinearTile(64, 64, 64, 4, 4),
        LinearTile(64, 32, 64, 4, 5),
        LinearTile(16, 64, 128, 4, 4),
        LinearTile(16, 32, 128, 4, 5),
    ),
    "gfx942": (
        LinearTile(128, 128, 64, 8, 2),
        LinearTile(64, 128, 64, 4, 2),
        LinearTile(64, 64, 64, 4, 2),
        LinearTile(64, 32, 64, 4, 2),
        LinearTile(16, 64, 128, 4, 2),
        LinearTile(16, 32, 128, 4, 2),
    ),
}


def linear_tiles(architecture: str) -> tuple[LinearTile, ...]:
    """The available tiles, from the largest down."""
    if architecture == "interpreter":
        return (LinearTile(32, 32, 32, 4, 1),)
    return _LINEAR_TILES.get(architecture) or _LINEAR_TILES["gfx942" if architecture.startswith("gfx") else "sm_80"]


def linear(M: int, N: int, architecture: str, multiprocessors: int) -> LinearTile:
    """The largest tile of which every multiprocessor gets at least one; up to M = 16, one of 16 rows."""
    tiles = linear_tiles(architecture)
    fitting = [t for t in tiles if (t.block_m < 64) == (M <= 16)] or tiles
    for tile in fitting:
        if -(-M // tile.block_m) * -(-N // tile.block_n) >= multiprocessors:
            return tile
    return fitting[-1]


@dataclass(frozen=True)
class RowTile:
    """rows x (block_a + block_b) elements per step. `programs` per multiprocessor loop over the tiles (0: one program
    per tile), prefetching `num_stages` - 1 steps."""

    rows: int
    block_a: int
    block_b: int
    num_warps: int
    programs: int
    num_stages: int


def layer_norm_forward(N: int, architecture: str, *, dropout: bool) -> RowTile:
    """One warp per row up to 1024 columns: no reduction across warps; 21 warps with 3 KB of loads each at N = 768.

    With dropout, the column keys take 80 instructions each: fewer, larger programs reuse them over many rows.
    """
    if dropout:
        return _row_tile(N, elements_a_warp=512, least_warps=4, registers=96, num_stages=3)
    return _row_tile(N, elements_a_warp=1024, least_warps=1, registers=0, num_stages=1)


def layer_norm_bwd(N: int, architecture: str) -> RowTile:
    """16 elements per thread, which also holds their dweight and dbias; one prefetched step is 32 KB in flight."""
    return _row_tile(N, elements_a_warp=512, least_warps=4, registers=128, num_stages=2)


def two_parts(N: int) -> tuple[int, int]:
    """Two powers of two whose sum is N or slightly more: 768 is 512 + 256, 1024 is 512 + 512."""
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
    """chunk rows x block_n columns per program."""

    chunk: int
    block_n: int
    num_warps: int


def segments(N: int, architecture: str) -> SegmentTile:
    """16 elements per thread, rows of 128 bytes in bf16: 8 KB of loads per program, all in one step.

    The interpreter scans element by element: a small tile is faster there, and few rows already take several rounds.
    """
    if architecture == "interpreter":
        return SegmentTile(8, 8, 1)
    return SegmentTile(64, min(64, 1 << (N - 1).bit_length()), 8)


def cross_entropy(V: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps): a block of a row in registers, 16 logits per thread; several rows hide memory latency."""
    block = min(max(1 << (V - 1).bit_length(), 128), 4096)
    return block, max(block // 512, 1)


def quantize_rows(columns: int) -> tuple[int, int]:
    """(BLOCK, num_warps): a row as eight vectors of BLOCK columns, 32 columns per thread."""
    block = max(1 << (columns // 8 - 1).bit_length(), 32)
    return block, min(max(block // 128, 1), 16)


def quantized_columns(tile: LinearTile) -> int:
    """block_k of an 8-bit product with a tile of `linear_tiles`: the bytes of 16-bit operands, at most 128 columns."""
    return min(2 * tile.block_k, 128)
