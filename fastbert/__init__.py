"""A BERT engine: Hugging Face checkpoints, the same numbers, several times faster.

Names are imported on first use: `import fastbert` alone imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastbert.lazy import names_of

if TYPE_CHECKING:
    from fastbert import integrations as integrations
    from fastbert import light as light
    from fastbert import tasks as tasks
    from fastbert import training as training  # the other modules come with the names below
    from fastbert.config import BertConfig
    from fastbert.diagnostics import explain
    from fastbert.inference import CompiledModel, Embedder, compile
    from fastbert.integrations.transformers import accelerate, refresh, restore
    from fastbert.model import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        ElectraForPreTraining,
    )
    from fastbert.ops.dispatch import BackendError, use_backend
    from fastbert.packing import PackedBatch, pack, unpack
    from fastbert.tasks import (
        FillMask,
        MultiHead,
        Reranker,
        attention_maps,
        attribute,
        augment,
        nearest_tokens,
        pipeline,
        rerank,
        search,
    )
    from fastbert.tokenizer.auto import AutoTokenizer
    from fastbert.tokenizer.bert import BertTokenizer
    from fastbert.tokenizer.tokenizer import Tokenizer
    from fastbert.training.finetune.api import Finetuned, finetune

__version__ = "0.1.0"

__all__ = [
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BackendError",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertTokenizer",
    "CompiledModel",
    "ElectraForPreTraining",
    "Embedder",
    "FillMask",
    "Finetuned",
    "MultiHead",
    "PackedBatch",
    "Reranker",
    "Tokenizer",
    "accelerate",
    "attention_maps",
    "attribute",
    "augment",
    "compile",
    "explain",
    "finetune",
    "nearest_tokens",
    "pack",
    "pipeline",
    "refresh",
    "rerank",
    "restore",
    "search",
    "unpack",
    "use_backend",
]

# The module of each public name; a name not listed is in fastbert.model. No module has one of these names.
_HOMES = {
    **dict.fromkeys(("BackendError", "use_backend"), "ops.dispatch"),
    "BertConfig": "config",
    "explain": "diagnostics",
    **dict.fromkeys(("CompiledModel", "Embedder", "compile"), "inference"),
    **dict.fromkeys(("accelerate", "refresh", "restore"), "integrations.transformers"),
    **dict.fromkeys(("PackedBatch", "pack", "unpack"), "packing"),
    "AutoTokenizer": "tokenizer.auto",
    **dict.fromkeys(("MultiHead", "Reranker", "attention_maps", "attribute", "augment", "nearest_tokens"), "tasks"),
    **dict.fromkeys(("FillMask", "pipeline", "rerank", "search"), "tasks"),
    "BertTokenizer": "tokenizer.bert",
    "Tokenizer": "tokenizer.tokenizer",
    **dict.fromkeys(("Finetuned", "finetune"), "training.finetune.api"),
}
# Modules that `import fastbert` makes reachable as attributes.
_MODULES = (
    "config",
    "families",
    "inference",
    "integrations",
    "light",
    "model",
    "native",
    "ops",
    "packing",
    "reference",
    "tasks",
    "training",
)


if not TYPE_CHECKING:  # type checkers have the imports above; with __getattr__ they would accept any name
    _name_of = names_of(__name__, {name: _HOMES.get(name, "model") for name in __all__}, globals())

    def __getattr__(name: str) -> Any:
        return import_module(f"fastbert.{name}") if name in _MODULES else _name_of(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
