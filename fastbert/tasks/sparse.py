"""sparse-embedding: texts to weights of the vocabulary's tokens, by a masked-language model, as SPLADE has them."""

from __future__ import annotations

from collections.abc import Sequence
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

    def matrix(self, texts: Sequence[str], **settings: Any) -> Any:
        """The weights of texts as scipy's csr_array (N, V), float32; the settings are those of a call."""
        from scipy.sparse import csr_array

        rows = self(list(texts), **settings)
        ends = np.cumsum([0, *map(len, rows)])
        places = np.array([entry["index"] for row in rows for entry in row], np.int64)
        weights = np.array([entry["value"] for row in rows for entry in row], np.float32)
        return csr_array((weights, places, ends), shape=(len(rows), self.runner.config.vocab_size))


def search_sparse(queries: Any, corpus: Any, top_k: int = 10, *, block: int = 256) -> list[list[dict[str, Any]]]:
    """The `top_k` rows of the corpus with the largest inner product with each query, exactly, by scipy.

    Args:
        queries: sparse, (N, V).
        corpus: sparse, (M, V).
        block: queries that are compared at a time.

    Returns:
        Lists of {corpus_id, score}, best first; of equals, the first of the corpus. Rows without a token in common with
        the query are left out.

    Raises:
        ValueError: rows of another length; top_k or block below 1.
    """
    for name, value in (("top_k", top_k), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} columns, the corpus {corpus.shape[1]}; they must be as many")
    found: list[list[dict[str, Any]]] = []
    turned = corpus.T.tocsr()
    for start in range(0, queries.shape[0], block):
        scores = (queries[start : start + block] @ turned).tocsr()
        for first, last in zip(scores.indptr[:-1], scores.indptr[1:], strict=True):
            ids, values = scores.indices[first:last], scores.data[first:last]
            order = np.lexsort((ids, -values))[:top_k]
            found.append([{"corpus_id": int(ids[i]), "score": float(values[i])} for i in order if values[i] > 0])
    return found


def check_pooling(path: str | Path, revision: str | None = None) -> None:
    """Checks that a folder of sentence-transformers is a SparseEncoder's, whose SpladePooling is this one.

    Raises:
        ValueError: it has no SpladePooling, or one that sums, or has another activation.
    """
    modules_file = resolve_file(path, "modules.json", revision=revision)
    modules = read_json(modules_file, list)
    found = [module for module in modules if str(module.get("type")).endswith("SpladePooling")]
    if not found:
        kinds = ", ".join(str(module.get("type")).rpartition(".")[2] for module in modules)
        raise ValueError(
            f"{modules_file} holds {kinds}, the modules of an embedder; sparse vectors need a SpladePooling, or the "
            "folder of a masked-language model"
        )
    for module in found:
        file = resolve_file(path, f"{module.get('path')}/config.json", revision=revision)
        for name, known in (("pooling_strategy", "max"), ("activation_function", "relu")):
            if (value := read_json(file).get(name, known)) != known:
                raise ValueError(f"{file}: {name} is {value!r}; it must be {known!r}")
