"""Which products with GELU are one Triton kernel: measures every shape both ways and writes kernels/linear_table.csv.

    python benchmarks/tune_linear.py --models base large --rows 128 4096
    benchmarks/acceptance/gpu.sh --stages tune FOLDER && cp FOLDER/linear_table.csv kernels/

For each shape cuBLAS with an elementwise kernel and every tile of the Triton kernel are first held to fp64, then timed
in turns, the L2 cache flushed before each call as the layers between would. Rows of other shapes and GPUs stay, in a
new file those of the committed one; a row is for inference, or for training, where z is kept.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import machine
import torch
import torch.nn.functional as F
from harness import rotated, twice_eager_gate
from torch import Tensor

from fastbert.kernels import activation, architecture, configs, linear, linear_table

MODELS = {"minilm": (1536, 384), "base": (3072, 768), "large": (4096, 1024)}  # N, K of the product with GELU
ROWS = tuple(2**i for i in range(4, 17))
TINY = (32, 48)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CUBLAS = "cublas"

Run = Callable[[], tuple[Tensor, Tensor | None]]


def ways(x: Tensor, weight: Tensor, bias: Tensor, keeps_z: bool) -> dict[str, Run]:
    """Every way to make gelu(x W^T + b), by its name in the table."""

    def two_kernels() -> tuple[Tensor, Tensor | None]:
        z = F.linear(x, weight, bias)
        return activation.activation_fwd(z, "gelu", None if keeps_z else z), z

    fused = partial(linear.linear_fused_fwd, x, weight, bias, "gelu", keeps_z)
    tiles = configs.linear_tiles(architecture.architecture(x.device))
    least_rows = 2 * len(x)  # a tile of more rows would be mostly empty
    fitting = [tile for tile in tiles if tile.block_m <= max(least_rows, 16)]
    return {CUBLAS: two_kernels, **{str(tile): partial(fused, tile=tile) for tile in fitting}}


def seconds(runs: dict[str, Run], device: torch.device, rounds: int = 40) -> dict[str, float]:
    """The median time of each, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in rotated(list(runs), turn):
            times[name].append(machine.time_on_device(runs[name], device))
    return {name: median(found) for name, found in times.items()}


def measure(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    keeps_z: bool,
    device: torch.device,
    clock: Callable[[dict[str, Run], torch.device], dict[str, float]] = seconds,
) -> tuple[linear_table.Row, dict[str, float]]:
    """The table's row for one product, and the microseconds of each way.

    Raises:
        RuntimeError: a way's result is wrong.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    x, weight, bias = (t.to(dtype) for t in (draw(M, K), draw(N, K) * K**-0.5, draw(N)))
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    gate = twice_eager_gate(expected, F.gelu(F.linear(x, weight, bias)))
    runs = ways(x, weight, bias, keeps_z)
    for name, run in runs.items():
        reason = gate.reason(run()[0])
        if reason is not None:
            raise RuntimeError(f"{name} is wrong at {M} x {K} -> {N}: {reason}")
    times = {name: round(1e6 * time, 2) for name, time in clock(runs, device).items()}
    best = min((name for name in times if name != CUBLAS), key=times.__getitem__)
    row = linear_table.Row(
        architecture=architecture.architecture(device),
        dtype=str(dtype).removeprefix("torch."),
        M=M,
        N=N,
        K=K,
        activation="gelu",
        keeps_z=keeps_z,
        tile=None if times[CUBLAS] <= times[best] else configs.LinearTile.parse(best),
        cublas_us=times[CUBLAS],
        triton_us=times[best],
        device=machine.device_name(device),
        date=datetime.date.today().isoformat(),
    )
    return row, times


def merge(path: Path, new: Sequence[linear_table.Row]) -> None:
    """Puts `new` into the table at `path`, in place of rows for the same products; it begins as the committed one."""
    rows = {row.key: row for row in linear_table.read(path if path.exists() else linear_table.FILE)}
    rows |= {row.key: row for row in new}
    linear_table.write(path, [rows[key] for key in sorted(rows)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="M, each taken as its bucket")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", type=Path, default=linear_table.FILE)
    parser.add_argument(
        "--tiny", action="store_true", help="one tiny product, with TRITON_INTERPRET=1: measures nothing"
    )
    chosen = parser.parse_args(arguments)
    if min(chosen.rows) < 1:
        parser.error("--rows must be at least 1")
    models, dtypes, buckets = chosen.models, chosen.dtype, dict.fromkeys(map(linear_table.bucket, chosen.rows))
    if chosen.tiny:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--tiny needs TRITON_INTERPRET=1")
        models, dtypes, buckets = ["tiny"], ["fp16"], [16]
    elif not torch.cuda.is_available():
        print("tune_linear: there is no GPU here, and the table is measured on one", file=sys.stderr)
        return 1
    device = machine.pick_device("cpu" if chosen.tiny else "cuda:0")
    failures = 0
    print(f"{'M x K -> N':22}{'dtype':6}{'':10}microseconds of each way")
    for model, dtype, M, keeps_z in itertools.product(models, dtypes, buckets, (False, True)):
        N, K = MODELS.get(model, TINY)
        line = f"{f'{M} x {K} -> {N}':22}{dtype:6}{'training' if keeps_z else 'inference':10}"
        try:
            row, times = measure(M, N, K, DTYPES[dtype], keeps_z, device)
        except Exception as error:  # the other products are measured all the same
            failures += 1
            print(f"{line}{type(error).__name__}: {error}", flush=True)
            continue
        ordered = sorted(times.items(), key=lambda item: item[1])
        print(line + ", ".join(f"{name} {time:.1f}" for name, time in ordered), flush=True)
        merge(chosen.output, [row])
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
