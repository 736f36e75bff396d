"""Whether a BertModel is made of transformers' own parts: those that a packed call passes over, or runs otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from fastbert.model.encoder import is_plain_table
from fastbert.reads import Reads

BERT = "transformers.models.bert.modeling_bert"


class Fit:
    """The parts of a BertModel as they were when they were all transformers' own."""

    def __init__(self, bert: nn.Module, reads: Reads) -> None:
        self.reads = reads
        self.classes = tuple({type(m): None for m in bert.modules() if type(m).__module__ == BERT})
        self.rest = self._beside_reads(bert)

    def holds(self, bert: nn.Module) -> bool:
        return self.reads.hold() and self.rest == self._beside_reads(bert)

    def _beside_reads(self, bert: nn.Module) -> tuple:
        """What `foreign_part` rests on that Reads do not watch."""
        norm, layers = bert.embeddings.LayerNorm, bert.encoder.layer._modules.values()
        forwards = [kind.forward for kind in self.classes]
        code = [forward.__code__ for forward in forwards]
        return bert.config.hidden_act, bert.pooler, norm.weight is None, norm.bias is None, *layers, *forwards, *code


def attention_reason(config: Any) -> str | None:
    """Why attention is not to be computed here: somebody has put one of their own in its place."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None) or "eager"
    eager = sys.modules[BERT].eager_attention_forward
    used = [ALL_ATTENTION_FUNCTIONS.get(name, eager), ALL_MASK_ATTENTION_FUNCTIONS.get(name)]
    if name not in ("eager", *ALL_ATTENTION_FUNCTIONS) or not all(_is_theirs(f) for f in used if f is not None):
        return f"its attention, {name!r}, is not transformers'"
    return None


def _is_theirs(function: Any) -> bool:
    """Whether it is transformers' own code, not somebody's in its place, whatever name that goes by."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(sys.modules["transformers"].__path__[0])


def foreign_part(bert: nn.Module, reads: Reads) -> str | None:
    """Which part that fastbert would pass over is not what transformers puts there, or has a hook."""
    try:
        return _first_foreign(bert, reads)
    except KeyError as gone:
        return f"{gone.args[0]} is not where transformers puts it"


def _first_foreign(bert: nn.Module, reads: Reads) -> str | None:
    for name, module, kind in _passed_over(bert, reads):
        own = type(module)
        if own is not kind and (kind is not None or own.__module__ != BERT):
            return f"{name} is a {own.__module__}.{own.__name__}"
        if kind is None and not _is_theirs(own.forward):
            return f"{own.__name__}.forward has been replaced"
        reads.is_plain(module, own)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers leaves its output recorders on the layers once it has used them; they are idle here.
        hooks = [h for h in hooks if getattr(h, "__module__", "") != "transformers.utils.output_capturing"]
        if hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
            return f"{name} has a hook"
    embeddings = bert.embeddings
    if embeddings.LayerNorm.weight is None or embeddings.LayerNorm.bias is None:
        return "embeddings.LayerNorm has no weight or no bias"
    for name in ("position_embeddings", "token_type_embeddings"):
        table = embeddings._modules[name]
        reads.attributes(table, "max_norm", "sparse", "scale_grad_by_freq")
        if not is_plain_table(table):
            return f"embeddings.{name} has max_norm, sparse or scale_grad_by_freq"
    for i, layer in enumerate(bert.encoder.layer):
        scaling, width = reads.attributes(layer.attention.self, "scaling", "attention_head_size")
        if type(scaling) is not float or scaling != width**-0.5:  # a tensor could be written to
            return f"encoder.layer.{i}.attention.self.scaling is {scaling}"
    return None


def _passed_over(bert: nn.Module, reads: Reads) -> Iterator[tuple[str, nn.Module, type | None]]:
    """The modules whose own forward never runs in a packed call: name, module, type (None: one of transformers')."""
    activation = _activation(bert.config.hidden_act)
    embeddings, encoder = reads.children(bert, "embeddings", "encoder")
    yield "embeddings", embeddings, None
    tables = "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"
    kinds = nn.Embedding, nn.Embedding, nn.LayerNorm, nn.Dropout
    for name, module, kind in zip(tables, reads.children(embeddings, *tables), kinds, strict=True):
        yield f"embeddings.{name}", module, kind
    yield "encoder", encoder, None
    (layers,) = reads.children(encoder, "layer")
    for i, layer in enumerate(layers):
        name = f"encoder.layer.{i}"
        yield name, layer, None  # before its parts are asked for: it may have others
        attention, intermediate, output = reads.children(layer, "attention", "intermediate", "output")
        yield f"{name}.attention", attention, None
        self_attention, attention_output = reads.children(attention, "self", "output")
        yield f"{name}.attention.self", self_attention, None
        yield f"{name}.attention.self.dropout", *reads.children(self_attention, "dropout"), nn.Dropout
        yield f"{name}.attention.output", attention_output, None
        yield f"{name}.attention.output.dropout", *reads.children(attention_output, "dropout"), nn.Dropout
        yield f"{name}.intermediate", intermediate, None
        (function,) = reads.children(intermediate, "intermediate_act_fn")
        yield f"{name}.intermediate.intermediate_act_fn", function, activation
        yield f"{name}.output", output, None
        yield f"{name}.output.dropout", *reads.children(output, "dropout"), nn.Dropout
    if bert.pooler is not None:
        yield "pooler", bert.pooler, None
        yield "pooler.activation", *reads.children(bert.pooler, "activation"), nn.Tanh


@cache
def _activation(name: str) -> type[nn.Module]:
    """The class that transformers has for an activation."""
    from transformers.activations import ACT2FN

    return type(ACT2FN[name])
