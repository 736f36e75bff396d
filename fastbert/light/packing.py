"""An encoder's weights as the kernels read them, an array for each name: what a model is made of, and a cache holds.

word, position, type, embed.weight, embed.bias      the tables and their norm
projection                                          packed, where embeddings have another width than layers
I.qkv, I.out, I.up, I.down                          packed, of layer I
I.attention_norm.weight, I.norm.bias, ...           its norms
final_norm.weight, final_norm.bias, distances       where the family has them
pooler                                              packed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastbert.config import BertConfig, family_of
from fastbert.engine.library import C
from fastbert.engine.memory import address_of
from fastbert.engine.packed import RowBlock, fill_panels, pack, rows_in_turns
from fastbert.engine.positions import BUCKETS
from fastbert.families.parts import HeadParts, Linear, layer_linears, layer_norms
from fastbert.light.weights import Weights

Arrays = dict[str, np.ndarray]


def dtype_code(dtype: str) -> int:
    """The number of "float32" or "bfloat16" in C++."""
    return int({"float32": C.F32, "bfloat16": C.BF16}[dtype])


def packed_linears(
    weights: Weights, linears: Sequence[Linear], precision: str | None, threads: int, *, gated: bool = False
) -> np.ndarray:
    """The product of linear layers over the same input, stacked by rows; `gated`, for such a product of two halves."""
    width, code = linears[0].columns, dtype_code(weights.dtype)
    rows = [weights.get(f"{one.path}.weight", (one.rows, width)) for one in linears]
    biases: list[Any] = [weights.get(f"{one.path}.bias", (one.rows,)) if one.bias else None for one in linears]
    if gated:
        order = rows_in_turns(sum(one.rows for one in linears))
        rows, biases = [_reordered(rows, order)], [None if biases[0] is None else _reordered(biases, order)]
    elif not fill_panels(code, precision, [*map(len, rows)], width):
        rows, biases = [np.concatenate(rows)], [None if biases[0] is None else np.concatenate(biases)]
    blocks = [
        RowBlock(len(x), address_of(x), width, 0 if bias is None else address_of(bias))
        for x, bias in zip(rows, biases, strict=True)
    ]
    found = pack(code, precision, blocks, width, threads)
    weights.forget()
    return found


def _reordered(parts: Sequence[Any], order: np.ndarray) -> np.ndarray:
    x = np.concatenate(parts)
    y = np.zeros((len(order), *x.shape[1:]), x.dtype)
    y[order >= 0] = x[order[order >= 0]]
    return y


def pack_encoder(
    weights: Weights, config: BertConfig, precision: str | None, threads: int, *, with_pooler: bool
) -> Arrays:
    """The arrays of an encoder but for its tables.

    Args:
        precision: of the layers' products, as for ops.linear.
        threads: to pack with.

    Raises:
        ValueError: a tensor is missing or has another shape than the config says.
    """
    family = family_of(config.model_type)
    weights.check_layers(config.num_hidden_layers)
    found, names = Arrays(), family.embeddings
    width = config.embedding_size or config.hidden_size
    if names.norm is not None:
        found |= _norm(weights, config, "embed", names.norm, width)
    if family.projection is not None and width != config.hidden_size:
        linear = Linear(family.projection, config.hidden_size, width, True)
        found["projection"] = packed_linears(weights, [linear], None, threads)
    linears = layer_linears(config, family)
    for i in range(config.num_hidden_layers):
        for name, array in _layer(weights, config, linears, i, precision, threads):
            found[f"{i}.{name}"] = array
    if family.final_norm is not None:
        found |= _norm(weights, config, "final_norm", family.final_norm, config.hidden_size)
    if family.distance_table is not None:
        table = weights.get(f"{family.distance_table}.weight", (BUCKETS, config.num_attention_heads))
        found["distances"] = table.copy()
    if with_pooler:
        size = config.hidden_size
        found["pooler"] = packed_linears(weights, [Linear("pooler.dense", size, size, True)], None, threads)
    return found


def tables(weights: Weights, config: BertConfig) -> Arrays:
    """The tables of the embeddings, mapped where they are stored in the model's dtype."""
    names, width = family_of(config.model_type).embeddings, config.embedding_size or config.hidden_size
    found = {"word": weights.get(f"{names.word}.weight", (config.vocab_size, width))}
    if names.positions is not None:
        found["position"] = weights.get(f"{names.positions}.weight", (config.max_position_embeddings, width))
    if names.types is not None and config.type_vocab_size:
        found["type"] = weights.get(f"{names.types}.weight", (config.type_vocab_size, width))
    return found


def _layer(
    weights: Weights, config: BertConfig, linears: dict[str, Linear], i: int, precision: str | None, threads: int
) -> Iterator[tuple[str, np.ndarray]]:
    family = family_of(config.model_type)
    names, prefix = family.layer, f"{family.layer_list}.{i}."

    def product(*paths: str, gated: bool = False) -> np.ndarray:
        several = [linears[path]._replace(path=prefix + path) for path in paths]
        return packed_linears(weights, several, precision, threads, gated=gated)

    yield "qkv", product(*names.qkv)
    yield "out", product(names.out)
    yield "up", product(*names.ups, gated=family.gated)
    yield "down", product(names.down)
    for path in layer_norms(family, first=i == 0):
        name = "attention_norm" if path == names.out_norm else "norm"
        yield from _norm(weights, config, name, prefix + path, config.hidden_size).items()


def _norm(weights: Weights, config: BertConfig, name: str, path: str, width: int) -> Arrays:
    family = family_of(config.model_type)
    found = {f"{name}.weight": weights.get(f"{path}.weight", (width,)).copy()}
    if not family.rms and config.has(family.norm_bias):
        found[f"{name}.bias"] = weights.get(f"{path}.bias", (width,)).copy()
    return found


def pack_head(weights: Weights, config: BertConfig, head: HeadParts, threads: int) -> Arrays:
    """The arrays of a head: head.dense, its norm's and head.out, those that it has."""
    found = Arrays()
    if head.dense is not None:
        found["head.dense"] = packed_linears(weights, [head.dense], None, threads)
    if head.norm is not None:
        found |= _norm(weights, config, "head.norm", head.norm, head.out.columns)
    found["head.out"] = packed_linears(weights, [head.out], None, threads)
    return found
