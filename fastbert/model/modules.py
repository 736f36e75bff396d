"""The modules of an encoder: they hold parameters under transformers' names, which the family says.

The computation is in model/layer.py and model/encoder.py. These containers are not called, so a hook on one of them
does not fire (one on a layer, a linear layer or norm does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.config import BertConfig
from fastbert.families import Family
from fastbert.families.parts import layer_linears, layer_norms


class Part(nn.Module):
    """A module that only holds others."""


def place(root: nn.Module, path: str, part: nn.Module) -> None:
    """Makes `part` the module at a path whose containers are there."""
    owner, _, name = path.rpartition(".")
    root.get_submodule(owner).add_module(name, part)


class Embeddings(Part):
    """The owner of the tables, their norm and dropout, which `place_embeddings` adds."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.padding_idx = config.padding_idx


def place_embeddings(model: nn.Module, config: BertConfig, family: Family) -> None:
    """Makes the embeddings of an encoder."""
    names, width = family.embeddings, config.embedding_size or config.hidden_size
    if names.owner:
        place(model, names.owner, Embeddings(config))
    place(model, names.word, table(config.vocab_size, width, padding_idx=config.padding_idx))
    if names.positions is not None:
        padding_idx = config.padding_idx if family.counts_tokens else None
        place(model, names.positions, table(config.max_position_embeddings, width, padding_idx=padding_idx))
    if names.types is not None and config.type_vocab_size:
        place(model, names.types, table(config.type_vocab_size, width))
    if names.norm is not None:
        place(model, names.norm, norm(config, family, width))
    if names.dropout is not None:
        own = config.extra.get("embedding_dropout", config.hidden_dropout_prob)
        place(model, names.dropout, nn.Dropout(own))


class RMSNorm(nn.Module):
    """The weight of a norm without a mean (Zhang & Sennrich, 2019); a packed call does not call it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.add_layer_norm(x, None, self.weight, None, eps=self.variance_epsilon, rms=True)


def norm(config: BertConfig, family: Family, width: int) -> nn.Module:
    if family.rms:
        return RMSNorm(width, config.layer_norm_eps)
    return nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.has(family.norm_bias))


def table(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """An uninitialised embedding; the model fills it. (nn.Embedding would fill it: on the meta device, torch
    imports its compiler for that, which takes a second.)"""
    return nn.Embedding(rows, width, padding_idx=padding_idx, _weight=torch.empty(rows, width))


class EncoderLayer(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, config: BertConfig, family: Family, first: bool = False) -> None:
        super().__init__()
        names = family.layer
        for path in names.containers:
            place(self, path, Part())
        attention: Any = self.get_submodule(names.attention)
        attention.num_attention_heads = config.num_attention_heads
        setattr(attention, names.head_size, config.head_dim)
        if names.attention_dropout is None:
            attention.attention_dropout = config.attention_probs_dropout_prob
        for linear in layer_linears(config, family).values():
            place(self, linear.path, nn.Linear(linear.columns, linear.rows, bias=linear.bias))
        there = layer_norms(family, first=first)
        for path in names.norms:
            place(self, path, norm(config, family, config.hidden_size) if path in there else nn.Identity())
        for path in names.dropouts:
            of_attention = path == names.attention_dropout or (path == names.out_dropout and family.pre_norm)
            p = config.attention_probs_dropout_prob if of_attention else config.hidden_dropout_prob
            place(self, path, nn.Dropout(p))
        self.gradient_checkpointing = False
        self.recompute_activations = False

    def forward(self, x: Tensor, run: Callable[[Tensor], Any]) -> Any:
        """run(x), the computation of this layer; `encode` calls the module only if it has hooks."""
        return run(x)


def place_layers(model: nn.Module, config: BertConfig, family: Family) -> None:
    """Makes the layers of an encoder, and the norm after them if its family has one."""
    owner, _, _ = family.layer_list.rpartition(".")
    if owner:
        place(model, owner, Part())
    layers = nn.ModuleList(EncoderLayer(config, family, first=i == 0) for i in range(config.num_hidden_layers))
    place(model, family.layer_list, layers)
    if family.final_norm is not None:
        place(model, family.final_norm, norm(config, family, config.hidden_size))


class Pooler(Part):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
