"""The names that families give the parts of an encoder, a layer and a head: paths within them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingNames:
    """Paths of the tables and what follows them, from the encoder; None for a part that the family lacks."""

    word: str = "embeddings.word_embeddings"
    positions: str | None = "embeddings.position_embeddings"
    types: str | None = "embeddings.token_type_embeddings"
    norm: str | None = "embeddings.LayerNorm"
    dropout: str | None = "embeddings.dropout"

    @cached_property
    def owner(self) -> str:
        """The module with the tables; "" for the encoder."""
        return self.word.rpartition(".")[0]

    @property
    def tables(self) -> tuple[str, ...]:
        """Those besides the words'."""
        return tuple(name for name in (self.positions, self.types) if name is not None)


BERT_EMBEDDINGS = EmbeddingNames()


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
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


BERT_CLASSES = ClassesNames()
BERT_ANSWERS = ClassesNames(out="qa_outputs")
