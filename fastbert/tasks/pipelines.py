"""pipeline: a task's name and a model, own or of transformers, to what answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.embed import Embedder
from fastbert.model import auto
from fastbert.model.bert import EncoderModel
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.precision import LoadOptions
from fastbert.tasks.feature_extraction import FeatureExtraction
from fastbert.tasks.fill_mask import FillMaskPipeline
from fastbert.tasks.multiple_choice import MultipleChoice
from fastbert.tasks.names import ALIASES, task_of
from fastbert.tasks.question_answering import QuestionAnswering
from fastbert.tasks.reranking import Reranker
from fastbert.tasks.runner import Runner
from fastbert.tasks.sparse import SparseEmbedding
from fastbert.tasks.summarization import Summarization
from fastbert.tasks.text_classification import TextClassification
from fastbert.tasks.token_classification import TokenClassification
from fastbert.tasks.vector_search import Similarity
from fastbert.tasks.zero_shot import ZeroShotClassification
from fastbert.tokenizer.auto import AutoTokenizer, tokenizer_of
from fastbert.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Kind:
    """A task: what answers, and the model that it takes; None for the vectors of an Embedder."""

    pipeline: Any
    model: type[auto.Auto] | None


TASKS = {
    "text-classification": Kind(TextClassification, auto.AutoModelForSequenceClassification),
    "token-classification": Kind(TokenClassification, auto.AutoModelForTokenClassification),
    "question-answering": Kind(QuestionAnswering, auto.AutoModelForQuestionAnswering),
    "fill-mask": Kind(FillMaskPipeline, auto.AutoModelForMaskedLM),
    "sparse-embedding": Kind(SparseEmbedding, auto.AutoModelForMaskedLM),
    "zero-shot-classification": Kind(ZeroShotClassification, auto.AutoModelForSequenceClassification),
    "feature-extraction": Kind(FeatureExtraction, auto.AutoModel),
    "summarization": Kind(Summarization, None),
    "similarity": Kind(Similarity, None),
    "rerank": Kind(Reranker, auto.AutoModelForSequenceClassification),
    "multiple-choice": Kind(MultipleChoice, auto.AutoModelForMultipleChoice),
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    precision: str | None = None,
    quantize: str | None = None,
    device: Any = None,
    revision: str | None = None,
    inference_only: bool = False,
    max_tokens: int = MAX_TOKENS,
    **settings: Any,
) -> Any:
    """The pipeline of a task: called with texts, it gives answers.

    Args:
        task: one of TASKS, or "sentiment-analysis" or "ner"; None for that of the model's head.
        model: a folder or hub id; a model of fastbert; or a live one of transformers, which is accelerated in place.
            For "similarity" and "summarization" a folder of any encoder, an Embedder, an encoder of fastbert, or a live
            SentenceTransformer.
        tokenizer: of a live model: one of fastbert or transformers, or its folder (default: the model's folder).
        dtype: as for `BertModel.from_pretrained`, of a folder; as for `accelerate`, of a live model of transformers.
        precision: the same.
        quantize: the same.
        device: as for `BertModel.from_pretrained`, or -1 for the CPU; a live model is moved there.
        revision: as for `BertModel.from_pretrained`.
        inference_only: as for `BertModel.from_pretrained`.
        max_tokens: most real tokens of a batch.
        settings: defaults of the task's arguments: top_k, say.

    Raises:
        ValueError: there is no such task, no model, or one without the task's head.
    """
    if model is None:
        raise ValueError("model is missing: a folder, a hub id or a model; fastbert chooses none for a task")
    if task is None:
        task = task_of(model, revision)
    kind = TASKS.get(ALIASES.get(task, task))
    if kind is None:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join((*TASKS, *ALIASES))}")
    dtype = settings.pop("torch_dtype", dtype)  # transformers' older name
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = {-1: "cpu"}.get(device, device) if isinstance(device, int) else device  # as in transformers
    options = LoadOptions(dtype, precision, quantize, device, revision, inference_only)
    if kind.model is None:
        return kind.pipeline(_embedder(model, tokenizer, options), **settings)
    if isinstance(model, str | Path):
        tokenizer = model if tokenizer is None else tokenizer
        model = kind.model.from_pretrained(model, **vars(options))
    else:
        model, tokenizer = _live(model, tokenizer, options)
    return kind.pipeline(Runner(model, _tokenizer(tokenizer, revision), max_tokens=max_tokens), **settings)


def _live(model: Any, tokenizer: Any, options: LoadOptions) -> tuple[Any, Any]:
    """A live model for inference where it is asked for, and what its tokenizer is made of.

    Raises:
        ValueError: an option that only loading has, or no tokenizer.
    """
    if isinstance(model, BertPreTrainedModel):
        for name in ("dtype", "precision", "quantize"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name} is given, but the model is loaded already; it is an option of from_pretrained"
                )
        model.eval()
    else:
        model = _accelerated(model, options)
    if options.device is not None:
        model.to(options.device)
    tokenizer = getattr(model, "name_or_path", "") if tokenizer is None else tokenizer
    if not tokenizer:
        raise ValueError("tokenizer is missing: the model is live and names no folder")
    return model, tokenizer


def _accelerated(model: Any, options: LoadOptions) -> Any:
    from fastbert.integrations.transformers import accelerate

    return accelerate(model.eval(), dtype=options.dtype, precision=options.precision, quantize=options.quantize)


def _embedder(model: Any, tokenizer: Any, options: LoadOptions) -> Any:
    """The Embedder of a folder or a live model; or a live SentenceTransformer's vectors."""
    if isinstance(model, Embedder):
        return model
    given = None if tokenizer is None else _tokenizer(tokenizer, options.revision)
    if isinstance(model, str | Path):
        return Embedder.from_pretrained(model, tokenizer=given, **vars(options))
    if isinstance(model, EncoderModel):
        model, tokenizer = _live(model, tokenizer, options)
        return Embedder(model, _tokenizer(tokenizer, options.revision))
    if hasattr(model, "encode"):  # sentence-transformers
        return _Encoding(_accelerated(model, options))
    raise TypeError(
        f"model is a {type(model).__name__}; for vectors it must be a folder, an Embedder, an encoder of fastbert or a "
        "SentenceTransformer, which knows its pooling"
    )


class _Encoding:
    """The vectors of a live SentenceTransformer, by the call of an Embedder; long texts are cut as it cuts them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, texts: Sequence[str], **options: Any) -> Any:
        return self.model.encode(list(texts), convert_to_numpy=True)


def made_pipeline(task: str, model: Any, options: dict[str, Any]) -> Any:
    """The model, if it is a pipeline of the task; else one made of it with these options.

    Raises:
        TypeError: it is a pipeline, and there are options.
    """
    if not isinstance(model, TASKS[task].pipeline):
        return pipeline(task, model, **options)
    if options:
        raise TypeError(f"{min(options)} is given, but model is a pipeline already, which has its own")
    return model


def _tokenizer(given: Any, revision: str | None) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return AutoTokenizer.from_pretrained(given, revision=revision)
    return tokenizer_of(given)
