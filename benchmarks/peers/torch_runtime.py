"""transformers' own BertModel: eager, sdpa, sorted batches, torch.compile; fp32, bf16, fp16."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import machine
import torch
from harness import Case, Prepared, Provider, Unsupported

from .common import Source, load_transformers, require_sortable, sorted_run

BASELINE = "transformers-sdpa"


def providers(source: Source) -> list[Provider]:
    """Held to the same limits as fastbert: they define them."""
    kinds: dict[str, Callable[[Source, str, Case], Prepared]] = {
        "transformers-eager": lambda s, dtype, case: _whole_batch(load(s, "eager", dtype), case),
        BASELINE: lambda s, dtype, case: _whole_batch(load(s, "sdpa", dtype), case),
        "transformers-sdpa-sorted": lambda s, dtype, case: _sorted(load(s, "sdpa", dtype), case),
        "torch-compile": _compiled,
        "torch-compile-sorted": _compiled_sorted,
        "torch-compile-graphs": _compiled_with_graphs,
    }
    return [
        Provider(name, lambda case, p=prepare, d=dtype: p(source, d, case), dtype)
        for dtype in ("fp32", "bf16", "fp16")
        for name, prepare in kinds.items()
    ]


def load(source: Source, attention: str, dtype: str, purpose: str = "") -> Any:
    """transformers' encoder without its pooler; one of its own for each purpose."""

    def make() -> Any:
        model = load_transformers(source.folder, attention, machine.DTYPES[dtype])
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        return model.to(source.device).eval()

    return source.once(("transformers", attention, dtype, purpose), make)


def _whole_batch(model: Any, case: Case) -> Prepared:
    batch = case.payload
    return Prepared(lambda: model(**batch.inputs).last_hidden_state, batch.real)


def _sorted(model: Any, case: Case) -> Prepared:
    require_sortable(case)
    return sorted_run(case, lambda inputs: model(**inputs).last_hidden_state, lambda states: states)


def _compiled(source: Source, dtype: str, case: Case) -> Prepared:
    return _whole_batch(_compile(source, dtype, case, dynamic=False, options=_options(source)), case)


def _compiled_sorted(source: Source, dtype: str, case: Case) -> Prepared:
    """Compiled once for all shapes: one for each of them would take minutes."""
    require_sortable(case)
    return _sorted(_compile(source, dtype, case, dynamic=True, options=_options(source)), case)


def _compiled_with_graphs(source: Source, dtype: str, case: Case) -> Prepared:
    if source.device.type != "cuda":
        raise Unsupported("CUDA graphs need a CUDA device")
    return _whole_batch(_compile(source, dtype, case, dynamic=False, mode="reduce-overhead"), case)


def compile_layers(model: Any, **settings: Any) -> Any:
    """Compiles the layers of a transformers model where they are, once for all of them, and returns it.

    The kernels are those of the model compiled whole, as nothing is fused across a layer's last norm; compiling takes
    a twelfth or a twenty-fourth of the time. Its layers are called one by one, which costs a small batch.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in model.base_model.encoder.layer:
        layer.compile(dynamic=False, **settings)
    return model


def _options(source: Source) -> dict[str, Any] | None:
    """Frozen weights, which oneDNN packs, on a CPU."""
    if source.device.type != "cpu":
        return None
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        raise Unsupported("torch.compile needs a C++ compiler for the CPU")
    return {"freezing": True}


def _compile(source: Source, dtype: str, case: Case, **settings: Any) -> Any:
    """A model compiled for this case alone: past a few shapes torch.compile goes over to eager without a word."""
    if source.made.get("compiled for") is not case:
        torch._dynamo.reset()  # once a case: it takes the code from under all that is compiled
        torch._dynamo.config.recompile_limit = 64
        source.made["compiled for"] = case
    return torch.compile(load(source, "sdpa", dtype, f"compile {settings}"), **settings)
