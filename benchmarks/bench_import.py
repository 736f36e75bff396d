"""The time that importing fastbert adds to importing torch, in fresh processes.

    python benchmarks/bench_import.py --rounds 15

Two kinds of process take turns: one imports torch, the other torch and then fastbert. The time that counts
is the one between the two imports of the second kind; the whole processes are shown next to it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch
from harness import COLUMNS, append_rows, check_columns, percentile, rotated

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT_MS = 150.0
# Nothing that fastbert's users have not imported themselves may come along.
FORBIDDEN = ("triton", "transformers", "tokenizers", "matplotlib", "sentence_transformers")
PROGRAM = f"""
import sys, time
import torch
already = set(sys.modules)
begin = time.perf_counter()
import fastbert
taken = time.perf_counter() - begin
print(taken, *(name for name in {FORBIDDEN!r} if name in sys.modules and name not in already))
"""


def measure(rounds: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of each kind, one of each a round, and the forbidden modules that fastbert imported."""
    times: dict[str, list[float]] = {"torch": [], "torch, fastbert": [], "fastbert after torch": []}
    programs = {"torch": "import torch", "torch, fastbert": PROGRAM}
    brought: list[str] = []
    for turn in range(-1, rounds):  # the first round warms the disk cache and is not counted
        for name in rotated(tuple(programs), max(turn, 0)):
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", programs[name]], capture_output=True, text=True, check=True)
            taken = time.perf_counter() - begin
            if turn < 0:
                continue
            times[name].append(taken)
            if name == "torch, fastbert":
                seconds, *brought = done.stdout.split()
                times["fastbert after torch"].append(float(seconds))
    return times, brought


def row(times: list[float], status: str) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(COLUMNS)
    columns |= {"date": machine.now(), "op": "import", "mode": "fresh process", "case": "after torch"}
    columns |= {"provider": "fastbert", "status": status, "rounds": len(times)}
    columns |= {f"p{q}_ms": percentile(times, q) * 1e3 for q in (20, 50, 80)}
    return {**columns, **machine.environment(torch.device("cpu"))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_import.py"
    )
    parser.add_argument("--rounds", type=int, default=15, help="processes of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS / "import.csv", help="CSV to append to")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    check_columns(chosen.output)
    times, brought = measure(chosen.rounds)
    for name, values in times.items():
        p20, p50, p80 = (percentile(values, q) * 1e3 for q in (20, 50, 80))
        print(f"{name:24}{p50:8.0f} ms  ({p20:.0f} - {p80:.0f})")
    added = times["fastbert after torch"]
    # Like a wrong result, an import that brings along what it must not has a status and no time.
    status = f"wrong: it imports {', '.join(brought)}" if brought else "ok"
    result = row(added, status)
    if brought:
        result |= dict.fromkeys(("rounds", "p20_ms", "p50_ms", "p80_ms"))
    append_rows(chosen.output, [result])
    passed = not brought and percentile(added, 50) * 1e3 < LIMIT_MS
    print(f"{'PASS' if passed else 'MISS'} (< {LIMIT_MS:g} ms after torch)  {status}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
