"""BERT encoders side by side: transformers, ONNX Runtime, OpenVINO, CTranslate2 and fastbert.

    python benchmarks/bench_encoder.py --quick                          # packing pays, and costs nothing
    python benchmarks/bench_encoder.py --targets                        # the rows that must hold, and whether they do
    python benchmarks/bench_encoder.py --providers fastbert 'openvino*' onnxruntime-int8 --dtype bf16 int8
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
from acceptance import targets
from assets import AssetUnavailable, fetch
from encoders import BASELINE, COMPARED, PRECISIONS, Encoders, chosen, quiet_transformers
from harness import Case, Harness, Provider
from workload import SEED, filled_lengths, forward_flops, log_normal_lengths, make_batch

RESULTS = Path(__file__).resolve().parent / "results"
PADDED_BAR, FULL_BAR = 4.0, 0.97
# The encoder rows that must hold: model, batch x length (None: the log-normal texts), fastbert's precisions, the
# peers'. Left out where they cannot be the best: fp32 next to bf16, eager next to sdpa.
TARGET_ROWS: tuple[tuple[str, tuple[int, int] | None, tuple[str, ...], tuple[str, ...]], ...] = (
    ("bert-base", (1, 16), ("bf16", "int8"), ("bf16", "int8")),
    ("bert-base", (1, 128), ("bf16",), ("bf16", "int8")),
    ("bert-base", (8, 128), ("fp32", "fp32-high", "bf16", "int8"), ("fp32", "bf16", "int8")),
    ("bert-base", (32, 128), ("bf16", "int8"), ("bf16", "int8")),
    ("bert-base", (32, 512), ("bf16",), ("bf16",)),
    ("minilm", (8, 128), ("bf16",), ("bf16", "int8")),
    ("minilm", (32, 128), ("bf16",), ("bf16", "int8")),
    ("minilm", None, ("bf16",), ("bf16", "int8")),
)
# Models with random weights. That changes no speed in a dense precision; it does change the errors of int8.
RANDOM: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert",
        dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "bert-tiny": (
        "bert",
        dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    ),
    "roberta-base": ("roberta", dict(max_position_embeddings=514, type_vocab_size=1)),
    "distilbert-base": ("distilbert", {}),
    "mpnet-base": ("mpnet", dict(max_position_embeddings=514)),
    "nomic-base": ("nomic_bert", {}),
    "gte-base": ("gte", dict(vocab_size=30528, pad_token_id=0)),
    "modernbert-base": ("modernbert", dict(pad_token_id=0)),
    "eurobert-210m": (
        "eurobert",
        dict(vocab_size=32768, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3),
    ),
}
LEFT_OUT = ("transformers-eager", "torch-compile-graphs", "fastbert-reference", "fastbert-accelerate")
# Rounds that a ratio near 1 takes: medians of fewer calls wander by more than the 3 % in question.
FULL_ROUNDS = 30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog="example: python benchmarks/bench_encoder.py --quick --model minilm --dtype fp32 bf16",
    )
    add = parser.add_argument
    add("--model", help=f"minilm (real weights, the default), {', '.join(RANDOM)} (random ones), or a folder")
    add("--targets", action="store_true", help="the rows that must hold, on both models or --model, and the verdict")
    add("--texts", action="store_true", help="the log-normal texts alone, with a verdict")
    add("--quick", action="store_true", help="the log-normal texts and 8x128 without pads, with a verdict")
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes of the grid")
    add("--length", type=int, nargs="+", default=[16, 128, 512], help="padded lengths of the grid")
    add("--fill", type=float, nargs="+", default=[0.5, 1.0], help="shares of real tokens, in (0, 1]")
    add("--dtype", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"])
    add("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1")
    add(
        *("--providers",),
        nargs="+",
        metavar="PATTERN",
        help="only these: fastbert, openvino-bf16, 'onnx*' (default: all that are installed; sdpa is always there)",
    )
    add("--seconds", type=float, default=15.0, help="of timing a case, past its least rounds")
    add("--rounds", type=int, default=0, help="least rounds of each case")
    add("--threads", type=int, help="of torch on the CPU")
    add("--output", type=Path, help="CSV to append to (benchmarks/results/encoder-DEVICE.csv)")
    parsed = parser.parse_args(arguments)
    if not all(0 < fill <= 1 for fill in parsed.fill):
        parser.error("--fill must lie in (0, 1]")
    if min([*parsed.batch, *parsed.length]) < 1:
        parser.error("--batch and --length must be at least 1")
    whole = [row[0] for row in TARGET_ROWS] if parsed.targets else ["minilm"]
    parsed.models = [parsed.model] if parsed.model else list(dict.fromkeys(whole))
    return parsed


@contextmanager
def model_folder(name: str) -> Iterator[Path]:
    """The folder of a model: MiniLM's from its package, one of RANDOM made for the occasion, or a given one."""
    if name == "minilm":
        yield fetch("minilm")
    elif name in RANDOM:
        from transformers import AutoConfig, AutoModel

        with TemporaryDirectory() as folder:
            torch.manual_seed(SEED)
            kind, sizes = RANDOM[name]
            AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
            yield Path(folder)
    elif (Path(name) / "config.json").is_file():
        yield Path(name)
    else:
        raise SystemExit(
            f"--model {name}: neither minilm, nor one of {', '.join(RANDOM)}, nor a folder with a config.json"
        )


class Cases:
    """Makes cases for one model and device."""

    def __init__(self, model: str, config: Any, device: torch.device) -> None:
        self.model = Path(model).name
        self.config, self.device = config, device

    def case(self, name: str, lengths: list[int], *, with_mask: bool = True, **settings: Any) -> Case:
        batch = make_batch(lengths, self.config.vocab_size, self.device, with_mask=with_mask)
        return Case(
            op="encoder",
            model=self.model,
            name=name,
            shape=f"{len(lengths)}x{max(lengths)}",
            fill=sum(lengths) / batch.mask.numel(),
            tokens=sum(lengths),
            texts=len(lengths),
            flops=forward_flops(self.config, lengths),
            payload=batch,
            **settings,
        )

    def quick(self) -> Iterator[Case]:
        """The targets: packing pays on texts as they come, and costs nothing where there is no pad."""
        yield self.log_normal(bar=PADDED_BAR)
        full = [min(128, self.config.max_position_embeddings)] * 8
        settings: dict[str, Any] = {"bar": FULL_BAR, "min_rounds": FULL_ROUNDS}
        yield self.case("no padding, no mask", full, with_mask=False, **settings)
        yield self.case("no padding, mask of ones", full, **settings)

    def log_normal(self, **settings: Any) -> Case:
        longest = min(256, self.config.max_position_embeddings)
        return self.case("log-normal texts", log_normal_lengths(longest=longest), **settings)

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
    lines = [
        "",
        f"{case.model}, {case.name}, {case.shape}, fill {case.fill:.2f}, {case.tokens} real tokens",
        f"  {'provider':26}{'':10}{'p50 ms':>9}  {'p20 - p80':^19}{'tokens/s':>10}{'x sdpa':>8}{'ceiling':>9}{'MB':>7}"
        f"{'error':>9}",
    ]
    speeds = {row["dtype"]: row["tokens_per_s"] for row in rows if row["provider"] == BASELINE}
    for row in rows:
        name = f"  {row['provider']:26}{row['dtype']:10}"
        if row["status"] != "ok":
            lines.append(f"{name}{row['status']}")
            continue
        baseline = speeds.get(row["dtype"]) or speeds.get(COMPARED.get(row["dtype"], ""))
        ratio = row["tokens_per_s"] / baseline if baseline else None
        verdict = ""
        if case.bar and ratio and row["provider"].startswith("fastbert"):
            verdict = f"  {'PASS' if ratio >= case.bar else 'MISS'} (>= {case.bar:g}x)"
        spread = f"{row['p20_ms']:.1f} - {row['p80_ms']:.1f}"
        share = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        lines.append(
            f"{name}{row['p50_ms']:9.1f}  {spread:^19}{row['tokens_per_s']:10,.0f}"
            f"{f'{ratio:.2f}' if ratio else '':>8}{share:>9}{row['peak_memory_mb']:7.0f}{error:>9}{verdict}"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what was asked for; returns the rows."""
    device = machine.pick_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name = "targets" if arguments.targets else "encoder"
    output = arguments.output or RESULTS / f"{name}-{device.type}.csv"
    harness = Harness(device, output, seconds=arguments.seconds, min_rounds=arguments.rounds)
    print(f"device: {machine.device_name(device)}\nrows go to {output}")
    for model in arguments.models:
        with model_folder(model) as folder:
            run_model(arguments, harness, model, folder)
    return harness.rows


def run_model(arguments: argparse.Namespace, harness: Harness, model: str, folder: Path) -> None:
    from transformers import AutoConfig

    encoders = Encoders(folder, harness.device)
    cases = Cases(model, AutoConfig.from_pretrained(folder), harness.device)
    if arguments.targets:
        work = target_work(cases, encoders.providers(), arguments.providers)
    else:
        if arguments.texts:
            plan = iter([cases.log_normal(bar=PADDED_BAR)])
        elif arguments.quick:
            plan = cases.quick()
        else:
            plan = cases.grid(arguments.batch, arguments.length, arguments.fill)
        providers = chosen(encoders.providers(), arguments.providers, arguments.dtype)
        work = ((case, providers) for case in plan)
    for case, providers in work:
        rows = harness.run_case(case, providers, lambda provider, c=case: encoders.gate(c, provider))
        print(table(case, rows), flush=True)


def target_work(
    cases: Cases, providers: list[Provider], patterns: list[str] | None
) -> Iterator[tuple[Case, list[Provider]]]:
    """The cases of TARGET_ROWS for one model, each with its providers; a runtime that is not installed has its row."""
    for model, shape, own, public in TARGET_ROWS:
        if model != cases.model:
            continue
        wanted = chosen(providers, patterns or ["*"], list(PRECISIONS))
        wanted = [
            provider
            for provider in wanted
            if provider.name not in LEFT_OUT
            and provider.dtype in (own if provider.name == "fastbert" else public)
            and (shape is None or not provider.name.endswith("-sorted"))
        ]
        yield (cases.log_normal() if shape is None else cases.case("grid", [shape[1]] * shape[0])), wanted


def summary(rows: list[dict[str, Any]]) -> str:
    """How many rows did not come out, and the ceilings that the shares refer to."""
    broken = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    # A ceiling is measured again for each case, and only grows.
    ceilings = {row["ceiling"]: f"{row['ceiling_tflops']:.2f} TFLOP/s" for row in rows if row["ceiling"]}
    return "\n".join(
        [
            "",
            "x sdpa: tokens/s against transformers-sdpa on the same padded batch (fp32-high: in fp32, int8: in bf16).",
            "MB: a call's own peak. error: RMS, as a share of the RMS of what is right.",
            f"ceiling: share of {'; '.join(f'{what}: {figure}' for what, figure in sorted(ceilings.items()))}.",
            f"{len(rows)} rows, {len(broken)} wrong or failed.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    quiet_transformers()
    warnings.filterwarnings("ignore", module="torch")
    try:
        rows = run(parsed)
    except (AssetUnavailable, ValueError) as error:
        print(f"bench_encoder: {error}", file=sys.stderr)
        return 1
    print(summary(rows))
    if parsed.targets:
        own = [target for target in targets.TARGETS if target.where["op"] == "encoder"]
        print(f"\n{targets.report(targets.evaluate(rows, own))}\n{targets.streaming(rows)}")
    return int(any(row["status"].startswith(("wrong", "failed")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
