"""The encoders to compare: the public runtimes and fastbert in its several ways, each as a harness Provider."""

from __future__ import annotations

import fnmatch
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
from harness import Case, Gate, Prepared, Provider, Unsupported, exact_gate, relative_gate, twice_eager_gate
from peers.torch_runtime import BASELINE, load
from torch import Tensor
from workload import Batch

import fastbert
from fastbert.precision import LoadOptions, check_precision

# What fastbert is asked for in each precision. int8 with bf16 for the rest, as OpenVINO's.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "fp32-high": {"dtype": torch.float32, "precision": "high"},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "int8": {"dtype": torch.bfloat16, "quantize": "int8"},
}
# Precisions that have no rows of transformers, and whose they are compared with.
COMPARED = {"fp32-high": "fp32", "int8": "bf16"}
# RMS error over the RMS of what is right, at the real tokens, that still counts as this precision. bf16 has 8 bits:
# a rounding is 0.2 %, the runtimes' 6 and 12 layers come to 0.5 to 1.2 %. int8 on real MiniLM weights and random ids:
# 10 to 19 % for recipes that users publish models with, 37 % for one scale a weight, which loses a fifth of the pooled
# cosine. fastbert's own int8 is held to what the best of them has, with a quarter to spare.
PUBLIC_LIMITS = {"bf16": 0.03, "fp16": 0.03, "int8": 0.20}
OWN_LIMITS = {"fp32-high": 2e-5, "int8": 0.12}


class Encoders:
    """The models of one folder, loaded when they are first asked for, and the providers over them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.source = peers.Source(folder, device)
        self._references: dict[str, Tensor] = {}
        self._case: Case | None = None

    def providers(self) -> list[Provider]:
        """Every provider in every precision it has."""
        plain = [dtype for dtype in PRECISIONS if set(PRECISIONS[dtype]) == {"dtype"}]
        own: dict[str, tuple[Callable[[Case, str], Prepared], Sequence[str]]] = {
            "fastbert": (self._fastbert, tuple(PRECISIONS)),
            "fastbert-reference": (self._fastbert_reference, plain),
            "fastbert-accelerate": (self._accelerated, plain),
        }
        return peers.providers(self.source) + [
            Provider(name, lambda case, p=prepare, d=dtype: p(case, d), dtype)
            for name, (prepare, dtypes) in own.items()
            for dtype in dtypes
        ]

    def gate(self, case: Case, provider: Provider) -> Gate:
        """The right numbers: transformers' eager numbers in fp32, and how far from them this provider may be."""
        dtype, expected = provider.dtype, self._eager(case, "fp32")
        limits = PUBLIC_LIMITS if provider.public else OWN_LIMITS
        if dtype in limits:
            gate = relative_gate(expected, limits[dtype])
        elif dtype == "fp32":
            gate = exact_gate(expected)
        else:
            gate = twice_eager_gate(expected, self._eager(case, dtype))
        return Gate(gate.expected, gate.max_error, gate.rms_error, case.payload.lengths)

    def _eager(self, case: Case, dtype: str) -> Tensor:
        """The states of the real tokens by transformers eager, computed once a case."""
        if self._case is not case:
            self._case, self._references = case, {}
        if dtype not in self._references:
            batch: Batch = case.payload
            chunks = batch.sorted_chunks(4)
            model = load(self.source, "eager", dtype)
            states = [model(**inputs).last_hidden_state for _, inputs in chunks]
            self._references[dtype] = batch.real_of_chunks(chunks, states)
        return self._references[dtype]

    def _load_fastbert(self, dtype: str) -> fastbert.BertModel:
        return self.source.once(
            ("fastbert", dtype), lambda: load_fastbert(self.source.folder, dtype, self.source.device)
        )

    def _fastbert(self, case: Case, dtype: str) -> Prepared:
        model = self._load_fastbert(dtype)
        return _whole_batch(model, case, backends_in_use(model))

    def _fastbert_reference(self, case: Case, dtype: str) -> Prepared:
        prepared = _whole_batch(self._load_fastbert(dtype), case, "reference")

        def run() -> Tensor:
            with fastbert.use_backend("reference"):
                return prepared.run()

        return Prepared(run, prepared.result, prepared.backend)

    def _accelerated(self, case: Case, dtype: str) -> Prepared:
        model = fastbert.accelerate(load(self.source, "sdpa", dtype, "accelerate"))
        return _whole_batch(model, case, backends_in_use(self._load_fastbert(dtype)))


def load_fastbert(folder: Path, dtype: str, device: torch.device | None = None) -> fastbert.BertModel:
    """fastbert's model in one of PRECISIONS; raises Unsupported where this fastbert does not know it."""
    require_precision(dtype, device)
    return fastbert.AutoModel.from_pretrained(folder, device=device, add_pooling_layer=False, **PRECISIONS[dtype])


def require_precision(dtype: str, device: torch.device | None = None) -> None:
    """Raises Unsupported, with fastbert's own words, where it does not run in one of PRECISIONS on this device."""
    known = inspect.signature(fastbert.BertModel.from_pretrained).parameters
    asked = PRECISIONS[dtype]
    if unknown := sorted(asked.keys() - known.keys()):
        raise Unsupported(f"fastbert.BertModel.from_pretrained takes no {', '.join(unknown)} yet")
    try:
        setting = LoadOptions(precision=asked.get("precision"), quantize=asked.get("quantize")).setting
        check_precision(setting, asked["dtype"], device or "cpu")
    except ValueError as reason:
        raise Unsupported(str(reason)) from reason


def chosen(providers: Sequence[Provider], patterns: Sequence[str] | None, dtypes: Sequence[str]) -> list[Provider]:
    """The providers of these precisions whose name (openvino) or label (openvino-bf16) fits a pattern.

    Without patterns, those whose packages are installed. The baseline is always among them.

    Raises:
        ValueError: a pattern that fits no provider at all.
    """
    bases = {COMPARED.get(dtype, dtype) for dtype in dtypes}
    found = [p for p in providers if p.dtype in dtypes or (p.name == BASELINE and p.dtype in bases)]
    if patterns is None:
        return [provider for provider in found if not provider.missing()]

    def fits(provider: Provider, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in (provider.name, provider.label))

    unknown = [pattern for pattern in patterns if not any(fits(provider, pattern) for provider in providers)]
    if unknown:
        raise ValueError(f"--providers: nothing fits {', '.join(unknown)}")
    return [p for p in found if p.name == BASELINE or any(fits(p, pattern) for pattern in patterns)]


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
