"""pipeline: a task's name and a model, own or of transformers, to what answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.config import BertConfig
from fastbert.inference.embed import MAX_TOKENS, Embedder
from fastbert.model import auto
from fastbert.model.pretrained import BertPreTrainedModel
from fastbert.precision import LoadOptions
from fastbert.tasks.feature_extraction import FeatureExtraction
from fastbert.tasks.fill_mask import FillMaskPipeline
from fastbert.tasks.multiple_choice import MultipleChoice
from fastbert.tasks.question_answering import QuestionAnswering
from fastbert.tasks.reranking import Reranker
from fastbert.tasks.runner import Runner
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
    "zero-shot-classification": Kind(ZeroShotClassification, auto.AutoModelForSequenceClassification),
    "feature-extraction": Kind(FeatureExtraction, auto.AutoModel),
    "summarization": Kind(Summarization, None),
    "similarity": Kind(Similarity, None),
    "rerank": Kind(Reranker, auto.AutoModelForSequenceClassification),
    "multiple-choice": Kind(MultipleChoice, auto.AutoModelForMultipleChoice),
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
# By the last word of the class in a config's `architectures`.
_BY_HEAD = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
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
    """What answers for a task: call it with texts.

    Args:
        task: one of TASKS, or "sentiment-analysis" or "ner"; None for that of the model's head.
        model: a folder or hub id; a model of fastbert; or a live one of transformers, which is accelerated in place.
            For "similarity" and "summarization" a folder of any encoder, or an Embedder.
        tokenizer: of a live model: one of fastbert or transformers, or its folder (default: the model's folder).
        dtype: as for `BertModel.from_pretrained`, of a folder; as for `accelerate`, of a live model of transformers.
        precision: the same.
        quantize: the same.
        device: as for `BertModel.from_pretrained`; a live model is moved there.
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
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options = LoadOptions(dtype, precision, quantize, device, revision, inference_only)
    if kind.model is None:
        if not isinstance(model, Embedder):
            model = Embedder.from_pretrained(model, tokenizer=tokenizer, **vars(options))
        return kind.pipeline(model, **settings)
    if isinstance(model, str | Path):
        tokenizer = model if tokenizer is None else tokenizer
        model = kind.model.from_pretrained(model, **vars(options))
    elif not isinstance(model, BertPreTrainedModel):
        from fastbert.integrations.transformers import accelerate

        model = accelerate(model.eval(), dtype=options.dtype, precision=precision, quantize=quantize)
        if device is not None:
            model.to(device)
        tokenizer = getattr(model, "name_or_path", "") if tokenizer is None else tokenizer
    if not tokenizer:
        raise ValueError("tokenizer is missing: the model is live and names no folder")
    return kind.pipeline(Runner(model, _tokenizer(tokenizer, revision), max_tokens=max_tokens), **settings)


def task_of(model: Any, revision: str | None = None) -> str:
    """The task of a model's head, by its class or by `architectures` in its folder.

    Raises:
        ValueError: it has none of the heads that have a task.
    """
    if isinstance(model, str | Path):
        config = BertConfig.from_pretrained(model, revision=revision)
        names = config.extra.get("architectures") or []
    else:
        names = [type(model).__name__]
    if (found := head_task(names)) is not None:
        return found
    shown = ", ".join(map(str, names)) or "no architectures in config.json"
    raise ValueError(f"the model has no head of a task ({shown}); the tasks are {', '.join(TASKS)}")


def head_task(names: Sequence[Any]) -> str | None:
    """The task of the first of these classes whose head has one."""
    return next((task for name in names for head, task in _BY_HEAD.items() if str(name).endswith(head)), None)


def _tokenizer(given: Any, revision: str | None) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return AutoTokenizer.from_pretrained(given, revision=revision)
    return tokenizer_of(given)
