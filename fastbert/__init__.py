"""A BERT engine: Hugging Face checkpoints, the same numbers, several times faster.

Importing fastbert needs torch only: no triton, no transformers, no GPU query.
"""

from fastbert.backend import BackendError, use_backend
from fastbert.config import BertConfig
from fastbert.explain import explain
from fastbert.inference import CompiledModel, Embedder, FillMask, compile
from fastbert.integrations.transformers import accelerate, restore
from fastbert.model import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from fastbert.packing import PackedBatch, pack, unpack
from fastbert.tokenization import BertTokenizer

__version__ = "0.1.0"

__all__ = [
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
    "Embedder",
    "FillMask",
    "PackedBatch",
    "accelerate",
    "compile",
    "explain",
    "pack",
    "restore",
    "unpack",
    "use_backend",
]
