"""From texts to answers: a file for each task, over packed batches of any family's model.

`pipeline` is the door; `runner` makes windows of texts and runs them; `base` is what the tasks share.
"""

from fastbert.tasks.attribution import attention_maps, attribute, nearest_tokens
from fastbert.tasks.augmentation import augment
from fastbert.tasks.fill_mask import Candidate, FillMask
from fastbert.tasks.multi_head import MultiHead
from fastbert.tasks.pipelines import pipeline
from fastbert.tasks.reranking import Reranker, rerank
from fastbert.tasks.vector_search import search

__all__ = [
    "Candidate",
    "FillMask",
    "MultiHead",
    "Reranker",
    "attention_maps",
    "attribute",
    "augment",
    "nearest_tokens",
    "pipeline",
    "rerank",
    "search",
]
