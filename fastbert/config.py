"""The shape and settings of a BERT, read from and written as Hugging Face's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastbert.files import write_text
from fastbert.hub import resolve_file

CONFIG_NAME = "config.json"
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclass
class BertConfig:
    """A BERT's sizes and settings, by transformers' names and with its defaults.

    Keys that fastbert has no use for (from the file they came in) are kept in `extra` and written back
    by `save_pretrained`. Setting `num_labels` (or giving it to `from_dict` or `from_pretrained`) makes
    `id2label` and `label2id` anew, as in transformers.

    Raises:
        ValueError: a size that is not positive, a hidden size that the heads do not divide, a decoder.
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
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            least = 0 if name == "num_hidden_layers" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"config: {name} is {value!r}; it must be an integer of at least {least}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("is_decoder", "add_cross_attention"):
            if self.extra.get(name):
                raise ValueError(f"config: {name} is true; fastbert runs encoders only")
        positions = self.extra.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"config: position_embedding_type is {positions!r}; fastbert knows 'absolute' only")
        self.id2label = {int(index): label for index, label in self.id2label.items()}

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def head_dropout(self) -> float:
        """The dropout before a classification head: `classifier_dropout`, or the hidden one where that is None."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> BertConfig:
        """Builds a config from config.json's keys; `overrides`, its fields and num_labels, win.

        Raises:
            TypeError: an override that is no field.
        """
        known_names = {f.name for f in fields(cls)} - {"extra"} | {"num_labels"}
        if unknown := set(overrides) - known_names:
            raise TypeError(f"BertConfig has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known_names))}")
        values = {**values, **overrides}
        num_labels = values.pop("num_labels", None)
        model_type = values.pop("model_type", "bert")
        if model_type != "bert":
            raise ValueError(f"config: model_type is {model_type!r}; fastbert reads 'bert'")
        own = {f.name for f in fields(cls)} - {"extra"}
        known = {name: value for name, value in values.items() if name in own}
        config = cls(**known, extra={name: value for name, value in values.items() if name not in own})
        if num_labels is not None and num_labels != config.num_labels:
            config.num_labels = num_labels
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None, **overrides: Any) -> BertConfig:
        """Reads config.json from a folder or a hub id."""
        file = resolve_file(path, CONFIG_NAME, revision=revision)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not a JSON file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__}, not a JSON object")
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json, `extra` among them; what stands at its default in both libraries too."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values["id2label"] = {str(index): label for index, label in self.id2label.items()}
        return {**self.extra, "model_type": "bert", **values}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json into `folder`, atomically."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        write_text(Path(folder) / CONFIG_NAME, text + "\n")
