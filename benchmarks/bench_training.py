"""A step of masked-language-model training of BERT-base on real text, on a CPU, against transformers'.

    python benchmarks/bench_training.py --dtype fp32

The texts are leads of the English Wikipedia in MiniLM's vocabulary, cut at 128 tokens, as `fastbert prepare` and its
batches give them; transformers gets the same sequences, masks and labels, padded. Dropout 0.1, AdamW, bf16 by autocast.
First the loss and gradients without dropout are held to those of transformers in fp32. Then the steps are timed in
turn, and each trainer's peak memory is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fresh
import torch
from assets import AssetUnavailable, fetch, wiki_leads
from encoders import quiet_transformers
from gpu_suite import joined, sizes, table
from harness import Case, Gate, Harness, Prepared, Provider, append_rows, check_columns, relative_gate, twice_eager_gate
from torch import Tensor, nn
from workload import SEED, training_flops

import fastbert
from fastbert.training.batches import PackedBatches, PretrainingBatch
from fastbert.training.objective import MicroBatch, Objective
from fastbert.training.optimizer import make_optimizer
from fastbert.training.prepare import PrepareSettings, prepare
from fastbert.training.settings import OptimizerSettings
from fastbert.training.shards import Shards

RESULTS = Path(__file__).resolve().parent / "results"
MAX_LENGTH = 128
SPEED, MEMORY = 2.0, 0.6  # what must hold against transformers
FP32_LIMIT = 1e-4  # of the gradients' root mean square

# The model, and what makes a batch's loss of it.
Trained = tuple[nn.Module, Callable[[PretrainingBatch], Tensor]]


def prepared_text(folder: Path) -> Path:
    """Shards of the Wikipedia leads below `folder`."""
    text = folder / "wiki.txt"
    text.write_text("\n\n".join(wiki_leads()))
    settings = PrepareSettings(max_length=MAX_LENGTH, pairs=False, seed=SEED)
    prepare([text], folder / "shards", settings, vocab=fetch("minilm") / "vocab.txt", lower=True)
    return folder / "shards"


def padded(batch: PretrainingBatch) -> dict[str, Tensor]:
    """transformers' arguments of a packed batch."""
    lengths = batch.cu_seqlens.diff().tolist()

    def pad(values: Tensor, filler: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=filler)

    return {
        "input_ids": pad(batch.input_ids, 0),
        "token_type_ids": pad(batch.token_type_ids, 0),
        "attention_mask": pad(torch.ones_like(batch.input_ids), 0),
        "labels": pad(batch.labels, -100),
    }


def load_fastbert(folder: Path, *, recompute: bool = False) -> Trained:
    model = fastbert.BertForMaskedLM.from_pretrained(folder).train()
    if recompute:
        model.recompute_activations(True)
    objective = Objective(model)

    def loss_of(batch: PretrainingBatch) -> Tensor:
        micro_batch = MicroBatch.of(batch, model.config, "mlm", "cpu")
        return objective(micro_batch, micro_batch.counts).sum()

    return model, loss_of


def load_transformers(folder: Path) -> Trained:
    from transformers import BertForMaskedLM

    quiet_transformers()
    model = BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").train()
    return model, lambda batch: model(**padded(batch)).loss


TRAINERS: dict[str, Callable[[Path], Trained]] = {
    "fastbert": load_fastbert,
    "fastbert-recompute": partial(load_fastbert, recompute=True),
    "transformers-sdpa": load_transformers,
}


def precision(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()


def gradients(trained: Trained, batch: PretrainingBatch, dtype: str) -> list[Tensor]:
    """The loss without dropout, and the gradients of the first and last layers' weights and the head's."""
    model, loss_of = trained
    model.eval()
    with precision(dtype):
        loss = loss_of(batch)
    loss.backward()
    last = model.config.num_hidden_layers - 1
    wanted = (".layer.0.", f".layer.{last}.", ".transform.")
    found = {n: p.grad for n, p in model.named_parameters() if n.endswith("weight") and any(w in n for w in wanted)}
    model.zero_grad(set_to_none=True)
    model.train()
    return [loss.detach().float(), *(found[name] for name in sorted(found))]


def stepper(trained: Trained, batch: PretrainingBatch, dtype: str) -> Callable[[], Tensor]:
    """A whole step: forward, backward, AdamW. Everyone has the same optimizer."""
    model, loss_of = trained
    optimizer = make_optimizer(model, OptimizerSettings(lr=1e-5))

    def run() -> Tensor:
        with precision(dtype):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


# sys.argv: threads, the benchmarks' folder, the model's, the shards', tokens, the trainer, the precision.
MEMORY_PROGRAM = """
sys.path.insert(0, sys.argv[2])
import bench_training as b
batch = b.first_batch(Path(sys.argv[4]), int(sys.argv[5]))
run = b.stepper(b.TRAINERS[sys.argv[6]](Path(sys.argv[3])), batch, sys.argv[7])
result = [float(run()) for _ in range(3)]
"""


def first_batch(shards: Path, tokens: int) -> PretrainingBatch:
    return next(iter(PackedBatches(Shards(shards), tokens_per_batch=tokens, seed=SEED)))


def measure(
    model: Path, shards: Path, tokens: int, dtype: str, output: Path | None, seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    batch = first_batch(shards, tokens)
    lengths = batch.cu_seqlens.diff().tolist()
    exact = gradients(load_transformers(model), batch, "fp32")
    scales = sizes(exact)
    expected = joined(exact, scales)
    if dtype == "fp32":
        gate = relative_gate(expected, FP32_LIMIT)
    else:
        eager = joined(gradients(load_transformers(model), batch, dtype), scales)
        # The root mean square alone: which of millions of gradients is the furthest off is chance.
        gate = Gate(expected, float("inf"), twice_eager_gate(expected, eager).rms_error)
    config = fastbert.BertConfig.from_pretrained(model)
    case = Case(
        op="training step",
        model="bert-base" if config.num_hidden_layers == 12 else "bert-tiny",
        name="wikipedia leads",
        shape=f"{len(lengths)}x{max(lengths)}",
        fill=len(batch.input_ids) / (len(lengths) * max(lengths)),
        tokens=len(batch.input_ids),
        texts=len(lengths),
        flops=training_flops(config, lengths, int((batch.labels >= 0).sum())),
        mode="step",
        min_rounds=min_rounds,
    )

    def provider(name: str) -> Provider:
        def prepare(_: Case) -> Prepared:
            trained = TRAINERS[name](model)
            first = joined(gradients(trained, batch, dtype), scales)
            return Prepared(stepper(trained, batch, dtype), lambda _: first)

        return Provider(name, prepare, dtype)

    harness = Harness(torch.device("cpu"), seconds=seconds, max_rounds=max(min_rounds, 10))
    rows = harness.run_case(case, [provider(name) for name in TRAINERS], lambda _: gate)
    for row in rows:
        arguments = (Path(__file__).parent, model, shards, tokens, row["provider"], dtype)
        row["peak_memory_mb"] = None
        if row["status"] == "ok":
            found = fresh.run(MEMORY_PROGRAM, *arguments)
            row["peak_memory_mb"] = found["peak_mb"] - found["before_mb"]
            row["peak_memory_kind"] = "process RSS of three steps, above torch's import"
    if output is not None:
        append_rows(output, rows)
    print(table(case, rows), flush=True)
    return rows


def verdict(rows: list[dict[str, Any]]) -> bool:
    """Says of each of our rows how it stands against transformers'; whether both limits hold for one of them."""
    (peer,) = (row for row in rows if row["provider"].startswith("transformers"))
    held = []
    for row in rows:
        if row is peer or row["status"] != "ok" or peer["status"] != "ok":
            continue
        speed = row["tokens_per_s"] / peer["tokens_per_s"]
        memory = row["peak_memory_mb"] / peer["peak_memory_mb"]
        print(f"  {row['provider']}: {speed:.2f} times transformers' tokens/s, {memory:.2f} of its peak memory")
        held.append(speed >= SPEED and memory <= MEMORY)
    passed = any(held)
    print(f"{'PASS' if passed else 'MISS'} (at least {SPEED:g} times, at most {MEMORY:g})", flush=True)
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_training.py --dtype bf16"
    )
    add = parser.add_argument
    add("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--tokens", type=int, default=4096, help="real tokens a step, pads apart")
    add("--rounds", type=int, default=3, help="steps of each, at least")
    add("--seconds", type=float, default=60.0, help="of timing a precision, past its least rounds")
    add("--layers", type=int, default=12, help="fewer show that it runs, and measure nothing")
    add("--output", type=Path, default=RESULTS / "training-cpu.csv", help="CSV to append to")
    chosen = parser.parse_args(arguments)
    if chosen.tokens < MAX_LENGTH:
        parser.error(f"--tokens is {chosen.tokens}; it must be at least {MAX_LENGTH}")
    try:
        check_columns(chosen.output)
    except ValueError as error:
        print(f"bench_training: {error}", file=sys.stderr)
        return 1
    passed = []
    with TemporaryDirectory() as folder:
        try:
            shards = prepared_text(Path(folder))
        except AssetUnavailable as reason:
            print(f"bench_training: {reason}", file=sys.stderr)
            return 1
        torch.manual_seed(SEED)
        model = Path(folder) / "model"
        fastbert.BertForMaskedLM(fastbert.BertConfig(num_hidden_layers=chosen.layers)).save_pretrained(model)
        for dtype in chosen.dtype:
            rows = measure(model, shards, chosen.tokens, dtype, chosen.output, chosen.seconds, chosen.rounds)
            passed.append(verdict(rows))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
