"""How much of BERT's speed other families reach on the same texts, FLOP for FLOP.

    python benchmarks/bench_families.py --models roberta-base mpnet-base distilbert-base

Base shapes with random weights, the 64 log-normal texts; the models run by turns. MPNet's attention reads a bias that
depends on the distance, so it may be a tenth slower; the others a twentieth.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench_encoder import RANDOM, Cases, model_folder
from encoders import PRECISIONS, load_fastbert, quiet_transformers
from harness import percentile, rotated
from machine import time_call

BERT = "bert-base"
CPU = torch.device("cpu")
FLOORS = {"mpnet-base": 0.90}  # of BERT's FLOP/s
FLOOR = 0.95


def prepare(name: str, dtype: str) -> tuple[Callable[[], Any], int]:
    """The call to time, and its FLOPs."""
    from transformers import AutoConfig

    with model_folder(name) as folder:
        case = Cases(name, AutoConfig.from_pretrained(folder), CPU).log_normal()
        model = load_fastbert(folder, dtype)
    return lambda: model(**case.payload.inputs), case.flops


@torch.inference_mode()
def measure(names: list[str], dtype: str, rounds: int) -> dict[str, float]:
    """TFLOP/s of each model, at its median time."""
    prepared = {name: prepare(name, dtype) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first is not kept: memory is new
        for name in rotated(names, turn):
            taken = time_call(prepared[name][0], CPU)
            if turn:
                times[name].append(taken)
    return {name: flops / percentile(times[name], 50) / 1e12 for name, (_, flops) in prepared.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog="example: python benchmarks/bench_families.py --models mpnet-base --rounds 20",
    )
    default = ["roberta-base", "mpnet-base", "distilbert-base"]
    parser.add_argument("--models", nargs="+", choices=list(RANDOM), default=default, metavar="MODEL")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args(arguments)
    quiet_transformers()
    warnings.filterwarnings("ignore", module="torch")
    found = measure(list(dict.fromkeys([BERT, *args.models])), args.dtype, args.rounds)
    missed = 0
    print(f"{args.dtype:<20} TFLOP/s   of BERT's")
    for name, speed in found.items():
        share, floor = speed / found[BERT], FLOORS.get(name, FLOOR)
        missed += share < floor
        print(f"{name:<20}{speed:8.3f}{share:12.3f}   {'PASS' if share >= floor else 'MISS'} (>= {floor:.2f})")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
