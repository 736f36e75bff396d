"""AutoModel and its kind: the class that a folder's config.json asks for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from fastbert.config import BertConfig


class Auto:
    """BERT's own class for a BERT, else the one that takes every family."""

    home = "heads"  # the module of the classes, imported when one is asked for
    of_bert: str
    of_any: str

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
        return cls.named(cls.of_bert if config.model_type == "bert" else cls.of_any)

    @classmethod
    def named(cls, name: str) -> Any:
        return getattr(import_module(f"fastbert.model.{cls.home}"), name)


class AutoModel(Auto):
    home = "bert"
    of_bert, of_any = "BertModel", "EncoderModel"


class AutoModelForPreTraining(Auto):
    of_bert, of_any = "BertForPreTraining", "ModelForMaskedLM"

    @classmethod
    def of(cls, config: BertConfig) -> Any:
        return cls.named("ElectraForPreTraining") if config.model_type == "electra" else super().of(config)


class AutoModelForMaskedLM(Auto):
    of_bert, of_any = "BertForMaskedLM", "ModelForMaskedLM"


class AutoModelForSequenceClassification(Auto):
    of_bert, of_any = "BertForSequenceClassification", "ModelForSequenceClassification"


class AutoModelForTokenClassification(Auto):
    of_bert, of_any = "BertForTokenClassification", "ModelForTokenClassification"


class AutoModelForQuestionAnswering(Auto):
    of_bert, of_any = "BertForQuestionAnswering", "ModelForQuestionAnswering"


class AutoModelForMultipleChoice(Auto):
    of_bert, of_any = "BertForMultipleChoice", "ModelForMultipleChoice"
