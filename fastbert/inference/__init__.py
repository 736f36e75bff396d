"""Inference with a trained model: vectors of texts, and CUDA graphs for small batches."""

from typing import TYPE_CHECKING

from fastbert.lazy import names_of

if TYPE_CHECKING:
    from fastbert.inference.cuda_graphs import CompiledModel, compile
    from fastbert.inference.embed import Embedder

__all__ = ["CompiledModel", "Embedder", "compile"]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            **dict.fromkeys(("CompiledModel", "compile"), "cuda_graphs"),
            "Embedder": "embed",
        },
        globals(),
    )
