"""What a user does with a trained model: vectors of texts, and words for [MASK]."""

from fastbert.inference.embed import Embedder
from fastbert.inference.fill_mask import Candidate, FillMask

__all__ = ["Candidate", "Embedder", "FillMask"]
