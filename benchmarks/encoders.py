"""The encoders to compare: transformers in its several ways, and fastbert, each as a harness Provider."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from harness import Case, Gate, Prepared, Provider, Unsupported, exact_gate, twice_eager_gate
from torch import Tensor
from workload import Batch

import fastbert

BASELINE = "transformers-sdpa"
# Texts in one of the sorted batches. On the CPU 4 was the fastest of 4, 8 and 16 (MiniLM, 64 log-normal texts, best of
# 9 calls, fp32 and bf16); for a GPU, where a small batch leaves most of it idle, 16 is a guess not yet measured.
SORTED_BATCH = {"cpu": 4, "cuda": 16}


class Encoders:
    """The models of one folder in one dtype, loaded when they are first asked for, and the providers over them."""

    def __init__(self, folder: Path, device: torch.device, dtype: str) -> None:
        self.folder, self.device, self.dtype = folder, device, machine.DTYPES[dtype]
        self._models: dict[str, Any] = {}

    def providers(self) -> list[Provider]:
        return [
            Provider("transformers-eager", self._transformers("eager")),
            Provider(BASELINE, self._transformers("sdpa")),
            Provider("transformers-sdpa-sorted", self._sorted),
            Provider("torch-compile", self._compiled),
            Provider("torch-compile-graphs", self._compiled_with_graphs),
            Provider("fastbert", self._fastbert),
            Provider("fastbert-reference", self._fastbert_reference),
            Provider("fastbert-accelerate", self._accelerated),
        ]

    def gate(self, case: Case) -> Gate:
        """What is right: transformers' eager numbers in fp32, and how far from them a result may be."""
        batch: Batch = case.payload
        chunks = batch.sorted_chunks(4)

        def states(model: Any) -> Tensor:
            return batch.real_of_chunks(chunks, [model(**inputs).last_hidden_state for _, inputs in chunks])

        expected = states(self._load("eager", torch.float32)).float()
        if self.dtype == torch.float32:
            return exact_gate(expected)
        return twice_eager_gate(expected, states(self._load("eager", self.dtype)))

    def _load(self, attention: str, dtype: torch.dtype, purpose: str = "") -> Any:
        """transformers' BertModel; one of its own for each purpose."""
        key = f"{attention} {dtype} {purpose}"
        if key not in self._models:
            from transformers import BertModel

            model = BertModel.from_pretrained(self.folder, dtype=dtype, attn_implementation=attention)
            self._models[key] = model.to(self.device).eval()
        return self._models[key]

    def _transformers(self, attention: str) -> Callable[[Case], Prepared]:
        return lambda case: _whole_batch(self._load(attention, self.dtype), case)

    def _sorted(self, case: Case) -> Prepared:
        batch: Batch = case.payload
        if min(batch.lengths) == max(batch.lengths):
            raise Unsupported("all texts have one length, so sorting them changes nothing")
        chunks = batch.sorted_chunks(SORTED_BATCH.get(self.device.type, 4))
        model = self._load("sdpa", self.dtype)
        return Prepared(
            lambda: [model(**inputs).last_hidden_state for _, inputs in chunks],
            lambda hidden: batch.real_of_chunks(chunks, hidden),
        )

    def _compiled(self, case: Case) -> Prepared:
        on_cpu = self.device.type == "cpu"
        if on_cpu and not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
            raise Unsupported("torch.compile needs a C++ compiler for the CPU")
        return self._compile(case, options={"freezing": True} if on_cpu else None)

    def _compiled_with_graphs(self, case: Case) -> Prepared:
        if self.device.type != "cuda":
            raise Unsupported("CUDA graphs need a CUDA device")
        return self._compile(case, mode="reduce-overhead")

    def _compile(self, case: Case, **settings: Any) -> Prepared:
        # Compiled for this shape alone: past a few shapes torch.compile would go over to eager without a word.
        torch._dynamo.reset()
        model = self._load("sdpa", self.dtype, "compile")
        return _whole_batch(torch.compile(model, dynamic=False, **settings), case)

    def _load_fastbert(self) -> fastbert.BertModel:
        if "fastbert" not in self._models:
            self._models["fastbert"] = fastbert.BertModel.from_pretrained(
                self.folder, dtype=self.dtype, device=self.device
            )
        return self._models["fastbert"]

    def _fastbert(self, case: Case) -> Prepared:
        model = self._load_fastbert()
        return _whole_batch(model, case, backends_in_use(model))

    def _fastbert_reference(self, case: Case) -> Prepared:
        prepared = _whole_batch(self._load_fastbert(), case, "reference")

        def run() -> Tensor:
            with fastbert.use_backend("reference"):
                return prepared.run()

        return Prepared(run, prepared.result, prepared.backend)

    def _accelerated(self, case: Case) -> Prepared:
        model = fastbert.accelerate(self._load("sdpa", self.dtype, "accelerate"))
        return _whole_batch(model, case, backends_in_use(self._load_fastbert()))


def _whole_batch(model: Any, case: Case, backend: str = "") -> Prepared:
    batch: Batch = case.payload
    return Prepared(lambda: model(**batch.inputs).last_hidden_state, batch.real, backend)


def backends_in_use(model: fastbert.BertModel) -> str:
    """Which backend runs each op of `model`: "reference", or "add_layer_norm native, the rest reference"."""
    chosen = {op: backend for op, _, backend, verdict in fastbert.explain(model).rows if verdict == "yes"}
    rest = Counter(chosen.values()).most_common(1)[0][0]
    named = [f"{op} {backend}" for op, backend in chosen.items() if backend != rest]
    return ", ".join([*named, f"the rest {rest}"]) if named else rest


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers among the results."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
