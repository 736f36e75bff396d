"""Inference with a trained model: vectors of texts, words for [MASK], and CUDA graphs for small batches."""

from fastbert.inference.cuda_graphs import CompiledModel, compile
from fastbert.inference.embed import Embedder
from fastbert.inference.fill_mask import Candidate, FillMask

__all__ = ["Candidate", "CompiledModel", "Embedder", "FillMask", "compile"]
