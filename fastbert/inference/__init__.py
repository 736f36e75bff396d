"""Inference with a trained model: vectors of texts, words for [MASK], and CUDA graphs for small batches."""

from typing import TYPE_CHECKING

from fastbert.lazy import names_of

if TYPE_CHECKING:
    from fastbert.inference.cuda_graphs import CompiledModel, compile
    from fastbert.inference.embed import Embedder
    from fastbert.inference.fill_mask import Candidate, FillMask

__all__ = ["Candidate", "CompiledModel", "Embedder", "FillMask", "compile"]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            **dict.fromkeys(("CompiledModel", "compile"), "cuda_graphs"),
            **dict.fromkeys(("Candidate", "FillMask"), "fill_mask"),
            "Embedder": "embed",
        },
        globals(),
    )
