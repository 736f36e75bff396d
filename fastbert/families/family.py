"""The description of a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastbert.families.names import (
    BERT_ANSWERS,
    BERT_CLASSES,
    BERT_EMBEDDINGS,
    BERT_LAYER,
    BERT_MASKED_LM,
    ClassesNames,
    EmbeddingNames,
    LayerNames,
    MaskedLMNames,
)

if TYPE_CHECKING:  # a config is read without torch
    from torch import nn


@dataclass(frozen=True, eq=False, repr=False)  # compared and hashed by identity
class Family:
    """A family of encoders, under transformers' names."""

    model_type: str
    prefix: str  # of its classes
    attribute: str  # of a model with a head: its encoder
    layer_list: str = "encoder.layer"  # of an encoder: the layers
    embeddings: EmbeddingNames = BERT_EMBEDDINGS
    layer: LayerNames = field(default=BERT_LAYER)
    activation: str = "hidden_act"  # the field of its config
    gated: bool = False  # the feed-forward: activation(a) b of two products
    rms: bool = False  # RMSNorm
    final_norm: str | None = None  # of an encoder whose norms stand before attention and feed-forward: the last one
    first_norm: bool = True  # layer 0 has a norm before attention, where norms stand before
    rotary: str | None = None  # of an encoder: the module with the frequencies of rotary positions
    rope_theta: Mapping[str, float] = field(default_factory=dict)  # the default of each kind of layer
    has_windows: bool = False  # there are two kinds of layers: those of `layer_kinds.LOCAL` have a window
    # Whether products and norms have biases: fields of the config, or constants.
    attention_bias: str | bool = True
    feed_forward_bias: str | bool = True
    out_bias: str | bool | None = None  # of the feed-forward's second product, where it differs
    norm_bias: str | bool = True
    alibi: bool = False  # attention has a bias for distance, with a slope for each head
    distance_table: str | None = None  # of an encoder: the table of T5's buckets, (32, H), where attention has a bias
    has_pooler: bool = True
    pools_alone: bool = True  # an encoder without a head has the pooler
    # Of an encoder whose embeddings have another width than its layers: the linear layer between them.
    projection: str | None = None
    scaled_init: bool = False  # fresh weights are drawn as ModernBERT's
    padding_idx: int | None = None  # that of the tables, whatever pad_token_id is
    # Positions start at padding_idx + 1 and count the tokens other than padding, as in fairseq; else the column.
    counts_tokens: bool = False
    masked_lm: MaskedLMNames = BERT_MASKED_LM
    classes: ClassesNames = BERT_CLASSES
    choices: ClassesNames | None = BERT_CLASSES  # None: transformers has no such head, as with the next two
    tokens: ClassesNames | None = BERT_CLASSES
    answers: ClassesNames | None = BERT_ANSWERS
    # In files: components of names, each with the parameter's; tensors that hold several parameters, one after the
    # other; other names of `attribute`.
    stored_names: tuple[tuple[str, str], ...] = ()
    stored_together: tuple[tuple[str, tuple[str, ...]], ...] = ()
    older_attributes: tuple[str, ...] = ()
    stored_type: str | None = None  # config.json's model_type, where transformers has no class of the family
    # Biases of heads, as above: of the layer before the classifier, and of the decoder.
    head_bias: str | bool = True
    decoder_bias: str | bool = True
    # Where it is not BERT's: the field with the dropout of a head ("choices", "tokens", "answers"), by BERT's name.
    head_dropouts: Mapping[str, str] = field(default_factory=dict)
    # Heads for classes read the state of column 0; BERT's pooler does so within the encoder.
    heads_read_first: bool = False
    # Its config.json: the names of fields where they differ from BERT's, by BERT's; the defaults that differ, by BERT's
    # names; and the fields of BERT that it lacks.
    field_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    older_names: Mapping[str, str] = field(default_factory=dict)  # names in older files, and BERT's
    # Fields that change the numbers, each with the only value that fastbert knows.
    only_known: Mapping[str, Any] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset({"embedding_size"})
    unwritten: frozenset[str] = frozenset()  # fields that the file has only where they are not the default
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"  # transformers' class
    has_cross_attention: bool = True  # in transformers' class

    @cached_property
    def module(self) -> str:
        """The module of transformers' classes."""
        name = self.model_type.replace("-", "_")
        return f"transformers.models.{name}.modeling_{name}"

    @cached_property
    def knows_distances(self) -> bool:
        """Attention depends on the distance between the columns of two tokens."""
        return self.distance_table is not None or self.has_windows or self.alibi

    @property
    def base(self) -> str:
        """transformers' class of the encoder."""
        return f"{self.prefix}Model"

    @cached_property
    def pre_norm(self) -> bool:
        """Norms stand before attention and feed-forward."""
        return self.final_norm is not None

    @property
    def has_token_types(self) -> bool:
        return self.embeddings.types is not None

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers of an encoder."""
        found: Any = model.get_submodule(self.layer_list)
        return found

    def table(self, model: nn.Module, path: str | None) -> Any:
        """The table at one of the paths of `embeddings`; None without one."""
        if path is None:
            return None
        owner, _, name = path.rpartition(".")
        return model.get_submodule(owner)._modules.get(name)

    def first_position(self, model: nn.Module) -> int:
        """The position of a sequence's first token."""
        embeddings: Any = model.get_submodule(self.embeddings.owner)
        return int(embeddings.padding_idx) + 1 if self.counts_tokens else 0


def setting(config: Any, value: str | bool, default: bool) -> bool:
    """A constant of a family, or the field of the config that it names: transformers' config or fastbert's."""
    if isinstance(value, bool):
        return value
    found = getattr(config, value, None)
    return bool(getattr(config, "extra", {}).get(value, default) if found is None else found)
