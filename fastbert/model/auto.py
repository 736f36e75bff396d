"""AutoModel and its kind: the class that a folder's config.json asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbert.config import BertConfig
from fastbert.model import heads
from fastbert.model.bert import BertModel, EncoderModel
from fastbert.model.pretrained import BertPreTrainedModel


class Auto:
    """BERT's own class for a BERT, else the one that takes every family."""

    of_bert: type[BertPreTrainedModel]
    of_any: type[BertPreTrainedModel]

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """Loads a folder or hub id, as `BertModel.from_pretrained`, which has the options.

        Raises:
            ValueError: a model_type that is not known; the message lists those that are.
        """
        config = options.get("config") or BertConfig.from_pretrained(path, revision=options.get("revision"))
        return cls.of(config).from_pretrained(path, **options)

    @classmethod
    def of(cls, config: BertConfig) -> Any:
        """The class for a config."""
        return cls.of_bert if config.model_type == "bert" else cls.of_any


class AutoModel(Auto):
    of_bert, of_any = BertModel, EncoderModel


class AutoModelForPreTraining(Auto):
    of_bert, of_any = heads.BertForPreTraining, heads.ModelForMaskedLM

    @classmethod
    def of(cls, config: BertConfig) -> Any:
        return heads.ElectraForPreTraining if config.model_type == "electra" else super().of(config)


class AutoModelForMaskedLM(Auto):
    of_bert, of_any = heads.BertForMaskedLM, heads.ModelForMaskedLM


class AutoModelForSequenceClassification(Auto):
    of_bert, of_any = heads.BertForSequenceClassification, heads.ModelForSequenceClassification


class AutoModelForTokenClassification(Auto):
    of_bert, of_any = heads.BertForTokenClassification, heads.ModelForTokenClassification


class AutoModelForQuestionAnswering(Auto):
    of_bert, of_any = heads.BertForQuestionAnswering, heads.ModelForQuestionAnswering


class AutoModelForMultipleChoice(Auto):
    of_bert, of_any = heads.BertForMultipleChoice, heads.ModelForMultipleChoice
