"""The common part of the GPU suite's scripts: subjects made of cases, their arguments, table and exit status."""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from accuracy import root_mean_square
from harness import Case, Gate, Harness, Provider
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Settings:
    """Where the suite runs, and whether at sizes that only show that it runs."""

    device: torch.device
    tiny: bool = False

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Work:
    """A case with who does it, what is right, and how it is timed."""

    case: Case
    providers: Sequence[Provider]
    gate: Callable[[Provider], Gate]
    clock: Callable[[Callable[[], Any], torch.device], float] = machine.time_call


Subject = Callable[[Settings], Iterator[Work]]


def compiled(function: Callable[..., Any], device: torch.device, **options: Any) -> Callable[..., Any]:
    """`function` by torch.compile for one shape; on a CPU traced only, which shows that it can be."""
    allow_compiling()
    return torch.compile(function, dynamic=False, backend=compiler(device), **options)


def compiler(device: torch.device) -> str:
    return "inductor" if device.type == "cuda" else "aot_eager"


def allow_compiling() -> None:
    """Many shapes of one function, none of them gone over to eager without a word."""
    torch._dynamo.config.recompile_limit = 64


def sizes(tensors: Sequence[Tensor]) -> list[float]:
    """The power of two next to each one's root mean square: what `joined` divides by, which rounds nothing."""
    return [2.0 ** round(math.log2(root_mean_square(t) or 1.0)) for t in tensors]


def joined(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Tensors of unlike size as one for the gate, each weighing by what it is relative to its own."""
    return torch.cat([t.detach().flatten() / scale for t, scale in zip(tensors, scales, strict=True)])


def table(case: Case, rows: Sequence[Mapping[str, Any]]) -> str:
    title = f"{case.op} {case.mode}, {case.model}, {case.name}, {case.shape}"
    lines = [
        "",
        f"{title:58}{'p50 ms':>10}{'tokens/s':>12}{'texts/s':>9}{'TFLOP/s':>9}{'GB/s':>7}{'ceiling':>9}{'MB':>8}",
    ]
    for row in rows:
        name = f"  {row['provider']:28}{row['dtype']:10}"
        if row["status"] != "ok":
            lines.append(f"{name}{row['status']}")
            continue
        share = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
        cells = [row["tokens_per_s"] or None, row["texts_per_s"], row["tflops"], row["gb_per_s"]]
        texts = ["" if cell is None else f"{cell:,.0f}" for cell in cells]
        lines.append(
            f"{name:58}{row['p50_ms']:10.4g}{texts[0]:>12}{texts[1]:>9}{texts[2]:>9}{texts[3]:>7}{share:>9}"
            f"{row['peak_memory_mb']:8,.0f}"
        )
    return "\n".join(lines)


def parse_arguments(
    arguments: list[str] | None, doc: str, script: str, subjects: Mapping[str, Subject]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n", 1)[0],
        epilog=f"example: python benchmarks/{script}.py --subjects {next(iter(subjects))}",
    )
    add = parser.add_argument
    add("--subjects", nargs="+", choices=list(subjects), default=list(subjects), help="all, unless named")
    add("--peers", action="store_true", help="the ceilings and the public runtimes alone, without fastbert")
    add("--tiny", action="store_true", help="sizes that take seconds on a CPU: shows that it runs, measures nothing")
    add("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1")
    add("--seconds", type=float, default=2.0, help="of timing a case, past its least rounds")
    add("--output", type=Path, help=f"CSV to append to (benchmarks/results/{script.removeprefix('bench_')}.csv)")
    parsed = parser.parse_args(arguments)
    parsed.output = parsed.output or RESULTS / f"{script.removeprefix('bench_').replace('_', '-')}.csv"
    return parsed


def main(arguments: list[str] | None, doc: str, script: str, subjects: Mapping[str, Subject]) -> int:
    """Runs the subjects asked for; 1 where a row is wrong or failed, or a subject could not be prepared."""
    parsed = parse_arguments(arguments, doc, script, subjects)
    warnings.filterwarnings("ignore", module="torch")
    device = machine.pick_device(parsed.device)
    if device.type != "cuda" and not parsed.tiny:
        print(f"{script}: no GPU here; --tiny runs it on a CPU at sizes that measure nothing", file=sys.stderr)
        return 1
    settings = Settings(device, parsed.tiny)
    print(f"device: {machine.device_name(device)}\nrows go to {parsed.output}", flush=True)
    rows, broken = [], []
    for name in parsed.subjects:
        begin = time.perf_counter()
        try:
            for work in subjects[name](settings):
                providers = [p for p in work.providers if not (parsed.peers and p.name.startswith("fastbert"))]
                if not providers:
                    continue
                bench = Harness(
                    device, parsed.output, seconds=parsed.seconds, ceilings=not parsed.tiny, clock=work.clock
                )
                done = bench.run_case(work.case, providers, work.gate)
                print(table(work.case, done), flush=True)
                rows += done
        except Exception:  # one subject without the memory for its reference must not take the others with it
            traceback.print_exc()
            broken.append(name)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    wrong = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    print(
        f"\n{len(rows)} rows, {len(wrong)} wrong or failed" + (f"; broken off: {', '.join(broken)}" if broken else "")
    )
    return int(bool(wrong or broken))
