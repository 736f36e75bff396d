"""The parts of an encoder and of heads, and their sizes, as a config and its family say. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastbert.families.family import Family, setting
from fastbert.families.layer_kinds import key_heads
from fastbert.families.names import ClassesNames


class Linear(NamedTuple):
    """A linear layer: its path, the shape of its weight, and whether it has a bias."""

    path: str
    rows: int
    columns: int
    bias: bool


def layer_linears(config: Any, family: Family) -> dict[str, Linear]:
    """Those of a layer by their paths, in the order of `LayerNames.linears`."""
    names, width, inner = family.layer, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads if family.rotary is None else key_heads(config)
    keys, biased = heads * (width // config.num_attention_heads), setting(config, family.attention_bias, False)
    rows = (width, keys, keys) if names.key is not None else (width + 2 * keys,)
    found = [Linear(path, n, width, biased) for path, n in zip((*names.qkv, names.out), (*rows, width), strict=True)]
    biased = setting(config, family.feed_forward_bias, False)
    fused = 2 * inner if family.gated and names.gate is None else inner
    found += [Linear(path, fused, width, biased) for path in names.ups]
    out_bias = biased if family.out_bias is None else setting(config, family.out_bias, False)
    return {linear.path: linear for linear in (*found, Linear(names.down, width, inner, out_bias))}


def layer_norms(family: Family, *, first: bool) -> tuple[str, ...]:
    """The paths of a layer's norms; the `first` layer may lack the one before attention."""
    return tuple(
        path for path in family.layer.norms if family.first_norm or not (first and path == family.layer.out_norm)
    )


class HeadParts(NamedTuple):
    """A head over states, (M, E) -> (M, N): a layer with its activation and a norm, where it has them, and the last.

    Attributes:
        reads: whose state, of a text: that of the first token ("cls", "bos"), the encoder's pooler's ("pooler"), the
            mean of all ("mean"), or the mean of the tokens' logits ("late").
    """

    dense: Linear | None
    activation: str | None
    norm: str | None
    out: Linear
    reads: str = "cls"


READINGS = ("cls", "bos", "mean", "late")  # that a config may name


def classes_parts(config: Any, family: Family, names: ClassesNames, count: int) -> HeadParts:
    """The head for `count` classes.

    Raises:
        ValueError: the config names another reading than READINGS.
    """
    width, out = config.hidden_size, Linear(names.out, count, config.hidden_size, True)
    if names.dense is None:
        return HeadParts(None, None, names.norm, out, "pooler")
    reads = "cls" if names.pooling is None else config.extra.get(names.pooling, "cls")
    if reads not in READINGS:
        raise ValueError(f"config: {names.pooling} is {reads!r}; it must be 'cls', 'bos', 'mean' or 'late'")
    dense = Linear(names.dense, width, width, setting(config, family.head_bias, False))
    return HeadParts(dense, config.activation_of(names.activation), names.norm, out, reads)


def masked_lm_parts(config: Any, family: Family) -> HeadParts:
    """The masked-language-model head."""
    names, width = family.masked_lm, config.embedding_size or config.hidden_size
    out = Linear(names.decoder, config.vocab_size, width, setting(config, family.decoder_bias, False))
    if names.dense is None:
        return HeadParts(None, None, names.norm, out)
    activation = config.hidden_act if names.activation is None else config.activation_of(names.activation)
    dense = Linear(names.dense, width, config.hidden_size, setting(config, family.head_bias, False))
    return HeadParts(dense, activation, names.norm, out)
