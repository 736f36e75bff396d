"""The shape and settings of an encoder, read from and written as Hugging Face's config.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastbert.checkpoint import checks
from fastbert.checkpoint.files import write_text
from fastbert.checkpoint.hub import resolve_file
from fastbert.checkpoint.json_files import read_json, shown
from fastbert.families import FAMILIES, Family
from fastbert.families.family import setting
from fastbert.families.layer_kinds import key_heads, layer_kinds, place_count

CONFIG_NAME = "config.json"
_LONGEST = 2**24
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_NUMBERS = {
    "hidden_dropout_prob": checks.number(0, 1),
    "attention_probs_dropout_prob": checks.number(0, 1),
    "classifier_dropout": checks.or_null(checks.number(0, 1)),
    "initializer_range": checks.number(0, 1000),
    "layer_norm_eps": checks.number(0, 1),
}
_FIELDS = {
    "vocab_size": checks.integer(1, 2**31 - 1),
    "hidden_size": checks.integer(1, 2**14),
    "num_hidden_layers": checks.integer(0, 1024),
    "num_attention_heads": checks.integer(1, 2**14),
    "intermediate_size": checks.integer(1, _LONGEST),
    "max_position_embeddings": checks.integer(1, _LONGEST),
    "type_vocab_size": checks.integer(0, _LONGEST),
    "embedding_size": checks.or_null(checks.integer(1, 2**14)),
    **_NUMBERS,
    **dict.fromkeys(("tie_word_embeddings", "output_hidden_states", "output_attentions", "return_dict"), checks.FLAG),
    "hidden_act": (checks.STRING[0], "the name of an activation"),
    "problem_type": checks.or_null((_PROBLEMS.__contains__, f"one of {', '.join(_PROBLEMS)}")),
}
# For these, transformers replaces a null in the file by its default.
_DEFAULT_FOR_NULL = ("id2label", "label2id", "output_hidden_states", "output_attentions", "return_dict")
_MOST_LABELS = 1_000_000


def family_of(model_type: Any) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"config: model_type is {shown(model_type)}; fastbert reads {known}")
    return family


@dataclass
class BertConfig:
    """An encoder's sizes and settings, by the names that transformers has for BERT's, and with its defaults.

    `model_type` is the family. The file has the names and defaults of the family.

    Keys of the file that fastbert does not use are kept in `extra` and written back by
    `save_pretrained`. Setting `num_labels` (or giving it to `from_dict` or `from_pretrained`) makes
    new `id2label` and `label2id`, as in transformers.

    Raises:
        ValueError: a field has the wrong type or is out of range, num_attention_heads does not divide hidden_size,
            pad_token_id is outside the vocabulary, or the model is a decoder. The message names the field.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    problem_type: str | None = None
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    label2id: dict[str, int] = field(default_factory=lambda: {"LABEL_0": 0, "LABEL_1": 1})
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    model_type: str = "bert"
    embedding_size: int | None = None  # ELECTRA's width of the embeddings; None: hidden_size
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.fields("config", vars(self), _FIELDS, others=True)
        pads = checks.or_null(checks.integer(0, self.vocab_size - 1, ", vocab_size - 1"))
        checks.fields("config", {"pad_token_id": self.pad_token_id}, {"pad_token_id": pads})
        for name in _NUMBERS:
            if getattr(self, name) is not None:
                setattr(self, name, float(getattr(self, name)))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("is_decoder", "add_cross_attention"):
            if self.extra.get(name):
                raise ValueError(f"config: {name} is true; fastbert runs encoders only")
        family = family_of(self.model_type)
        positions = self.extra.get("position_embedding_type", "absolute")
        learned = family.embeddings.positions is not None
        if (learned or family.alibi) and positions != ("alibi" if family.alibi else "absolute"):
            raise ValueError(
                f"config: position_embedding_type is {shown(positions)}; fastbert knows 'absolute', and 'alibi' of "
                "jina-embeddings-v2"
            )
        if family.counts_tokens and self.pad_token_id is None:
            raise ValueError(f"config: pad_token_id is None; the positions of {self.model_type!r} begin after it")
        for name, known in family.only_known.items():
            if self.extra.get(name, known) != known:
                raise ValueError(f"config: {name} is {shown(self.extra[name])}; fastbert knows {known!r} only")
        own = {f.name for f in fields(self)}
        self.extra = {**{n: v for n, v in family.defaults.items() if n not in own}, **self.extra}
        if family.rotary is not None:
            layer_kinds(self, family)
            key_heads(self)
        elif not self.type_vocab_size:
            raise ValueError("config: type_vocab_size is 0; it must be an integer of at least 1")
        self.id2label = self._labels_by_id()
        self._check_label2id()

    def _labels_by_id(self) -> dict[int, str]:
        try:
            labels = {int(index): label for index, label in self.id2label.items() if not isinstance(index, float)}
        except (AttributeError, ValueError, TypeError):
            labels = {}
        sound = all(index >= 0 and isinstance(label, str | int | float) for index, label in labels.items())
        if not sound or not labels or len(labels) != len(self.id2label) or len(labels) > _MOST_LABELS:
            checks.refuse(
                "config", "id2label", self.id2label, f"an object of 1 to {_MOST_LABELS} labels by their ids from 0"
            )
        return labels

    def _check_label2id(self) -> None:
        values = self.label2id.values() if isinstance(self.label2id, dict) else [None]
        if not all(checks.is_integer(value) or (isinstance(value, str) and value.isdecimal()) for value in values):
            checks.refuse("config", "label2id", self.label2id, "an object of ids by their labels")

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        checks.fields("config", {"num_labels": count}, {"num_labels": checks.integer(1, _MOST_LABELS)})
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def head_dropout(self) -> float:
        """The dropout before a classification head: `classifier_dropout`, or `hidden_dropout_prob` if it is None."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def has(self, value: str | bool, default: bool = False) -> bool:
        """A constant of the family, or the field that it names: see `Family.norm_bias` and the like."""
        return setting(self, value, default)

    def activation_of(self, name: str) -> str:
        """An activation, or that in the field of this name."""
        return str(self.extra.get(name, "gelu")) if name.startswith("classifier_") else name

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return key_heads(self) if family_of(self.model_type).rotary is not None else self.num_attention_heads

    def dropout_of(self, head: str, default: float) -> float:
        """The dropout of a head, "choices", "tokens" or "answers": of the field that its family names, or `default`."""
        name = family_of(self.model_type).head_dropouts.get(head)
        if name is None:
            return default
        value = getattr(self, name) if hasattr(self, name) else self.extra.get(name, 0.1)
        checks.fields("config", {name: value}, {name: checks.number(0, 1)})
        return float(value)

    @property
    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return int(self.padding_idx or 0) + 1 if family_of(self.model_type).counts_tokens else 0

    @property
    def padding_idx(self) -> int | None:
        """The row of the table of words that stays zero."""
        own = family_of(self.model_type).padding_idx
        return self.pad_token_id if own is None else own

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence."""
        return place_count(self, family_of(self.model_type)) - self.first_position

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> BertConfig:
        """Builds a config from the keys of config.json; `overrides` (fields and num_labels) take precedence.

        Raises:
            TypeError: an override is not a field.
        """
        known_names = {f.name for f in fields(cls)} - {"extra"} | {"num_labels"}
        if unknown := set(overrides) - known_names:
            raise TypeError(f"BertConfig has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known_names))}")
        values = {**values, **overrides}
        num_labels = values.pop("num_labels", None)
        if values.get("model_type") == "bert" and values.get("position_embedding_type") == "alibi":
            values["model_type"] = "jina_bert"  # the file has the type that its code was made from
        family = family_of(values.get("model_type", "bert"))
        ours = {theirs: name for name, theirs in family.field_names.items()}
        older = {ours_: values[name] for name, ours_ in family.older_names.items() if values.get(name) is not None}
        plain = {name: value for name, value in values.items() if name not in ours}
        renamed = {ours[name]: value for name, value in values.items() if name in ours}  # where both are, this counts
        values = {**family.defaults, **older, **plain, **renamed}
        values = {name: v for name, v in values.items() if v is not None or name not in _DEFAULT_FOR_NULL}
        own = {f.name for f in fields(cls)} - {"extra"} - family.lacks
        known = {name: value for name, value in values.items() if name in own}
        try:
            config = cls(**known, extra={name: value for name, value in values.items() if name not in own})
        except ValueError as error:
            raise ValueError(_by_the_file(str(error), family)) from None
        if num_labels is not None and (not checks.is_integer(num_labels) or num_labels != config.num_labels):
            config.num_labels = num_labels
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None, **overrides: Any) -> BertConfig:
        """Reads config.json from a folder or a hub id."""
        file = resolve_file(path, CONFIG_NAME, revision=revision)
        values = read_json(file)
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json, including `extra` and fields that have their default value."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values["id2label"] = {str(index): label for index, label in self.id2label.items()}
        family = family_of(self.model_type)
        usual = {f.name: family.defaults.get(f.name, f.default) for f in fields(self)}
        kept = {name: v for name, v in values.items() if name not in family.unwritten or v != usual[name]}
        own = {family.field_names.get(name, name): v for name, v in kept.items() if name not in family.lacks}
        return {**self.extra, **own, "model_type": family.stored_type or self.model_type}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json into `folder`, atomically."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        write_text(Path(folder) / CONFIG_NAME, text + "\n")


def _by_the_file(message: str, family: Family) -> str:
    """A message with the names that the family's file has for fields."""
    for ours, theirs in family.field_names.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message
