"""rerank: documents in the order of their scores for a query, by a cross-encoder, as CrossEncoder.rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.inference.windows import Window
from fastbert.tasks.base import LengthSettings, Pipeline
from fastbert.tasks.text_classification import apply


@dataclass(frozen=True)
class RerankSettings(LengthSettings):
    """Settings of a call.

    Args:
        function_to_apply: to the logit, "sigmoid" or "none"; None for that of the model's folder.
    """

    function_to_apply: str | None = None


class Reranker(Pipeline):
    """Pairs (query, document) to scores; a model with one label, as cross-encoders have.

    The score is the logit through the activation that the model's folder names, a sigmoid by default, as in
    sentence-transformers. Of a document in several windows, the best counts.
    """

    task = "rerank"
    settings_class = RerankSettings

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, tuple)

    def check(self, item: Any, where: int) -> Any:
        if not isinstance(item, tuple | list) or len(item) != 2 or not all(isinstance(text, str) for text in item):
            raise TypeError(f"inputs[{where}] is {item!r:.80}; it must be a pair of str: query and document")
        return tuple(item)

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        longer = None if settings.truncation else "only_second"
        return self.windows(items, settings, longer=longer, offsets=False)

    def answer(self, item: Any, windows: list[Window], rows: list[np.ndarray], settings: Any) -> float:
        if rows[0].shape != (1,):
            raise ValueError(f"the model has {len(rows[0])} labels; a reranker has one")
        return float(apply(settings.function_to_apply or self.activation, np.max(rows, axis=0))[0])

    @property
    def activation(self) -> str:
        """Of the logit: "sigmoid" or "none".

        Raises:
            ValueError: the folder names another.
        """
        extra = self.runner.config.extra
        named = (extra.get("sentence_transformers") or {}).get("activation_fn")
        named = named or extra.get("sbert_ce_default_activation_function") or "Sigmoid"
        known = {"Sigmoid": "sigmoid", "Identity": "none"}
        if (name := str(named).rpartition(".")[2]) not in known:
            raise ValueError(f"config.json names the activation {named!r}; it must be one of {', '.join(known)}")
        return known[name]

    def rank(
        self, query: str, documents: Sequence[str], *, top_k: int | None = None, return_documents: bool = False
    ) -> list[dict[str, Any]]:
        """[{corpus_id, score}], and `text` with return_documents, best first; of equals, the first.

        Raises:
            TypeError: documents is a str.
            ValueError: top_k is below 1.
        """
        if isinstance(documents, str):
            raise TypeError("documents is a str; it must be a list of texts")
        documents = list(documents)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all documents")
        scores = self([(query, document) for document in documents]) if documents else []
        order = sorted(range(len(documents)), key=lambda i: -scores[i])[:top_k]
        return [
            {"corpus_id": i, "score": scores[i], **({"text": documents[i]} if return_documents else {})} for i in order
        ]


def rerank(
    query: str,
    documents: Sequence[str],
    *,
    model: Reranker | str | Path,
    top_k: int | None = None,
    return_documents: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Documents in the order of their scores for a query; see Reranker.rank.

    Args:
        model: a Reranker, or the folder or hub id of a cross-encoder, loaded by `pipeline("rerank", ...)` with
            `options`; to rank for many queries, make it once.
    """
    from fastbert.tasks.pipelines import made_pipeline

    ranking = made_pipeline("rerank", model, options)
    return list(ranking.rank(query, documents, top_k=top_k, return_documents=return_documents))
