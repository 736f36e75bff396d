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
from fastbert.families import Family
from fastbert.model.inputs import Inputs
from fastbert.model.modules import RMSNorm
from fastbert.reference import ACTIVATIONS

# Queries, keys and values (T, H + 2G, D) -> context (T, H, D), or a pair with the probabilities.
Attend = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
has_global_hook = nn.modules.module._has_any_global_hook
_REGISTERED = {nn.Linear: {"weight", "bias"}, nn.LayerNorm: {"weight", "bias"}}
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
    return _REGISTERED.get(kind, {"weight"}) <= module._parameters.keys()


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

    def __call__(
        self, x: Tensor, activation: str | None = None, precision: str | None = None, gated: bool = False
    ) -> Tensor:
        """(T, K) -> (T, N), with the activation; gated, (T, N / 2): see ops.linear."""
        if self.weight is not None:
            return ops.linear(x, self.weight, activation=activation, precision=precision, gated=gated)
        if gated:
            return ops.gate(self(x, None, precision), str(activation))
        if len(self.modules) > 1:
            return torch.cat([Projection(m)(x, activation, precision) for m in self.modules], dim=1)
        y = self.modules[0](x)
        return y if activation is None else ACTIVATIONS[activation](y)


class Dropout(NamedTuple):
    """The attributes of a module that drops in training, and the one of them that is the probability."""

    attributes: dict[str, Any]
    name: str = "p"

    @classmethod
    def of(cls, module: nn.Module) -> Dropout | None:
        """Of a dropout module; None for another, as the identity in its place."""
        return cls(vars(module)) if isinstance(module, nn.Dropout) else None

    @property
    def active(self) -> float:
        """The probability; 0 outside training."""
        return self.attributes[self.name] if self.attributes["training"] else 0.0


class Norm(NamedTuple):
    """A norm, and the dropout before the addition that precedes it."""

    norm: nn.Module
    dropout: Dropout | None
    rms: bool = False

    @property
    def is_plain(self) -> bool:
        if not self.rms:
            return is_plain(self.norm, nn.LayerNorm)
        kind = type(self.norm)  # fastbert's, or transformers', which is checked with the other parts of a live model
        return (kind is RMSNorm or kind.__module__.startswith("transformers.models.")) and is_plain(self.norm, kind)

    @property
    def eps(self) -> float:
        norm: Any = self.norm
        return norm.variance_epsilon if self.rms else norm.eps

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, of a plain norm."""
        norm: Any = self.norm
        return norm.weight, None if self.rms else norm.bias

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The norm of dropout(x) + residual."""
        dropout_p = active_dropout(self.dropout)
        if self.is_plain:
            return ops.add_layer_norm(x, residual, *self.tensors(), eps=self.eps, dropout_p=dropout_p, rms=self.rms)
        x = F.dropout(x, dropout_p)
        return self.norm(x if residual is None else x + residual)

    def with_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of dropout(x) + residual, and the sum."""
        dropout_p = active_dropout(self.dropout)
        if self.is_plain:
            options: dict[str, Any] = {"eps": self.eps, "dropout_p": dropout_p, "rms": self.rms}
            return ops.add_layer_norm(x, residual, *self.tensors(), **options, return_sum=True)
        total = F.dropout(x, dropout_p) + residual
        return self.norm(total), total


class Seen(NamedTuple):
    """The positions and keys that attention in a layer sees: the table of ops.rotary, and the window."""

    table: Tensor | None = None
    window: int | None = None


ALL = Seen()  # all keys, without positions


class Layer:
    """Attention and feed-forward of one layer, norms after (Devlin et al., 2018) or before (Xiong et al., 2020)."""

    __slots__ = (
        *("attention", "attention_dropout", "down", "family", "inner_dropout", "module", "norm", "out", "out_norm"),
        *("qkv", "seen", "up"),
    )

    def __init__(self, module: nn.Module, family: Family, seen: Seen = ALL) -> None:
        self.module, self.family, self.seen = module, family, seen
        names, part = family.layer, module.get_submodule

        def dropout(name: str | None) -> Dropout | None:
            return None if name is None else Dropout.of(part(name))

        self.attention: Any = part(names.attention)
        self.attention_dropout = (
            dropout(names.attention_dropout)
            if names.attention_dropout is not None
            else Dropout(vars(self.attention), "attention_dropout")
        )
        self.qkv = Projection(*map(part, names.qkv))
        # Before attention, the first layer may have an identity.
        before = isinstance(part(names.out_norm), nn.Identity)
        self.out, out_dropout = Projection(part(names.out)), dropout(names.out_dropout)
        after_out = part(names.norm) if family.pre_norm else part(names.out_norm)
        self.out_norm = Norm(after_out, out_dropout, family.rms)
        self.up, self.down = Projection(*map(part, names.ups)), Projection(part(names.down))
        self.inner_dropout = dropout(names.inner_dropout)
        if not family.pre_norm:
            self.norm: Norm | None = Norm(part(names.norm), dropout(names.dropout))
        else:
            self.norm = None if before else Norm(part(names.out_norm), None, family.rms)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.up, self.down

    def __call__(
        self, x: Tensor, products: Products, attend: Attend, picked: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(T, E) -> (T, E), with the probabilities if `attend` returns them; or (P, E), of the tokens `picked`."""
        normed = self.norm(x, None) if self.family.pre_norm and self.norm is not None else x
        attended = attend(self.project_qkv(normed, products.precision))
        context, probs = attended if isinstance(attended, tuple) else (attended, None)
        if picked is not None:
            context, x = context.index_select(0, picked), x.index_select(0, picked)
        y = self.out(context.flatten(1), precision=products.precision)
        if self.family.pre_norm:
            normed, x = self.out_norm.with_sum(y, x)
            x = x + self.feed_forward(normed, products)
        else:
            x = self.out_norm(y, x)
            assert self.norm is not None
            x = self.norm(self.feed_forward(x, products), x)
        return x if probs is None else (x, probs)

    @property
    def head_size(self) -> int:
        return getattr(self.attention, self.family.layer.head_size)

    def project_qkv(self, x: Tensor, precision: str | None = None) -> Tensor:
        """Queries, keys and values of every token: (T, E) -> (T, H + 2G, D)."""
        # As in transformers, the number of heads follows from their width, so that a model with pruned heads runs.
        return self.qkv(x, precision=precision).unflatten(1, (-1, self.head_size))

    def relations(self, x: Tensor, precision: str | None = None) -> Tensor:
        """Queries, keys and values of the layer's input x (T, E), for as many heads each: (T, 3, H, D)."""
        qkv = self.project_qkv(self.norm(x, None) if self.family.pre_norm and self.norm is not None else x, precision)
        out: Any = self.out.modules[0]
        heads = out.in_features // self.head_size if self.family.rotary is not None else qkv.shape[1] // 3
        groups = (qkv.shape[1] - heads) // 2
        q, *rest = qkv.split((heads, groups, groups), dim=1)
        return torch.stack([q, *(x.repeat_interleave(heads // groups, dim=1) for x in rest)], dim=1)

    def heads(self, qkv: Tensor, positions: Tensor) -> Tensor:
        """The input of attention, (T, H + 2G, D) -> (T, 3, H, D); positions (T,)."""
        if self.seen.table is None:
            return qkv.unflatten(1, (3, -1))
        out: Any = self.out.modules[0]
        return ops.rotary(qkv.contiguous(), self.seen.table, positions, out.in_features // self.head_size)

    def feed_forward(self, x: Tensor, products: Products) -> Tensor:
        """The two products; the backward recomputes the activation if the layer has recompute_activations set."""
        drop, gated = active_dropout(self.inner_dropout), self.family.gated
        if self.up.weight is not None and self.down.weight is not None and not drop:
            recompute = getattr(self.module, "recompute_activations", False)
            weights = self.up.weight, None, self.down.weight, None
            return ops.feed_forward(x, *weights, **products._asdict(), recompute=recompute, gated=gated)
        inner = F.dropout(self.up(x, *products, gated=gated), drop)
        return self.down(inner, precision=products.precision)

    @property
    def dropouts(self) -> list[Dropout]:
        after = None if self.norm is None else self.norm.dropout
        found = self.attention_dropout, self.out_norm.dropout, self.inner_dropout, after
        return [dropout for dropout in found if dropout is not None]

    def weights(self, products: Products) -> ops.LayerWeights | None:
        """This layer's weights for ops.encoder, without dropout; None if that op cannot run the layer."""
        norms = [norm for norm in (self.out_norm, self.norm) if norm is not None]
        qkv, out, up, down = (p.weight for p in self.projections)
        if qkv is None or out is None or up is None or down is None or not all(norm.is_plain for norm in norms):
            return None
        heads, width = out.shape[1] // self.head_size, self.head_size
        key_heads = (qkv.shape[0] // width - heads) // 2
        fused = [len(w) for w in qkv.weights] in ([heads * width, *[key_heads * width] * 2], [qkv.shape[0]])
        if not fused or len({norm.eps for norm in norms}) > 1 or out.shape[0] != out.shape[1]:  # heads were pruned
            return None
        first, last = (self.norm, self.out_norm) if self.family.pre_norm else (self.out_norm, self.norm)
        assert last is not None
        return ops.LayerWeights(
            *(qkv, out, None if first is None else first.tensors(), up, down, last.tensors(), heads),
            *(products.activation, last.eps, products.precision, key_heads),
            *(self.family.gated, self.family.pre_norm, self.family.rms),
            *(self.seen.table, self.seen.window),
        )


class Embeddings:
    """The embedding layer: LayerNorm of the sum of a row of each table, and dropout.

    The tables are of words and, in most families, positions and token types; one family has the words' alone, without a
    norm. Where their width is not the layers', a projection follows.
    """

    __slots__ = ("dropout", "is_plain", "norm", "positions", "projection", "types", "word", "word_is_plain")

    def __init__(self, model: nn.Module, family: Family) -> None:
        names = family.embeddings
        self.word: Any = model.get_submodule(names.word)
        self.positions, self.types = (family.table(model, path) for path in (names.positions, names.types))
        self.norm = None if names.norm is None else Norm(model.get_submodule(names.norm), None)
        self.dropout = None if names.dropout is None else Dropout.of(model.get_submodule(names.dropout))
        self.word_is_plain = is_plain_table(self.word)
        tables = [table for table in (self.types, self.positions) if table is not None]
        self.is_plain = all(map(is_plain_table, tables)) and self.norm is not None and self.norm.is_plain
        projection = None if family.projection is None else getattr(model, family.projection, None)
        self.projection = None if projection is None else Projection(projection)

    @property
    def all_plain(self) -> bool:
        return self.is_plain and self.word_is_plain and self.projection is None

    def tensors(
        self,
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None], float]:
        """The tables of words, token types and positions, and the norm's weight, bias and eps, of plain embeddings."""
        assert self.norm is not None
        types, positions = (None if table is None else table.weight for table in (self.types, self.positions))
        return (self.word.weight, types, positions), self.norm.tensors(), self.norm.eps

    def __call__(self, tokens: Inputs) -> Tensor:
        """Flat tokens (T,) -> (T, E); embeddings that are given serve as the word table."""
        x = self._embedded(tokens)
        return x if self.projection is None else self.projection(x)

    def _embedded(self, tokens: Inputs) -> Tensor:
        dropout_p = active_dropout(self.dropout)
        if not self.is_plain or self.norm is None:
            x = self.word(tokens.ids) if tokens.embeds is None else tokens.embeds
            if self.types is not None:
                x = x + self.types(tokens.token_type_ids)
            if self.positions is not None:
                x = x + self.positions(tokens.position_ids)
            return F.dropout(x if self.norm is None else self.norm(x, None), dropout_p)
        if tokens.ids is not None and self.word_is_plain:
            ids, table, padding_idx = tokens.ids, self.word.weight, self.word.padding_idx
        else:
            table = self.word(tokens.ids) if tokens.embeds is None else tokens.embeds
            ids, padding_idx = torch.arange(table.shape[0], device=table.device), None
        # In place of a table that the family lacks, a row of zeros: a sum with it changes no bit.
        none = table.new_zeros(1, table.shape[1])
        types = none if self.types is None else self.types.weight
        positions, places = none, torch.zeros_like(tokens.position_ids)
        if self.positions is not None:
            positions, places = self.positions.weight, tokens.position_ids
        weight, bias = self.norm.tensors()
        return ops.embed_layer_norm(
            *(ids, tokens.token_type_ids, places, table, types, positions, weight),
            torch.zeros_like(weight) if bias is None else bias,
            eps=self.norm.eps,
            dropout_p=dropout_p,
            padding_idx=padding_idx,
        )


def is_plain_table(table: nn.Module) -> bool:
    """True if an embedding only gathers rows of its weight, with their dense, unscaled gradient."""
    if not is_plain(table, nn.Embedding):
        return False
    return table.max_norm is None and not table.sparse and not table.scale_grad_by_freq


def active_dropout(dropout: Dropout | None) -> float:
    return 0.0 if dropout is None else dropout.active


def sharded(layer: nn.Module) -> nn.Module | None:
    """The layer that FSDP has wrapped (version 1) or hooked (version 2); None without FSDP."""
    kind = type(layer)
    if not hasattr(kind, "unshard") and kind.__name__ != "FullyShardedDataParallel":
        return None
    return layer._modules.get("_fsdp_wrapped_module", layer)
