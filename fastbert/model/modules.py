"""The modules of an encoder: they hold parameters under transformers' names, which the family says.

The computation is in model/layer.py and model/encoder.py. These containers are not called, so a hook on one of them
does not fire (one on a layer, a linear layer or norm does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.families import Family


class Part(nn.Module):
    """A module that only holds others."""


def place(root: nn.Module, path: str, part: nn.Module) -> None:
    """Makes `part` the module at a path whose containers are there."""
    owner, _, name = path.rpartition(".")
    root.get_submodule(owner).add_module(name, part)


class Embeddings(Part):
    """The tables, their norm and dropout."""

    def __init__(self, config: BertConfig, family: Family) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word_embeddings = table(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.padding_idx = config.pad_token_id
        padding_idx = self.padding_idx if family.counts_tokens else None
        self.position_embeddings = table(config.max_position_embeddings, width, padding_idx=padding_idx)
        if family.has_token_types:
            self.token_type_embeddings = table(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


def table(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """An uninitialised embedding; the model fills it. (nn.Embedding would fill it: on the meta device, torch
    imports its compiler for that, which takes a second.)"""
    return nn.Embedding(rows, width, padding_idx=padding_idx, _weight=torch.empty(rows, width))


class EncoderLayer(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, config: BertConfig, family: Family) -> None:
        super().__init__()
        names, E, F = family.layer, config.hidden_size, config.intermediate_size
        for path in names.containers:
            place(self, path, Part())
        attention: Any = self.get_submodule(names.attention)
        attention.num_attention_heads, attention.attention_head_size = config.num_attention_heads, config.head_dim
        for path in (names.query, names.key, names.value, names.out):
            place(self, path, nn.Linear(E, E))
        place(self, names.out_norm, nn.LayerNorm(E, eps=config.layer_norm_eps))
        place(self, names.up, nn.Linear(E, F))
        place(self, names.down, nn.Linear(F, E))
        place(self, names.norm, nn.LayerNorm(E, eps=config.layer_norm_eps))
        place(self, names.attention_dropout, nn.Dropout(config.attention_probs_dropout_prob))
        for dropout in (names.out_dropout, names.dropout):
            if dropout is not None:
                place(self, dropout, nn.Dropout(config.hidden_dropout_prob))
        self.gradient_checkpointing = False
        self.recompute_activations = False

    def forward(self, x: Tensor, run: Callable[[Tensor], Any]) -> Any:
        """run(x), the computation of this layer; `encode` calls the module only if it has hooks."""
        return run(x)


class Layers(Part):
    def __init__(self, config: BertConfig, family: Family) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config, family) for _ in range(config.num_hidden_layers))


class Pooler(Part):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
