"""The tasks' answers by numpy and the extension alone: TextClassifier, TokenClassifier, CrossEncoder and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from fastbert.config import BertConfig, family_of
from fastbert.families.parts import HeadParts, classes_parts, masked_lm_parts
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.windows import Window
from fastbert.light.heads import Head
from fastbert.light.loading import load_encoder
from fastbert.tasks.base import Pipeline
from fastbert.tasks.base_runner import BaseRunner, Read
from fastbert.tasks.fill_mask import FillMaskPipeline
from fastbert.tasks.multiple_choice import MultipleChoice
from fastbert.tasks.question_answering import QuestionAnswering
from fastbert.tasks.reranking import Reranker
from fastbert.tasks.sparse import SparseEmbedding
from fastbert.tasks.text_classification import TextClassification
from fastbert.tasks.token_classification import TokenClassification
from fastbert.tasks.zero_shot import ZeroShotClassification
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer


class Kind(NamedTuple):
    """A task: its pipeline, the head in `Family`, whether that is over tokens, and its classes; None: the config's."""

    pipeline: type[Pipeline]
    head: str
    of_tokens: bool = False
    classes: int | None = None

    def parts(self, config: BertConfig) -> HeadParts:
        """Those of the head.

        Raises:
            ValueError: the family has no such head.
        """
        family = family_of(config.model_type)
        if self.head == "masked_lm":
            return masked_lm_parts(config, family)
        if (names := getattr(family, self.head)) is None:
            task = self.pipeline.task
            raise ValueError(f"config: model_type is {config.model_type!r}, which has no head for {task}")
        return classes_parts(config, family, names, config.num_labels if self.classes is None else self.classes)


TASKS = {
    "text-classification": Kind(TextClassification, "classes"),
    "zero-shot-classification": Kind(ZeroShotClassification, "classes"),
    "rerank": Kind(Reranker, "classes"),
    "multiple-choice": Kind(MultipleChoice, "choices", classes=1),
    "token-classification": Kind(TokenClassification, "tokens", of_tokens=True),
    "question-answering": Kind(QuestionAnswering, "answers", of_tokens=True, classes=2),
    "fill-mask": Kind(FillMaskPipeline, "masked_lm", of_tokens=True),
    "sparse-embedding": Kind(SparseEmbedding, "masked_lm", of_tokens=True),
}


class Runner(BaseRunner):
    """A light encoder with a head for classes, and its tokenizer."""

    is_own = True

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, of_tokens: bool = False, max_tokens: int = MAX_TOKENS
    ) -> None:
        super().__init__(head.encoder.config, tokenizer, max_tokens=max_tokens)
        self.model, self.of_tokens = head, of_tokens

    @property
    def dtype(self) -> str:
        return str(self.model.encoder.dtype)

    @property
    def device(self) -> str:
        return "cpu"

    def weights_digest(self) -> str:
        return str(self.model.encoder.digest().hexdigest())

    def run(
        self, windows: Sequence[Window], read: Read, rows: Callable[[Window], int] | None = None, module: Any = None
    ) -> list[np.ndarray]:
        """The logits of each window, (N,), or of its tokens, (T, N). They are all that there is to `read`."""
        if not self.of_tokens:
            return self._by_window(windows, lambda inputs: self.model.of_texts(**inputs))

        def parts(inputs: dict[str, Any]) -> list[np.ndarray]:
            return np.split(self.model.of_tokens(**inputs), inputs["cu_seqlens"][1:-1])

        return self._by_window(windows, parts)

    def predictions_at(self, windows: Sequence[Window], token: int) -> list[np.ndarray]:
        def parts(inputs: dict[str, Any]) -> list[np.ndarray]:
            places = np.flatnonzero(inputs["ids"] == token)
            ends = np.searchsorted(places, inputs["cu_seqlens"][1:-1])
            return np.split(self.model.of_places(**inputs, places=places), ends)

        return self._by_window(windows, parts)

    def largest_predictions(self, windows: Sequence[Window]) -> list[np.ndarray]:
        return self._by_window(windows, lambda inputs: self.model.largest(**inputs))

    def _by_window(
        self, windows: Sequence[Window], parts: Callable[[dict[str, Any]], Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """The results of `parts` for a batch's arguments, one for each of its windows, in their order."""
        found: list[np.ndarray] = [np.empty(0)] * len(windows)
        for batch, inputs in self.batches(windows):
            for i, part in zip(batch, parts(inputs), strict=True):
                found[i] = part
        return found

    def _inputs(self, encodings: list[Any], lengths: list[int]) -> dict[str, Any]:
        flat = {
            name: np.fromiter(chain.from_iterable(rows), np.int64, sum(lengths))
            for name, rows in self.columns(encodings).items()
        }
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return {"ids": flat.pop("input_ids"), "cu_seqlens": cu_seqlens, **flat}


def pipeline(
    task: str,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int = MAX_TOKENS,
    kind: type[Pipeline] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
    cache: str | Path | bool = False,
    **defaults: Any,
) -> Any:
    """The pipeline of a task, over a folder or hub id with safetensors weights.

    Args:
        task: one of TASKS.
        tokenizer: the folder's, unless it is given.
        max_tokens: most real tokens of a batch.
        kind: a subclass of the task's pipeline.
        dtype: "float32" or "bfloat16"; None for the stored one (float32 for float16 and float64).
        quantize: "int8", or None.
        revision: of a hub id.
        threads: of each call; None for OMP_NUM_THREADS, or the number of cores.
        cache: a folder that keeps the packed weights, or True for fastbert/packed in the user's cache; they are mapped
            the next time.
        defaults: of the arguments of a call.

    Raises:
        FileNotFoundError: config.json, weights or vocabulary are missing.
        ValueError: the family has no such head; a tensor is missing or misshapen: the message names it and its file.
        ImportError: the weights are pickled, which needs torch.
    """
    found = TASKS[task]
    config = BertConfig.from_pretrained(path, revision=revision)
    head = found.parts(config)
    encoder = load_encoder(
        path,
        config,
        dtype=dtype,
        quantize=quantize,
        revision=revision,
        threads=threads,
        cache=cache,
        with_pooler=not found.of_tokens and head.reads == "pooler",
        head=head,
    )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    runner = Runner(Head(encoder, head), tokenizer, of_tokens=found.of_tokens, max_tokens=max_tokens)
    return (kind or found.pipeline)(runner, **defaults)


class TextClassifier(TextClassification):
    """Texts, or pairs of them, to [{label, score}]; called as the pipeline "text-classification" of fastbert."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Loads a folder or hub id with safetensors weights: see fastbert.light.pipeline, which takes the options."""
        made: Self = pipeline("text-classification", path, kind=cls, **options)
        return made


class TokenClassifier(TokenClassification):
    """Texts to the entities in them; called as the pipeline "token-classification" of fastbert."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Loads a folder or hub id with safetensors weights: see fastbert.light.pipeline, which takes the options."""
        made: Self = pipeline("token-classification", path, kind=cls, **options)
        return made


class CrossEncoder(Reranker):
    """Pairs (query, document) to scores; `rank` orders documents for a query."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Loads a folder or hub id with safetensors weights: see fastbert.light.pipeline, which takes the options."""
        made: Self = pipeline("rerank", path, kind=cls, **options)
        return made

    def predict(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The score of each pair, (N,) float32."""
        return np.array(list(self(list(pairs))), dtype=np.float32)
