"""Choices of a pre-training recipe and their worth: held-out loss after the same time, of a small BERT on Wikipedia.

    python benchmarks/bench_recipes.py --seconds 120 --output benchmarks/results/recipes.jsonl
    python benchmarks/bench_recipes.py --recipes Muon EMA --plot docs/pictures/recipes.png

Each recipe is the first with some settings changed. It first makes a few steps, whose median time says how many steps
fit into the seconds, and then trains from the start for that many: so a recipe that slows the step makes fewer. The
held-out text is masked alike for all. The step times are taken in turns of all recipes, and given as shares of the
first's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assets import fetch, wiki_leads
from workload import SEED

from fastbert.cli.pretrain import _heldout, batches_of, fresh_model, masking_of
from fastbert.training.objective import Counts
from fastbert.training.prepare import PrepareSettings, prepare
from fastbert.training.pretraining import Pretraining
from fastbert.training.settings import Settings, read_settings
from fastbert.training.shards import Shards

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SIZES |= {"max_position_embeddings": 128}
TOKENS, BATCHES, LENGTH, TIMED = 4096, 2, 128, 6  # of a batch, batches of a step, of an example, steps that are timed
WARMUP = 0.06  # of the steps
LARGE = 8  # batches of a large step
UPDATES = {"optimizer.name", "training.ema"}  # settings of what follows a step's gradients
# Settings, by section.key, in which each differs from the first; steps are given as shares of all steps.
RECIPES: dict[str, dict[str, Any]] = {
    "adamw, linear, 15 % masked": {},
    "30 % masked": {"data.mask_probability": 0.3},
    "30 % to 15 % masked": {"data.mask_probability": 0.3, "data.mask_probability_end": 0.15},
    "whole words": {"data.whole_words": True},
    "spans of 3": {"data.span_length": 3.0},
    "wsd, 1-sqrt": {"schedule.shape": "wsd"},
    "wsd, linear": {"schedule.shape": "wsd", "schedule.decay": "linear"},
    "StableAdamW": {"optimizer.name": "stable_adamw", "optimizer.max_grad_norm": 0.0},
    "Muon": {"optimizer.name": "muon"},
    "EMA": {"training.ema": 0.995},
    "longer sequences": {"data.length_start": 32, "data.length_warmup_steps": 0.3},
    "larger batches": {"data.batch_start": 1024, "data.batch_warmup_steps": 0.3},
}


def settings_of(shards: Path, folder: Path, changes: dict[str, Any], steps: int) -> Settings:
    values: dict[str, dict[str, Any]] = {
        "data": {"shards": str(shards), "tokens_per_batch": TOKENS, "heldout_batches": 8},
        "model": dict(SIZES),
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_share": WARMUP},
        "training": {"steps": steps, "objective": "mlm", "accumulate": BATCHES, "seed": SEED},
        "output": {"folder": str(folder), "tensorboard": False},
    }
    values["training"] |= {"log_every": max(1, steps // 20), "evaluate_every": max(1, steps // 8), "save_every": steps}
    for name, value in changes.items():
        section, key = name.split(".")
        values[section][key] = max(1, int(value * steps)) if key.endswith("_warmup_steps") else value
    return read_settings(values)


def run_of(shards: Path, folder: Path, changes: dict[str, Any], steps: int) -> Pretraining:
    settings = settings_of(shards, folder, changes, steps)
    data = Shards(shards)
    options = {"tokens_per_batch": TOKENS, "masking": masking_of(settings), "rank": 0, "world_size": 1}
    model = fresh_model(settings, data.tokenizer, data)
    # Held-out text is masked as by the first recipe, whatever the recipe does.
    plain = {**options, "masking": masking_of(settings_of(shards, folder, {}, steps))}
    return Pretraining(
        settings, model, data.tokenizer, batches_of(settings, [data], options), _heldout(settings, model.config, plain)
    )


def stepper(run: Pretraining) -> Callable[[], float]:
    """Makes a step and returns its seconds."""

    def step() -> float:
        start = time.perf_counter()
        batches = run.next_step()
        run._train(batches, sum((batch.counts for batch in batches), Counts()))
        return time.perf_counter() - start

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--seconds", type=float, default=120, help="of each training (default: 120)")
    parser.add_argument("--output", type=Path, help="a file of JSON lines to append to")
    parser.add_argument("--plot", type=Path, help="a PNG of the curves")
    args = parser.parse_args()
    first = next(iter(RECIPES))
    names = [first, *(name for name in args.recipes if name != first)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wiki.txt").write_text("\n\n".join(wiki_leads()), encoding="utf-8")
        prepared = PrepareSettings(max_length=LENGTH, pairs=False, seed=SEED, held_out=0.05)
        shards = folder / "shards"
        prepare([folder / "wiki.txt"], shards, prepared, vocab=fetch("minilm") / "vocab.txt", lower=True)
        steps = {name: stepper(run_of(shards, folder / f"t{i}", RECIPES[name], 1000)) for i, name in enumerate(names)}
        # A warm-up of sequences or batches makes its first steps cheaper: what is timed is a step after it.
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(TIMED + 1):
            for name in names:
                if not {"data.length_start", "data.batch_start"} & RECIPES[name].keys():
                    seconds = steps[name]()
                    times[name] += [seconds] if turn else []
        base = statistics.median(times[first])
        print(f"a step of {TOKENS * BATCHES:,} tokens takes {base * 1000:.0f} ms")
        del steps
        time_large_steps(shards, folder, [name for name in names if name == first or UPDATES & RECIPES[name].keys()])
        curves: dict[str, list[tuple[float, float]]] = {}
        for i, name in enumerate(names):
            step = statistics.median(times[name]) if times[name] else base
            count = max(8, int(args.seconds / step))
            if not times[name]:  # its warm-up saves time, which buys more steps
                count = _counted(shards, folder / f"c{i}", RECIPES[name], count, args.seconds)
            run = run_of(shards, folder / f"r{i}", RECIPES[name], count)
            start = time.perf_counter()
            run.run()
            seconds = time.perf_counter() - start
            lines = [json.loads(line) for line in (folder / f"r{i}" / "log.jsonl").read_text().splitlines()]
            heldout = [line for line in lines if line["kind"] == "heldout"]
            curves[name] = [(line["step"] / count, line["loss"]) for line in heldout]
            row = {"recipe": name, "steps": count, "seconds": seconds, "step_share": step / base}
            row |= {"loss": heldout[-1]["loss"], "accuracy": heldout[-1]["mlm_accuracy"], "curve": curves[name]}
            share = f"{step / base:5.2f}" if times[name] else "    -"
            print(
                f"  {name:28} {count:6,} steps  {share} of a step  loss {row['loss']:.3f}  {seconds:4.0f} s", flush=True
            )
            if args.output is not None:
                with open(args.output, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
    if args.plot is not None:
        draw(args.plot, curves)
    return 0


def time_large_steps(shards: Path, folder: Path, names: list[str]) -> None:
    """Prints what the recipes that change the update cost in a step of the size that people train with."""
    large = {"training.accumulate": LARGE}
    steps = {
        name: stepper(run_of(shards, folder / f"l{i}", RECIPES[name] | large, 1000)) for i, name in enumerate(names)
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(4):
        for name in names:
            seconds = steps[name]()
            times[name] += [seconds] if turn else []
    base = statistics.median(times[names[0]])
    for name in names[1:]:
        share = statistics.median(times[name]) / base
        print(f"  {name:28} {share:5.2f} of a step of {TOKENS * LARGE:,} tokens", flush=True)


def _counted(shards: Path, folder: Path, changes: dict[str, Any], count: int, seconds: float) -> int:
    """How many steps fit into the seconds where steps differ: by the time of some of them, evenly spread."""
    run = run_of(shards, folder, changes, count)
    times = []
    for part in range(8):
        run.step = part * count // 8
        stepper(run)()
        run.step = part * count // 8
        times.append(stepper(run)())
    return max(8, int(seconds / statistics.mean(times)))


def draw(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Plots held-out loss over the share of the time, the first recipe in black."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        colour = "black" if i == 0 else f"C{(i - 1) % 10}"
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2 if i == 0 else 1.2, label=name)
    axes.set(xlabel="share of the time", ylabel="held-out loss of masked words")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
