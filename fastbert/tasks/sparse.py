"""sparse-embedding: texts to weights of the vocabulary's tokens, by a masked-language model, as SPLADE has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbert.inference.windows import Window
from fastbert.tasks.base import Pipeline


class SparseEmbedding(Pipeline):
    """Texts to [{index, value}]: log(1 + relu(x)) of the largest logit x that a text's tokens have for each token of
    the vocabulary, where that is above 0, by index.

    Source: Formal et al. (2021), "SPLADE v2: Sparse Lexical and Expansion Model for Information Retrieval", (2) with
    the maximum of section 3.1. Of a text in several windows, the largest counts.
    """

    task = "sparse-embedding"

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        """Of each window, its largest logits (V,)."""
        return self.runner.largest_predictions(windows)

    def answer(self, item: Any, windows: list[Window], rows: list[np.ndarray], settings: Any) -> list[dict[str, Any]]:
        weights = np.log1p(np.maximum(np.max(rows, axis=0), 0))
        places = np.flatnonzero(weights)
        return [{"index": i, "value": w} for i, w in zip(places.tolist(), weights[places].tolist(), strict=True)]
