"""BERT forward on a GPU against transformers': a full batch, SQuAD-like and normal lengths, one text at a time.

    python benchmarks/bench_gpu_models.py
    python benchmarks/bench_gpu_models.py --subjects latency

The weights are random. Every provider's output is held to transformers' fp32 eager numbers, as bench_encoder's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_suite
import machine
import torch
from bench_encoder import Cases, model_folder
from encoders import Encoders, backends_in_use, load_fastbert, quiet_transformers
from gpu_suite import Settings, Work
from harness import Case, Prepared, Provider, Unsupported
from peers.torch_runtime import compile_layers, load
from workload import log_normal_lengths, normal_lengths

import fastbert
from fastbert.inference.batching import token_budget_batches

FULL = (128, 128)  # batch x length
SQUAD_TEXTS, SQUAD_BUDGET, SQUAD_SORTED = 1024, 65536, 64  # texts, tokens of a packed batch, texts of a padded one
NORMAL_TEXTS = 128
LATENCY_LENGTHS = (16, 128)


class Runs:
    """The providers over one model's folder."""

    def __init__(self, settings: Settings, model: str, folder: Any) -> None:
        from transformers import AutoConfig

        self.settings, self.encoders = settings, Encoders(folder, settings.device)
        self.source = self.encoders.source
        self.cases = Cases(model, AutoConfig.from_pretrained(folder), settings.device)
        self.known = {provider.label: provider for provider in self.encoders.providers()}

    def work(self, case: Case, providers: Sequence[Provider], clock: Callable[..., float] = machine.time_call) -> Work:
        return Work(case, providers, lambda provider: self.encoders.gate(case, provider), clock)

    def named(self, *labels: str) -> list[Provider]:
        return [self.known[label] for label in labels]

    def fastbert(self, dtype: str) -> fastbert.BertModel:
        return self.source.once(
            ("fastbert", dtype), lambda: load_fastbert(self.source.folder, dtype, self.settings.device)
        )

    def compiled(self, case: Case) -> Prepared:
        """transformers with sdpa, its layers compiled for the shape of this batch."""
        gpu_suite.allow_compiling()
        backend = gpu_suite.compiler(self.settings.device)
        model = self.source.once(
            "compiled layers", lambda: compile_layers(load(self.source, "sdpa", "bf16", "layers"), backend=backend)
        )
        return Prepared(lambda: model(**case.payload.inputs).last_hidden_state, case.payload.real, backend)

    def in_budgets(self, case: Case, dtype: str, budget: int) -> Prepared:
        """fastbert on texts sorted into packed batches of at most `budget` tokens."""
        model, batch, device = self.fastbert(dtype), case.payload, self.settings.device
        groups = token_budget_batches(batch.lengths, budget)
        packed = []
        for group in groups:
            lengths = [batch.lengths[text] for text in group]
            ids = torch.cat([batch.inputs["input_ids"][text, : batch.lengths[text]] for text in group])
            ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
            packed.append({"input_ids": ids, "cu_seqlens": ends, "max_seqlen": max(lengths)})

        def in_order(states: list[torch.Tensor]) -> torch.Tensor:
            texts = {
                text: x
                for group, state in zip(groups, states, strict=True)
                for text, x in zip(group, state.split([batch.lengths[text] for text in group]), strict=True)
            }
            return torch.cat([texts[text] for text in range(len(batch.lengths))])

        return Prepared(
            lambda: [model(**inputs).last_hidden_state for inputs in packed], in_order, backends_in_use(model)
        )

    def in_sorted_batches(self, case: Case, size: int) -> Prepared:
        """transformers with sdpa on texts sorted by length, `size` at a time."""
        model, batch = load(self.source, "sdpa", "bf16"), case.payload
        chunks = batch.sorted_chunks(size)
        return Prepared(
            lambda: [model(**inputs).last_hidden_state for _, inputs in chunks],
            lambda states: batch.real_of_chunks(chunks, states),
        )

    def graph(self, case: Case) -> Prepared:
        """fastbert.compile: CUDA graphs."""
        if not hasattr(fastbert, "compile"):
            raise Unsupported("this fastbert has no compile()")
        if self.settings.device.type != "cuda":
            raise Unsupported("CUDA graphs need a CUDA device")
        model = self.fastbert("bf16")
        replay, batch = fastbert.compile(model), case.payload
        replay(**batch.inputs)
        if replay.outside:  # it ran, but eagerly
            raise Unsupported(f"outside every graph: {', '.join(replay.outside)}")
        # Indexing by the mask copies the states out of the graph's own memory, which the next replay overwrites.
        return Prepared(lambda: replay(**batch.inputs).last_hidden_state, batch.real, backends_in_use(model))


def on_model(name: str, subject: Callable[[Settings, Runs], Iterator[Work]]) -> gpu_suite.Subject:
    """A subject on a model with random weights, which are gone from disk after it."""

    def run(settings: Settings) -> Iterator[Work]:
        quiet_transformers()
        model = settings.pick(name, "bert-tiny")
        with model_folder(model) as folder:
            yield from subject(settings, Runs(settings, model, folder))

    return run


def full(settings: Settings, runs: Runs) -> Iterator[Work]:
    batch, length = settings.pick(FULL, (4, 16))
    case = runs.cases.case("full", [length] * batch, with_mask=False, min_rounds=20)
    compiled = Provider("torch-compile-layers", runs.compiled, "bf16")
    yield runs.work(case, [*runs.named("fastbert-bf16", "transformers-sdpa-bf16"), compiled])


def squad(settings: Settings, runs: Runs) -> Iterator[Work]:
    count, mean, longest = settings.pick((SQUAD_TEXTS, 177, 384), (12, 12, 32))
    case = runs.cases.case("SQuAD-like lengths", log_normal_lengths(count, mean, longest, sigma=0.4))
    budget, size = settings.pick((SQUAD_BUDGET, SQUAD_SORTED), (64, 4))
    own = [Provider("fastbert", lambda c, d=dtype: runs.in_budgets(c, d, budget), dtype) for dtype in ("bf16", "int8")]
    peer = Provider("transformers-sdpa-sorted", lambda c: runs.in_sorted_batches(c, size), "bf16")
    yield runs.work(case, [*own, peer])


def normal(settings: Settings, runs: Runs) -> Iterator[Work]:
    count, mean, deviation, longest = settings.pick((NORMAL_TEXTS, 256, 64, 512), (20, 16, 4, 32))
    case = runs.cases.case("lengths N(256, 64)", normal_lengths(count, mean, deviation, longest), min_rounds=10)
    compiled = Provider("torch-compile-layers", runs.compiled, "bf16")
    labels = ("fastbert-bf16", "transformers-sdpa-bf16", "transformers-sdpa-sorted-bf16")
    yield runs.work(case, [*runs.named(*labels), compiled])


def latency(settings: Settings, runs: Runs) -> Iterator[Work]:
    """One text, given as tokenizers give it, with a mask of ones, and without."""
    lengths = settings.pick(LATENCY_LENGTHS, (16,))
    for length in lengths:
        for with_mask in (False, True):
            name = "one text, mask of ones" if with_mask else "one text"
            case = runs.cases.case(name, [length], with_mask=with_mask, min_rounds=30)
            providers = runs.named("fastbert-bf16", "transformers-eager-bf16", "transformers-sdpa-bf16")
            if length == lengths[-1] and not with_mask:  # the whole model is compiled: half a minute
                providers += runs.named("torch-compile-graphs-bf16")
            graph = Provider("fastbert-graph", runs.graph, "bf16")
            yield runs.work(case, [graph, *providers], machine.time_latency)


SUBJECTS = {
    "full": on_model("bert-base", full),
    "latency": on_model("bert-base", latency),
    "normal": on_model("bert-base", normal),
    "squad": on_model("bert-large", squad),
}


def main(arguments: list[str] | None = None) -> int:
    return gpu_suite.main(arguments, __doc__, "bench_gpu_models", SUBJECTS)


if __name__ == "__main__":
    sys.exit(main())
