"""One transformer layer and the embeddings below it, over the parts of a module tree.

The tree is fastbert's own or a live transformers model; its family says where it keeps the parts. A part is a linear
layer, norm or table. A plain part runs by fastbert.ops; a wrapped one (LoRA, a hook, a quantised layer) is called as a
module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.families import Family, LayerNames
from fastbert.model.inputs import Inputs
from fastbert.reference import ACTIVATIONS

# Queries, keys and values (T, 3, H, D) -> context (T, H, D), or a pair with the probabilities.
Attend = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
has_global_hook = nn.modules.module._has_any_global_hook
_REGISTERED = {nn.Linear: {"weight", "bias"}, nn.LayerNorm: {"weight", "bias"}, nn.Embedding: {"weight"}}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Products(NamedTuple):
    """The settings that all layers share: the activation between the last two products, and `precision`."""

    activation: str
    precision: str | None = None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling `module` does exactly what `kind` does: it is no subclass and has no hook or instance `forward`,
    and its weight and bias, if it has them, are registered as parameters."""
    if type(module) is not kind or is_hooked(module):
        return False
    return _REGISTERED.get(kind, set()) <= module._parameters.keys()


def is_hooked(module: nn.Module) -> bool:
    """True if calling `module` runs a hook, its own or one for all modules, or an instance `forward`."""
    return any(map(module.__dict__.get, (*_HOOKS, "forward"))) or has_global_hook()


class Projection:
    """A linear layer, or several over the same input with concatenated outputs: queries, keys, values."""

    __slots__ = ("modules", "weight")

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        plain = all(is_plain(m, nn.Linear) for m in modules)
        alike = plain and len({m.bias is None for m in modules}) == 1
        self.weight = ops.Weight([m.weight for m in modules], [m.bias for m in modules]) if alike else None

    def __call__(self, x: Tensor, activation: str | None = None, precision: str | None = None) -> Tensor:
        """(T, K) -> (T, N), with the activation."""
        if self.weight is not None:
            return ops.linear(x, self.weight, activation=activation, precision=precision)
        if len(self.modules) > 1:
            return torch.cat([Projection(m)(x, activation, precision) for m in self.modules], dim=1)
        y = self.modules[0](x)
        return y if activation is None else ACTIVATIONS[activation](y)


class Norm(NamedTuple):
    """Dropout, residual and LayerNorm after attention or feed-forward."""

    norm: nn.Module
    dropout: nn.Dropout | None

    @property
    def is_plain(self) -> bool:
        return is_plain(self.norm, nn.LayerNorm) and self.norm.bias is not None

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        norm, dropout_p = self.norm, active_dropout(self.dropout)
        if self.is_plain:
            return ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p)
        return norm(F.dropout(x, dropout_p) + residual)


class Layer:
    """Attention and feed-forward of one layer; post-norm, as in Devlin et al., 2018."""

    __slots__ = ("attention", "attention_dropout", "down", "module", "norm", "out", "out_norm", "qkv", "up")

    def __init__(self, module: nn.Module, names: LayerNames) -> None:
        self.module = module
        part: Callable[[str], Any] = module.get_submodule
        self.attention, self.attention_dropout = part(names.attention), part(names.attention_dropout)
        self.qkv = Projection(part(names.query), part(names.key), part(names.value))
        out_dropout = None if names.out_dropout is None else part(names.out_dropout)
        self.out, self.out_norm = Projection(part(names.out)), Norm(part(names.out_norm), out_dropout)
        self.up, self.down = Projection(part(names.up)), Projection(part(names.down))
        self.norm = Norm(part(names.norm), part(names.dropout))

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.up, self.down

    def __call__(self, x: Tensor, products: Products, attend: Attend) -> Tensor | tuple[Tensor, Tensor]:
        """(T, E) -> (T, E), with the probabilities if `attend` returns them."""
        attended = attend(self.project_qkv(x, products.precision))
        context, probs = attended if isinstance(attended, tuple) else (attended, None)
        y = self.out(context.flatten(1), precision=products.precision)
        x = self.out_norm(y, x)
        x = self.norm(self.feed_forward(x, products), x)
        return x if probs is None else (x, probs)

    def project_qkv(self, x: Tensor, precision: str | None = None) -> Tensor:
        """Queries, keys and values of every token: (T, E) -> (T, 3, H, D)."""
        # As in transformers, the number of heads follows from their width, so that a model with pruned heads runs.
        return self.qkv(x, precision=precision).unflatten(1, (3, -1, self.attention.attention_head_size))

    def feed_forward(self, x: Tensor, products: Products) -> Tensor:
        """The two products; the backward recomputes the activation if the layer has recompute_activations set."""
        if self.up.weight is not None and self.down.weight is not None:
            recompute = getattr(self.module, "recompute_activations", False)
            weights = self.up.weight, None, self.down.weight, None
            return ops.feed_forward(x, *weights, **products._asdict(), recompute=recompute)
        return self.down(self.up(x, *products), precision=products.precision)

    @property
    def dropouts(self) -> list[nn.Dropout]:
        found = self.attention_dropout, self.out_norm.dropout, self.norm.dropout
        return [dropout for dropout in found if dropout is not None]

    def weights(self, products: Products) -> ops.LayerWeights | None:
        """This layer's weights for ops.encoder, without dropout; None if that op cannot run the layer."""
        (qkv, out, up, down), norms = (p.weight for p in self.projections), (self.out_norm, self.norm)
        if qkv is None or out is None or up is None or down is None or not all(norm.is_plain for norm in norms):
            return None
        rows = {len(w) for w in qkv.weights}
        eps = self.norm.norm.eps
        if len(rows) > 1 or eps != self.out_norm.norm.eps or out.shape[0] != out.shape[1]:  # heads were pruned
            return None
        pairs = ((norm.norm.weight, norm.norm.bias) for norm in norms)
        num_heads = rows.pop() // self.attention.attention_head_size
        return ops.LayerWeights(
            qkv, out, next(pairs), up, down, next(pairs), num_heads, products.activation, eps, products.precision
        )


class Embeddings:
    """The embedding layer: LayerNorm of the sum of a row of each table, and dropout.

    The tables are of words, positions and, in most families, token types. Where their width is not the layers', a
    projection follows.
    """

    __slots__ = ("dropout", "is_plain", "norm", "positions", "projection", "types", "word", "word_is_plain")

    def __init__(self, model: nn.Module, family: Family) -> None:
        module = model.embeddings
        self.word, self.norm, self.dropout = module.word_embeddings, module.LayerNorm, module.dropout
        self.positions = module.position_embeddings
        self.types = module.token_type_embeddings if family.has_token_types else None
        self.word_is_plain = is_plain_table(self.word)
        tables = [self.positions] if self.types is None else [self.types, self.positions]
        self.is_plain = all(map(is_plain_table, tables)) and Norm(self.norm, self.dropout).is_plain
        projection = None if family.projection is None else getattr(model, family.projection, None)
        self.projection = None if projection is None else Projection(projection)

    @property
    def all_plain(self) -> bool:
        return self.is_plain and self.word_is_plain and self.projection is None

    def tensors(self) -> tuple[tuple[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor], float]:
        """The tables of words, token types and positions, and the norm's weight, bias and eps, of plain embeddings."""
        tables = self.word.weight, None if self.types is None else self.types.weight, self.positions.weight
        return tables, (self.norm.weight, self.norm.bias), self.norm.eps

    def __call__(self, tokens: Inputs) -> Tensor:
        """Flat tokens (T,) -> (T, E); embeddings that are given serve as the word table."""
        x = self._embedded(tokens)
        return x if self.projection is None else self.projection(x)

    def _embedded(self, tokens: Inputs) -> Tensor:
        dropout_p = active_dropout(self.dropout)
        if not self.is_plain:
            x = self.word(tokens.ids) if tokens.embeds is None else tokens.embeds
            if self.types is not None:
                x = x + self.types(tokens.token_type_ids)
            return F.dropout(self.norm(x + self.positions(tokens.position_ids)), dropout_p)
        if tokens.ids is not None and self.word_is_plain:
            ids, table, padding_idx = tokens.ids, self.word.weight, self.word.padding_idx
        else:
            table = self.word(tokens.ids) if tokens.embeds is None else tokens.embeds
            ids, padding_idx = torch.arange(table.shape[0], device=table.device), None
        # Without token types, a row of zeros: a sum with it changes no bit.
        types = table.new_zeros(1, table.shape[1]) if self.types is None else self.types.weight
        tables = table, types, self.positions.weight
        return ops.embed_layer_norm(
            *(ids, tokens.token_type_ids, tokens.position_ids, *tables, self.norm.weight, self.norm.bias),
            eps=self.norm.eps,
            dropout_p=dropout_p,
            padding_idx=padding_idx,
        )


def is_plain_table(table: nn.Module) -> bool:
    """True if an embedding only gathers rows of its weight, with their dense, unscaled gradient."""
    if not is_plain(table, nn.Embedding):
        return False
    return table.max_norm is None and not table.sparse and not table.scale_grad_by_freq


def active_dropout(dropout: nn.Dropout | None) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


def sharded(layer: nn.Module) -> nn.Module | None:
    """The layer that FSDP has wrapped (version 1) or hooked (version 2); None without FSDP."""
    kind = type(layer)
    if not hasattr(kind, "unshard") and kind.__name__ != "FullyShardedDataParallel":
        return None
    return layer._modules.get("_fsdp_wrapped_module", layer)
