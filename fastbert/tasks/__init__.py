"""From texts to answers: a file for each task, over packed batches of any family's model.

`pipeline` is the door; `runner` makes windows of texts and runs them; `base` is what the tasks share.
"""

from typing import TYPE_CHECKING

from fastbert.lazy import names_of

if TYPE_CHECKING:
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
_HOMES = {
    **dict.fromkeys(("attention_maps", "attribute", "nearest_tokens"), "attribution"),
    "augment": "augmentation",
    **dict.fromkeys(("Candidate", "FillMask"), "fill_mask"),
    "MultiHead": "multi_head",
    "pipeline": "pipelines",
    **dict.fromkeys(("Reranker", "rerank"), "reranking"),
    "search": "vector_search",
}

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, _HOMES, globals())
