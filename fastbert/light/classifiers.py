"""TextClassifier, TokenClassifier and CrossEncoder: the tasks' answers by numpy and the extension alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from fastbert.config import BertConfig, family_of
from fastbert.families.names import ClassesNames
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.windows import Window
from fastbert.light.heads import Head, pools
from fastbert.light.loading import load_encoder
from fastbert.tasks.base_runner import BaseRunner, Read
from fastbert.tasks.reranking import Reranker
from fastbert.tasks.text_classification import TextClassification
from fastbert.tasks.token_classification import TokenClassification
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer


class Runner(BaseRunner):
    """A light encoder with a head for classes, and its tokenizer."""

    is_own = True

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, of_tokens: bool = False, max_tokens: int = MAX_TOKENS
    ) -> None:
        super().__init__(head.encoder.config, tokenizer, max_tokens=max_tokens)
        self.model, self.of_tokens = head, of_tokens

    def run(
        self, windows: Sequence[Window], read: Read, rows: Callable[[Window], int] | None = None, module: Any = None
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0)] * len(windows)
        call = self.model.of_tokens if self.of_tokens else self.model.of_texts
        for batch, inputs in self.batches(windows):
            values = read(SimpleNamespace(logits=call(**inputs)), inputs["ids"])
            ends = np.cumsum([1 if rows is None else rows(windows[i]) for i in batch])
            for i, part in zip(batch, np.split(values, ends[:-1]), strict=True):
                found[i] = part[0] if rows is None else part
        return found

    def _inputs(self, encodings: list[Any], lengths: list[int]) -> dict[str, Any]:
        flat = {
            name: np.fromiter(chain.from_iterable(rows), np.int64, sum(lengths))
            for name, rows in self.columns(encodings).items()
        }
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return {"ids": flat.pop("input_ids"), "cu_seqlens": cu_seqlens, **flat}


def _head(path: str | Path, config: BertConfig, names: ClassesNames, *, pooler: bool, **options: Any) -> Head:
    return Head(load_encoder(path, config, with_pooler=pooler, head=names, **options), names)


def _tokenizer(path: str | Path, given: Tokenizer | None, revision: str | None) -> Tokenizer:
    return AutoTokenizer.from_pretrained(path, revision=revision) if given is None else given


class _OfTexts:
    """Loading, of the tasks with a head over texts."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        threads: int | None = None,
        cache: str | Path | bool = False,
        max_tokens: int = MAX_TOKENS,
        **defaults: Any,
    ) -> Self:
        """Loads a folder or hub id with safetensors weights.

        Args:
            dtype: "float32" or "bfloat16"; None for the stored one (float32 for float16 and float64).
            quantize: "int8", or None.
            threads: of each call; None for OMP_NUM_THREADS, or the number of cores.
            cache: a folder that keeps the packed weights, or True for fastbert/packed in the user's cache; they are
                mapped the next time.
            max_tokens: most real tokens of a batch.
            defaults: of the arguments of a call.

        Raises:
            FileNotFoundError: config.json, weights or vocabulary are missing.
            ValueError: a tensor is missing or misshapen; the message names it and its file.
            ImportError: the weights are pickled, which needs torch.
        """
        config = BertConfig.from_pretrained(path, revision=revision)
        names = family_of(config.model_type).classes
        options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "revision": revision}
        options |= {"threads": threads, "cache": cache}
        head = _head(path, config, names, pooler=pools(names), **options)
        runner = Runner(head, _tokenizer(path, tokenizer, revision), max_tokens=max_tokens)
        make: Any = cls
        return make(runner, **defaults)


class TextClassifier(_OfTexts, TextClassification):
    """Texts, or pairs of them, to [{label, score}]; called as the pipeline "text-classification" of fastbert."""


class CrossEncoder(_OfTexts, Reranker):
    """Pairs (query, document) to scores; `rank` orders documents for a query."""

    def predict(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The score of each pair, (N,) float32."""
        return np.array(list(self(list(pairs))), dtype=np.float32)


class TokenClassifier(TokenClassification):
    """Texts to the entities in them; called as the pipeline "token-classification" of fastbert."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        threads: int | None = None,
        cache: str | Path | bool = False,
        max_tokens: int = MAX_TOKENS,
        **defaults: Any,
    ) -> Self:
        """Loads a folder or hub id with safetensors weights: see TextClassifier.from_pretrained.

        Raises:
            ValueError: the family has no such head; and as there.
        """
        config = BertConfig.from_pretrained(path, revision=revision)
        names = family_of(config.model_type).tokens
        if names is None:
            raise ValueError(f"config: model_type is {config.model_type!r}, which has no head over tokens")
        options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "revision": revision}
        options |= {"threads": threads, "cache": cache}
        head = _head(path, config, names, pooler=False, **options)
        tokenizer = _tokenizer(path, tokenizer, revision)
        return cls(Runner(head, tokenizer, of_tokens=True, max_tokens=max_tokens), **defaults)
