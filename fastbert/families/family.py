"""What a family says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config is read without torch
    from torch import nn


@dataclass(frozen=True)
class LayerNames:
    """Paths of a layer's parts, from the layer."""

    attention: str  # the module with attention_head_size and scaling
    query: str
    key: str
    value: str
    out: str
    out_norm: str
    up: str
    down: str
    norm: str
    attention_dropout: str
    out_dropout: str | None  # None: no dropout after attention
    dropout: str
    activation: str
    containers: tuple[str, ...]  # modules that only hold these, parents first

    @property
    def linears(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.out, self.up, self.down

    @property
    def norms(self) -> tuple[str, ...]:
        return self.out_norm, self.norm

    @property
    def dropouts(self) -> tuple[str, ...]:
        names = self.attention_dropout, self.out_dropout, self.dropout
        return tuple(name for name in names if name is not None)


# As BERT and those who copied its code name them.
BERT_LAYER = LayerNames(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    out_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
    attention_dropout="attention.self.dropout",
    out_dropout="attention.output.dropout",
    dropout="output.dropout",
    activation="intermediate.intermediate_act_fn",
    containers=("attention", "attention.self", "attention.output", "intermediate", "output"),
)


@dataclass(frozen=True)
class MaskedLMNames:
    """Paths of a masked-language-model head's parts, from the model.

    They are a transform to the width of the word table, and the decoder, whose weight is the word table's.
    """

    dense: str
    norm: str
    decoder: str
    bias: str | None = None  # a second name of the decoder's bias
    containers: tuple[str, ...] = ()
    activation: str | None = None  # None: the encoder's


BERT_MASKED_LM = MaskedLMNames(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
    ("cls", "cls.predictions", "cls.predictions.transform"),
)


@dataclass(frozen=True)
class ClassesNames:
    """Paths of the parts of a head for classes: a layer over the first token's state, unless the encoder has a pooler,
    dropout, and the classifier."""

    dense: str | None = None
    out: str = "classifier"
    activation: str = "tanh"
    containers: tuple[str, ...] = ()
    drops_first: bool = False  # also before the first layer

    @property
    def dropout(self) -> str:
        return f"{self.out.rpartition('.')[0]}.dropout".removeprefix(".")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Family:
    """A family of encoders, under transformers' names."""

    model_type: str
    prefix: str  # of its classes
    attribute: str  # of a model with a head: its encoder
    encoder: str = "encoder"  # of an encoder: the module with the layers, in its `layer`
    layer: LayerNames = field(default=BERT_LAYER)
    activation: str = "hidden_act"  # the field of its config
    distance_table: str | None = None  # of an encoder: the table of T5's buckets, (32, H), where attention has a bias
    has_token_types: bool = True
    has_pooler: bool = True
    # Of an encoder whose embeddings have another width than its layers: the linear layer between them.
    projection: str | None = None
    # Positions start at padding_idx + 1 and count the tokens other than padding, as in fairseq; else the column.
    counts_tokens: bool = False
    masked_lm: MaskedLMNames = BERT_MASKED_LM
    classes: ClassesNames = ClassesNames()
    choices: ClassesNames = ClassesNames()
    # Where it is not BERT's: the field with the dropout of a head ("choices", "tokens", "answers"), by BERT's name.
    head_dropouts: Mapping[str, str] = field(default_factory=dict)
    # Heads for classes read the state of column 0; BERT's pooler does so within the encoder.
    heads_read_first: bool = False
    # Its config.json: the names of fields where they differ from BERT's, by BERT's; the defaults that differ, by BERT's
    # names; and the fields of BERT that it lacks.
    field_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset({"embedding_size"})
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"  # transformers' class
    has_cross_attention: bool = True  # in transformers' class

    @cached_property
    def module(self) -> str:
        """The module of transformers' classes."""
        name = self.model_type.replace("-", "_")
        return f"transformers.models.{name}.modeling_{name}"

    @property
    def base(self) -> str:
        """transformers' class of the encoder."""
        return f"{self.prefix}Model"

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers of an encoder."""
        found: nn.ModuleList = getattr(model, self.encoder).layer
        return found

    def first_position(self, embeddings: nn.Module) -> int:
        """The position of a sequence's first token."""
        padding: Any = embeddings.padding_idx if self.counts_tokens else -1
        return int(padding) + 1
