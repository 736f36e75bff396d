"""What a family says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config is read without torch
    from torch import nn


@dataclass(frozen=True)
class EmbeddingNames:
    """Paths of the tables and what follows them, from the encoder; None for a part that the family lacks."""

    word: str = "embeddings.word_embeddings"
    positions: str | None = "embeddings.position_embeddings"
    types: str | None = "embeddings.token_type_embeddings"
    norm: str | None = "embeddings.LayerNorm"
    dropout: str | None = "embeddings.dropout"

    @property
    def owner(self) -> str:
        """The module with the tables; "" for the encoder."""
        return self.word.rpartition(".")[0]

    @property
    def tables(self) -> tuple[str, ...]:
        """Those besides the words'."""
        return tuple(name for name in (self.positions, self.types) if name is not None)


@dataclass(frozen=True)
class LayerNames:
    """Paths of a layer's parts, from the layer. Dropouts are None where there is none."""

    attention: str  # the module with attention's constants
    head_size: str = field(default="attention_head_size", kw_only=True)  # its attribute
    query: str  # of queries, keys and values together if `key` is None
    key: str | None
    value: str | None
    out: str
    out_norm: str  # after attention or, where norms stand before, before it
    up: str  # gated, both halves in one if `gate` is None
    down: str
    norm: str  # after the feed-forward, or before it
    attention_dropout: str | None  # None: a number, `attention_dropout` of the attention module
    out_dropout: str | None
    dropout: str | None
    activation: str
    containers: tuple[str, ...]  # modules that only hold these, parents first
    gate: str | None = None  # the half that the activation takes
    inner_dropout: str | None = None  # before `down`

    @property
    def qkv(self) -> tuple[str, ...]:
        return tuple(name for name in (self.query, self.key, self.value) if name is not None)

    @property
    def ups(self) -> tuple[str, ...]:
        """The first product of the feed-forward, the half that the activation takes first."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def linears(self) -> tuple[str, ...]:
        return *self.qkv, self.out, *self.ups, self.down

    @property
    def norms(self) -> tuple[str, ...]:
        return self.out_norm, self.norm

    @property
    def dropouts(self) -> tuple[str, ...]:
        names = self.attention_dropout, self.out_dropout, self.inner_dropout, self.dropout
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

    They are a transform to the width of the word table, if there is one, and the decoder, whose weight may be the word
    table's.
    """

    dense: str | None
    norm: str | None
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
    """Paths of the parts of a head for classes: a layer with a norm over the text's state or the tokens', unless the
    encoder has a pooler; dropout; and the classifier."""

    dense: str | None = None
    out: str = "classifier"
    activation: str = "tanh"
    containers: tuple[str, ...] = ()
    drops_first: bool = False  # also before the first layer
    norm: str | None = None
    drop: str | None = "dropout"  # next to `out`
    # The field of the config that says which state is the text's: the first token's ("cls", "bos"), the mean of all
    # ("mean"), or the mean of the tokens' logits ("late"). None: the first token's.
    pooling: str | None = None


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Family:
    """A family of encoders, under transformers' names."""

    model_type: str
    prefix: str  # of its classes
    attribute: str  # of a model with a head: its encoder
    layer_list: str = "encoder.layer"  # of an encoder: the layers
    embeddings: EmbeddingNames = EmbeddingNames()
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
    distance_table: str | None = None  # of an encoder: the table of T5's buckets, (32, H), where attention has a bias
    has_pooler: bool = True
    pools_alone: bool = True  # an encoder without a head has the pooler
    # Of an encoder whose embeddings have another width than its layers: the linear layer between them.
    projection: str | None = None
    # Positions start at padding_idx + 1 and count the tokens other than padding, as in fairseq; else the column.
    counts_tokens: bool = False
    masked_lm: MaskedLMNames = BERT_MASKED_LM
    classes: ClassesNames = ClassesNames()
    choices: ClassesNames | None = ClassesNames()  # None: transformers has no such head, as with the next two
    tokens: ClassesNames | None = ClassesNames()
    answers: ClassesNames | None = ClassesNames(out="qa_outputs")
    # In files: components of names, each with the parameter's; tensors that hold several parameters, one after the
    # other; other names of `attribute`.
    stored_names: tuple[tuple[str, str], ...] = ()
    stored_together: tuple[tuple[str, tuple[str, ...]], ...] = ()
    older_attributes: tuple[str, ...] = ()
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

    @property
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
