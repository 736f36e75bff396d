"""BERT and its heads, in plain PyTorch over fastbert.ops."""

from typing import TYPE_CHECKING

from fastbert.lazy import names_of

if TYPE_CHECKING:
    from fastbert.model.auto import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from fastbert.model.bert import BertModel
    from fastbert.model.heads import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        ElectraForPreTraining,
    )
    from fastbert.model.pretrained import BertPreTrainedModel

__all__ = [
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
    "ElectraForPreTraining",
]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            **{name: "auto" if name.startswith("Auto") else "heads" for name in __all__},
            **{"BertModel": "bert", "BertPreTrainedModel": "pretrained"},
        },
        globals(),
    )
