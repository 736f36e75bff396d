"""The BERT encoder, read top to bottom: plain functions over modules that carry transformers' names.

`encode` runs on any module tree with those names, fastbert's own or a live transformers model; that is
how `fastbert.accelerate` works. A linear layer, norm or table that somebody wrapped (LoRA, a hook, a
quantised layer) is called as it is; a plain one goes through fastbert.ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.config import BertConfig
from fastbert.model.fuse import forget_qkv, qkv_parameters, replace_qkv
from fastbert.model.inputs import Inputs
from fastbert.packing import pack, unpack
from fastbert.precision import QUANTIZED, check_precision
from fastbert.reads import Reads, has_global_hook, is_hooked, is_plain
from fastbert.reference import ACTIVATIONS, attention_to_keys, padded_attention

# Queries, keys and values (T, 3, H, D) -> context (T, H, D).
Attend = Callable[[Tensor], Tensor]


class Products(NamedTuple):
    """What the products of all layers have in common: the activation between the last two, and `precision`."""

    activation: str
    precision: str | None = None


@dataclass
class Encoded:
    """The states of an encoder, packed (T, E); by request the states around each layer and the probabilities.

    What is returned by request is part of the graph: the next layer reads the very tensors that the caller gets.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 in the shape of the caller's tokens
    attentions: tuple[Tensor, ...] | None = None  # L of (B, H, S, S), zero where either token is a pad


def encode(
    bert: nn.Module,
    inputs: Inputs,
    *,
    activation: str,
    precision: str | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> Encoded:
    """Runs embeddings and layers of `bert` (anything with .embeddings and .encoder.layer) over the real tokens.

    `precision` is that of ops.linear, for the four products of a layer; all else runs in the weights' dtype.
    """
    _check_products(bert, inputs, precision)
    batch, products = inputs.batch, Products(activation, precision)
    states: list[Tensor] = []
    if output_attentions:
        x, attentions = _encode_padded(bert, inputs, products, states if output_hidden_states else None)
        x = inputs.take(states[-1]) if output_hidden_states else pack(x.unflatten(0, inputs.padded_shape), batch)
        return Encoded(x, tuple(states) or None, attentions)

    x = embed(bert.embeddings, inputs.packed())
    layers = bert.encoder.layer
    by_layer = output_hidden_states or inputs.key_mask is not None or has_global_hook()
    whole = not (by_layer or _needs_grad(x, bert) or ops.pointer_reason())
    weights = _all_weights(layers, products) if whole else None
    if weights is not None:
        return Encoded(ops.encoder(x, weights, batch.cu_seqlens, batch.max_seqlen, checked=True))
    x = _returned(x, inputs, states) if output_hidden_states else x
    for layer in layers:
        x = _run_layer(layer, x, products, _packed_attend(layer, inputs))
        x = _returned(x, inputs, states) if output_hidden_states else x
    return Encoded(x, tuple(states) or None)


def _returned(x: Tensor, inputs: Inputs, states: list[Tensor]) -> Tensor:
    """Appends packed states to those that the caller gets, in the shape of the caller's tokens.

    Returns what the next layer takes: where there is a gradient, the caller's tensor packed again, so that the
    gradient passes through it.
    """
    states.append(inputs.give_back(x))
    return inputs.take(states[-1]) if x.requires_grad else x


def encode_first_column(bert: nn.Module, inputs: Inputs, *, activation: str, precision: str | None = None) -> Tensor:
    """The last state of column 0 of each row, (B, E), also where that column is a pad, as transformers has it.

    A pad asks but does not answer, which packed attention cannot express: the padded path does.
    """
    x, _ = _encode_padded(bert, inputs, Products(activation, precision), queries=False)
    return x.unflatten(0, inputs.padded_shape)[:, 0]


def _encode_padded(
    bert: nn.Module,
    inputs: Inputs,
    products: Products,
    states: list[Tensor] | None = None,
    queries: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Every column through every layer, with explicit probabilities: the last states (B * S, E), and L of (B, H, S, S).

    `states` is filled with those around each layer, in the shape of the caller's tokens. With `queries` the
    probabilities of pads are zero, which makes their states meaningless; without, pads attend to the real tokens.
    """
    keys, attentions = inputs.keys(), []
    computed = inputs.batch.mask() if queries else None

    def attend(layer: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor]:
        dropout_p = _active_dropout(layer.attention.self.dropout)
        qkv = qkv.unflatten(0, inputs.padded_shape)
        context, probs = padded_attention(qkv, keys, queries=computed, dropout_p=dropout_p)
        return context.flatten(0, 1), probs

    def returned(x: Tensor) -> Tensor:
        if states is None:
            return x
        packed = _returned(pack(x.unflatten(0, inputs.padded_shape), inputs.batch), inputs, states)
        return inputs.pad(packed).flatten(0, 1)

    x = returned(embed(bert.embeddings, inputs.flat()))
    for layer in bert.encoder.layer:
        x, probs = _run_layer(layer, x, products, partial(attend, layer))
        x = returned(x)
        attentions.append(probs)
    return x, tuple(attentions)


def _packed_attend(layer: nn.Module, inputs: Inputs) -> Attend:
    if inputs.key_mask is not None:
        return partial(_attend_to_keys, inputs=inputs, dropout_p=_active_dropout(layer.attention.self.dropout))
    return partial(
        ops.attention,
        cu_seqlens=inputs.batch.cu_seqlens,
        max_seqlen=inputs.batch.max_seqlen,
        dropout_p=_active_dropout(layer.attention.self.dropout),
        checked=True,
    )


def _attend_to_keys(qkv: Tensor, *, inputs: Inputs, dropout_p: float) -> Tensor:
    """Attention of all packed tokens to those of them that are keys: (T, 3, H, D) -> (T, H, D)."""
    context = attention_to_keys(unpack(qkv, inputs.batch), inputs.keys(), dropout_p=dropout_p)
    return pack(context, inputs.batch)


def _run_layer(layer: nn.Module, x: Tensor, products: Products, attend: Attend):
    """One layer; one of ours with hooks, as FSDP hangs on it, is called as the module it is."""
    if isinstance(layer, BertLayer):
        return layer(x, products, attend) if is_hooked(layer) else _recomputed_layer(layer, x, products, attend)
    inner = sharded(layer)
    if inner is None:
        return _recomputed_layer(layer, x, products, attend)
    return _call_through(layer, inner, partial(_recomputed_layer, inner, products=products, attend=attend), x)


def sharded(layer: nn.Module) -> nn.Module | None:
    """The layer that FSDP has wrapped (version 1) or hooked (version 2); None where it is a layer of its own."""
    kind = type(layer)
    if not hasattr(kind, "unshard") and kind.__name__ != "FullyShardedDataParallel":
        return None
    return layer._modules.get("_fsdp_wrapped_module", layer)


def _call_through(layer: nn.Module, inner: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Calls `layer`, whose hooks gather the parameters of `inner`, with `run` in place of the forward of `inner`."""
    inner.forward = run
    try:
        return layer(x)
    finally:
        del inner.forward


def _recomputed_layer(layer: nn.Module, x: Tensor, products: Products, attend: Attend):
    """One layer, recomputed in the backward where gradient checkpointing is on."""
    run = partial(layer_forward, layer, products=products, attend=attend)
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(run, x)
    return run(x)


def layer_forward(layer: nn.Module, x: Tensor, *, products: Products, attend: Attend):
    """Attention and feed-forward of one BertLayer over (T, E); post-norm, as in Devlin et al., 2018.

    Returns what `attend` returns beside the context, too, when it returns a pair.
    """
    attention, precision = layer.attention, products.precision
    attended = attend(project_qkv(attention.self, x, precision))
    context, probs = attended if isinstance(attended, tuple) else (attended, None)
    y = project(attention.output.dense, context.flatten(1), precision=precision)
    x = add_norm(attention.output, y, x)
    x = add_norm(layer.output, feed_forward(layer, x, products), x)
    return x if probs is None else (x, probs)


def embed(embeddings: nn.Module, tokens: Inputs) -> Tensor:
    """The bottom of the model over flat tokens, (T,) -> (T, E); given embeddings serve as a table of their own."""
    word, norm = embeddings.word_embeddings, embeddings.LayerNorm
    tables = embeddings.token_type_embeddings, embeddings.position_embeddings
    dropout_p = _active_dropout(embeddings.dropout)
    if not all(map(is_plain_table, tables)) or not is_plain(norm, nn.LayerNorm) or norm.bias is None:
        x = word(tokens.ids) if tokens.embeds is None else tokens.embeds
        x = x + tables[0](tokens.token_type_ids) + tables[1](tokens.position_ids)
        return F.dropout(norm(x), dropout_p)
    if tokens.embeds is None and is_plain_table(word):
        ids, table, padding_idx = tokens.ids, word.weight, word.padding_idx
    else:
        table = word(tokens.ids) if tokens.embeds is None else tokens.embeds
        ids, padding_idx = torch.arange(table.shape[0], device=table.device), None
    return ops.embed_layer_norm(
        ids,
        tokens.token_type_ids,
        tokens.position_ids,
        table,
        *(table.weight for table in tables),
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=dropout_p,
        padding_idx=padding_idx,
    )


def is_plain_table(table: nn.Module) -> bool:
    """Whether rows of its weight, and their plain gradient, are all there is to an embedding."""
    if not is_plain(table, nn.Embedding):
        return False
    return table.max_norm is None and not table.sparse and not table.scale_grad_by_freq


def project(linear: nn.Module, x: Tensor, activation: str | None = None, precision: str | None = None) -> Tensor:
    """A linear layer, with its activation: through ops when it is a plain nn.Linear, else as the module it is."""
    if is_plain(linear, nn.Linear):
        return ops.linear(x, linear.weight, linear.bias, activation=activation, precision=precision)
    y = linear(x)
    return y if activation is None else ACTIVATIONS[activation](y)


def feed_forward(layer: nn.Module, x: Tensor, products: Products) -> Tensor:
    """The two products of a layer's second half; the activation is recomputed in the backward where the layer asks."""
    up, down = layer.intermediate.dense, layer.output.dense
    if is_plain(up, nn.Linear) and is_plain(down, nn.Linear):
        recompute = getattr(layer, "recompute_activations", False)
        parameters = (up.weight, up.bias, down.weight, down.bias)
        return ops.feed_forward(x, *parameters, **products._asdict(), recompute=recompute)
    y = project(up, x, products.activation, products.precision)
    return project(down, y, precision=products.precision)


def project_qkv(attention: nn.Module, x: Tensor, precision: str | None = None) -> Tensor:
    """Queries, keys and values of every token: (T, E) -> (T, 3, H, D)."""
    projections = (attention.query, attention.key, attention.value)
    together = qkv_parameters(attention) if fusable(projections) else None
    if together is not None:
        qkv = ops.linear(x, *together, precision=precision)
    else:
        qkv = torch.cat([project(p, x, precision=precision) for p in projections], dim=1)
    # As transformers counts heads: by their width, so that a model with fewer of them runs.
    return qkv.unflatten(1, (3, -1, attention.attention_head_size))


def add_norm(output: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """dropout, residual and LayerNorm of a BertSelfOutput or BertOutput."""
    norm, dropout_p = output.LayerNorm, _active_dropout(output.dropout)
    if is_plain(norm, nn.LayerNorm) and norm.bias is not None:
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p)
    return norm(F.dropout(x, dropout_p) + residual)


def fusable(projections: Sequence[nn.Module]) -> bool:
    """Whether these can be one product: plain linear layers, all with a bias or all without."""
    if not all(is_plain(p, nn.Linear) for p in projections):
        return False
    return len({p._parameters["bias"] is None for p in projections}) == 1


def _active_dropout(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _needs_grad(x: Tensor, bert: nn.Module) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in bert.encoder.parameters()))


def _check_products(bert: nn.Module, inputs: Inputs, precision: str | None) -> None:
    """Says what does not go with `precision` before anything runs: the model may have moved since it was chosen."""
    if precision is None:
        return
    table = bert.embeddings.token_type_embeddings.weight
    check_precision(precision, table.dtype, table.device)
    if precision in QUANTIZED and torch.is_grad_enabled():
        tensors = [*bert.embeddings.parameters(), *bert.encoder.parameters()]
        tensors += [] if inputs.embeds is None else [inputs.embeds]
        if any(t.requires_grad for t in tensors):
            raise ValueError(
                f"quantize is {precision!r}, which has no gradient, and one is wanted: run the model under "
                "torch.inference_mode() or torch.no_grad(), or train without quantize"
            )


class _Known:
    """What was found of layers, kept in their own __dict__, so that it goes with them, and without referring back to
    them, so that they go when nobody else does. A copy of them, pickled or not, has nothing."""

    def __init__(self, layers: nn.ModuleList, products: Products, reads: Reads, weights: ops.WatchedLayers) -> None:
        self.owner = ref(layers)  # DataParallel copies a __dict__ as it is
        self.each = list(layers._modules.values())  # not in reads, which would keep their owner alive
        self.products, self.reads, self.weights = products, reads, weights

    def holds(self, layers: nn.ModuleList, products: Products) -> bool:
        now = layers._modules
        same = self.owner() is layers and self.products == products and len(self.each) == len(now)
        return same and all(map(is_, self.each, now.values())) and self.reads.hold()

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> None:
        return None


_KNOWN = "_fastbert_known"


def forget(module: nn.Module) -> None:
    """Takes from a module what running it has left there: what is known of layers, one storage for q, k and v."""
    vars(module).pop(_KNOWN, None)
    forget_qkv(module)


def _all_weights(layers: nn.ModuleList, products: Products) -> list[ops.LayerWeights] | None:
    """The weights of every layer for ops.encoder; None where one of them has to be run by itself."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        known = vars(layers).get(_KNOWN)
        if known is not None and known.holds(layers, products):
            return known.weights
        vars(layers).pop(_KNOWN, None)  # and with it what is held of modules that may have gone
    reads, found = Reads(), []
    for layer in layers._modules.values():
        weights = _layer_weights(layer, products, reads)
        if weights is None:
            return None
        found.append(weights)
    if not compiling and reads.settle():
        found = ops.WatchedLayers(found)
        vars(layers)[_KNOWN] = _Known(layers, products, reads, found)
    return found


def _layer_weights(layer: nn.Module, products: Products, reads: Reads) -> ops.LayerWeights | None:
    """One layer's weights; None where it has a wrapped part, is to be called as a module, or drops anything."""
    if sharded(layer) is not None or (isinstance(layer, BertLayer) and not reads.is_plain(layer, type(layer))):
        return None
    attention, intermediate, output = reads.children(layer, "attention", "intermediate", "output")
    self_attention, attention_output = reads.children(attention, "self", "output")
    *projections, dropout = reads.children(self_attention, "query", "key", "value", "dropout")
    out, attention_norm, attention_dropout = reads.children(attention_output, "dense", "LayerNorm", "dropout")
    (up,) = reads.children(intermediate, "dense")
    down, norm, output_dropout = reads.children(output, "dense", "LayerNorm", "dropout")
    linears, norms = (*projections, out, up, down), (attention_norm, norm)
    if not all(reads.is_plain(m, nn.Linear) for m in linears) or not all(
        reads.is_plain(m, nn.LayerNorm) for m in norms
    ):
        return None
    for drop in (dropout, attention_dropout, output_dropout):
        if reads.attributes(drop, "training")[0] and reads.attributes(drop, "p")[0]:
            return None
    (eps,), (other_eps,) = (reads.attributes(m, "eps") for m in norms)
    *qkv, out, up, down, attention_norm, norm = (reads.parameters(m) for m in (*linears, *norms))
    qkv_weights = [weight for weight, _ in qkv]
    if eps != other_eps or attention_norm[1] is None or norm[1] is None or len({bias is None for _, bias in qkv}) > 1:
        return None
    together = qkv_parameters(self_attention)
    width = reads.attributes(self_attention, "attention_head_size")[0]
    square = out[0].shape[0] == out[0].shape[1]  # not where heads were cut out
    if together is None or not square or {len(p) for p in qkv_weights} != {len(together[0]) // 3}:
        return None
    return ops.LayerWeights(
        *together,
        *out,
        *attention_norm,
        *up,
        *down,
        *norm,
        num_heads=len(qkv_weights[0]) // width,
        activation=products.activation,
        eps=eps,
        precision=products.precision,
    )


@torch.no_grad()
def release_weights(layer: nn.Module, activation: str, precision: str | None) -> None:
    """Lets the backend that runs this layer keep its own form of the weights alone, for inference: see ops.release.

    A layer that the backend does not run whole, one with a hook say, keeps its weights.
    """
    weights = _layer_weights(layer, Products(activation, precision), Reads())
    released = weights and ops.release(weights)
    if released is weights:
        return
    replace_qkv(layer.attention.self, released.qkv_weight)
    layer.attention.output.dense.weight = released.attention_weight
    layer.intermediate.dense.weight = released.up_weight
    layer.output.dense.weight = released.down_weight


# The modules below hold parameters under transformers' names. Their work is in the functions above: these
# containers are not called, so a hook on one of them does not fire (one on a layer, a linear layer or norm does).


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = _table(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = _table(config.max_position_embeddings, width)
        self.token_type_embeddings = _table(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


def _table(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """An embedding without values: the model fills it. (To fill one on the meta device, as nn.Embedding
    does, torch imports its compiler, which takes a second.)"""
    return nn.Embedding(rows, width, padding_idx=padding_idx, _weight=torch.empty(rows, width))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.may_move_qkv = True  # into one storage; False where that of each belongs to somebody else
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)


class BertOutput(nn.Module):
    """A projection back to the hidden size with its norm: after attention and after the feed-forward."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)
        self.gradient_checkpointing = False
        self.recompute_activations = False

    def forward(self, x: Tensor, products: Products, attend: Attend):
        """What `encode` does with this layer; it comes this way where the layer has hooks."""
        return _recomputed_layer(self, x, products, attend)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
