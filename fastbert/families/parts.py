"""The parts of an encoder and their sizes, as a config and its family say: for modules and for weights without them."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastbert.families.family import Family, setting
from fastbert.families.layer_kinds import key_heads


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
