"""The targets on an H200, and which of them hold: reads the GPU suite's rows and prints one line a target.

    python benchmarks/acceptance/gpu_targets.py benchmarks/results/gpu-*.csv

A target without a row, or whose row has no time, is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import read_rows

from acceptance.targets import Row, Target, Verdict, evaluate, report

PAPER_TFLOPS = 989.0  # H200, dense bf16, by its data sheet: what a share of peak is commonly quoted of
STEP = {"op": "training step", "model": "bert-large", "case": "packed rows", "dtype": "bf16"}


def encoder(model: str, case: str, **where: str) -> dict[str, str]:
    return {"op": "encoder", "model": model, "case": case, "dtype": "bf16"} | where


def _targets() -> list[Target]:
    found = []
    for length, wanted in ((512, 340), (2048, 400), (16384, 480)):
        where = {"op": "attention", "mode": "forward", "case": f"length {length}", "dtype": "bf16"}
        found += [
            Target(f"attention forward {length}, TFLOP/s", where, wanted, "tflops"),
            Target(f"attention forward {length}, best of torch", where, 1.0, "tflops", peers=("bf16",)),
        ]
    for length, wanted in ((512, 240), (2048, 330)):
        where = {"op": "attention", "mode": "backward", "case": f"length {length}", "dtype": "bf16"}
        found.append(Target(f"attention backward {length}, TFLOP/s", where, wanted, "tflops"))
    for mode, wanted in (("forward", 0.85), ("backward", 0.75)):
        for width in (768, 1024):
            where = {"op": "add_layer_norm", "mode": mode, "case": f"N {width}", "dtype": "bf16"}
            found.append(Target(f"add_layer_norm {mode} N {width}, share of a copy", where, wanted, "ceiling_share"))
    full = encoder("bert-base", "full", shape="128x128")
    found.append(Target("BERT-base bf16 128x128, tokens/s", full, 3.0e6))
    for dtype, wanted in (("bf16", 5400), ("int8", 8200)):
        where = encoder("bert-large", "SQuAD-like lengths", dtype=dtype)
        found.append(Target(f"BERT-large {dtype} SQuAD-like lengths, samples/s", where, wanted, "texts_per_s"))
    normal = encoder("bert-base", "lengths N(256, 64)")
    line = "BERT-base N(256, 64), given padded, best of transformers"
    found.append(Target(line, normal, 2.0, peers=("bf16",), sorted_only=False))
    short, long = (encoder("bert-base", "one text", shape=shape) for shape in ("1x16", "1x128"))
    repeat = {"op": "determinism", "model": "bert-base"}
    graph, eager = {"provider": "fastbert-graph"}, {"peers": ("bf16",), "against": "transformers-*"}
    found += [
        Target("BERT-base 1x128 by a graph, ms", long, 0.45, "p50_ms", at_most=True, **graph),
        Target(
            "BERT-base 1x16 by a graph, transformers eager", short, 12.0, peers=("bf16",), **graph,
            against="transformers-eager",
        ),
        Target("BERT-base 1x16 eager, best of transformers", short, 1.0, **eager),
        Target("BERT-base 1x128 eager, best of transformers", long, 1.0, **eager),
        Target("BERT-large training step, tokens/s", STEP, 205e3),
        Target("BERT-large training step, best of transformers", STEP, 1.5, peers=("bf16",)),
        Target(
            "BERT-large training step, memory of transformers", STEP, 0.6, "peak_memory_mb", peers=("bf16",),
            at_most=True,
        ),
        Target("two runs bit-equal, numbers that differ", repeat, 0.0, "max_error", at_most=True),
    ]  # fmt: skip
    return found


TARGETS = _targets()


def training_share(rows: Sequence[Row]) -> str:
    """Every training row as a share of the data sheet's peak."""
    found = [row for row in rows if row["op"] == STEP["op"] and row["status"] == "ok" and row["tflops"]]
    shares = [f"{row['provider']} {float(row['tflops']) / PAPER_TFLOPS:.1%}" for row in found]
    return f"training step, share of {PAPER_TFLOPS:.0f} TFLOP/s: {', '.join(shares) or 'no row with a time'}"


def judge(files: Sequence[Path]) -> tuple[list[Verdict], str]:
    rows = [row for file in files for row in read_rows(file)]
    verdicts = evaluate(rows, TARGETS)
    return verdicts, f"{report(verdicts)}\n{training_share(rows)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog="example: python benchmarks/acceptance/gpu_targets.py benchmarks/results/gpu-*.csv",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV", help="results to judge")
    try:
        verdicts, text = judge(parser.parse_args(arguments).files)
    except OSError as error:
        print(f"gpu_targets: {error}", file=sys.stderr)
        return 1
    print(text)
    return int(not all(verdict.held for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
