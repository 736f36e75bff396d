"""sparse-embedding: texts to weights of the vocabulary's tokens, by a masked-language model, as SPLADE has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastbert.checkpoint.hub import resolve_file
from fastbert.checkpoint.json_files import read_json
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


def check_pooling(path: str | Path, revision: str | None = None) -> None:
    """Checks that the SpladePooling of a folder of sentence-transformers is this one.

    Raises:
        ValueError: it sums, or has another activation.
    """
    for module in read_json(resolve_file(path, "modules.json", revision=revision), list):
        if not str(module.get("type")).endswith("SpladePooling"):
            continue
        file = resolve_file(path, f"{module.get('path')}/config.json", revision=revision)
        for name, known in (("pooling_strategy", "max"), ("activation_function", "relu")):
            if (found := read_json(file).get(name, known)) != known:
                raise ValueError(f"{file}: {name} is {found!r}; it must be {known!r}")
