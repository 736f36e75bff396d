"""Checks that a BertModel is made of known parts: those that a packed call bypasses, and those that it calls.

A call is packed only if every part is known to work per token and no hook or code of the user is inside the encoder:
tensors there are (T, E), not (B, S, E).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.model.layer import is_plain, sharded

BERT = "transformers.models.bert.modeling_bert"

# PEFT's adapter packages whose layers work per token; a test compares each with transformers. The others combine
# tokens or depend on the rows of a batch (adaption_prompt, lily, poly, xlora), or are untested.
ADAPTERS = (
    *("adalora", "adamss", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira"),
    *("hra", "ia3", "ln_tuning", "loha", "lokr", "lora", "miss", "oft", "osf", "peanut", "psoft", "pvera", "randlora"),
    *("road", "shira", "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera", "waveft"),
)
# Modules that define linear layers over quantised weights.
QUANTISED = (
    "torch.ao.nn.quantized.dynamic.modules.linear",
    "torch.ao.nn.quantized.modules.linear",
    "bitsandbytes.nn.modules",
    "hqq.core.quantize",
    "optimum.quanto.nn.qlinear",
)
# Modules of torch and PEFT whose classes may occur inside a known part.
_INNER = (
    *("torch.nn.modules.", "torch.nn.utils.parametrize"),
    *("peft.tuners.tuners_utils", "peft.tuners._buffer_dict", "peft.utils.other"),
)
# Modules of torch's tensor classes that behave like a tensor: sharded ones, and those without memory.
_TENSORS = ("torch.distributed.", "torch._subclasses.", "torch.nn.parameter")
# Modules of hooks that do not depend on the positions of tokens.
_HARMLESS = (
    "transformers.utils.output_capturing",  # recorders that are idle unless transformers' forward runs
    "torch.nn.utils.prune",  # these write the weight before the call
    "torch.nn.utils.weight_norm",
    "torch.nn.utils.spectral_norm",
)


def attention_reason(config: Any) -> str | None:
    """Why attention must not be computed by fastbert: transformers' function has been replaced; None if not."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None) or "eager"
    eager = sys.modules[BERT].eager_attention_forward
    used = ALL_ATTENTION_FUNCTIONS.get(name, eager), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if name not in ("eager", *ALL_ATTENTION_FUNCTIONS) or not _are_theirs(*used):
        return f"its attention, {name!r}, is not transformers'"
    return None


@lru_cache(maxsize=32)
def _are_theirs(*functions: Any) -> bool:
    return all(_is_theirs(f) for f in functions if f is not None)


def _is_theirs(function: Any) -> bool:
    """True if the function is transformers' own code, whatever its name."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_transformers_folder())


@cache
def _transformers_folder() -> str:
    """The folder of transformers, from one of its modules: the package itself may be imported more than once."""
    return f"{Path(str(sys.modules[BERT].__file__)).parents[2]}{os.sep}"


def foreign_part(bert: nn.Module) -> str | None:
    """The part of the encoder that is not known to work per token, or has a hook; None if there is none."""
    try:
        return _first_foreign(bert)
    except KeyError as gone:
        return f"{gone.args[0]} is not where transformers puts it"


def _first_foreign(bert: nn.Module) -> str | None:
    for name, module, kind in _passed_over(bert):
        own = type(module)
        if own is not kind and (kind is not None or not _is_bert_class(own)):
            return f"{name} is a {own.__module__}.{own.__name__}"
        if kind is None and not _is_theirs(own.forward):
            return f"{own.__name__}.forward has been replaced"
        if _is_hooked(module):
            return f"{name} has a hook"
        if reason := _foreign_weight(module):
            return f"{name}{reason}"
    embeddings = bert.embeddings
    for name in ("position_embeddings", "token_type_embeddings"):
        table = embeddings._modules[name]
        if any(_attributes(table, "max_norm", "sparse", "scale_grad_by_freq")):
            return f"embeddings.{name} has max_norm, sparse or scale_grad_by_freq"
    for name, part, kind in _called(bert):
        if reason := _unknown_part(part, kind):
            return f"{name}{'' if reason.startswith('.') else ' '}{reason}"
    if embeddings.LayerNorm.weight is None or embeddings.LayerNorm.bias is None:
        return "embeddings.LayerNorm has no weight or no bias"
    for i, layer in enumerate(bert.encoder.layer):
        attention = _inner(layer).attention.self
        scaling, width = _attributes(attention, "scaling", "attention_head_size")
        if type(scaling) is not float or scaling != width**-0.5:  # a tensor could be written to
            return f"encoder.layer.{i}.attention.self.scaling is {scaling}"
    return None


def _children(module: nn.Module, *names: str) -> tuple[Any, ...]:
    return tuple(module._modules[name] for name in names)


def _attributes(module: nn.Module, *names: str) -> tuple[Any, ...]:
    """An instance's own attributes."""
    return tuple(vars(module)[name] for name in names)


def _inner(layer: nn.Module) -> nn.Module:
    """The BertLayer, even if FSDP has wrapped it."""
    return sharded(layer) or layer


def _is_bert_class(kind: type) -> bool:
    """True for a class of transformers' BERT, or FSDP's subclass of one."""
    return kind.__module__ == BERT or (hasattr(kind, "unshard") and kind.__mro__[2].__module__ == BERT)


def _passed_over(bert: nn.Module) -> Iterator[tuple[Any, ...]]:
    """The modules whose forward never runs in a packed call: name, module, type (None: one of transformers')."""
    activation = _activation(bert.config.hidden_act)
    embeddings, encoder = _children(bert, "embeddings", "encoder")
    yield "embeddings", embeddings, None
    tables = "position_embeddings", "token_type_embeddings", "dropout"
    kinds = nn.Embedding, nn.Embedding, nn.Dropout
    for name, module, kind in zip(tables, _children(embeddings, *tables), kinds, strict=True):
        yield f"embeddings.{name}", module, kind
    yield "encoder", encoder, None
    (layers,) = _children(encoder, "layer")
    for i, layer in enumerate(layers):
        name, layer = f"encoder.layer.{i}", _inner(layer)
        yield name, layer, None  # before its parts are read: another class may have others
        attention, intermediate, output = _children(layer, "attention", "intermediate", "output")
        yield f"{name}.attention", attention, None
        self_attention, attention_output = _children(attention, "self", "output")
        yield f"{name}.attention.self", self_attention, None
        yield f"{name}.attention.self.dropout", *_children(self_attention, "dropout"), nn.Dropout
        yield f"{name}.attention.output", attention_output, None
        yield f"{name}.attention.output.dropout", *_children(attention_output, "dropout"), nn.Dropout
        yield f"{name}.intermediate", intermediate, None
        (function,) = _children(intermediate, "intermediate_act_fn")
        yield f"{name}.intermediate.intermediate_act_fn", function, activation
        yield f"{name}.output", output, None
        yield f"{name}.output.dropout", *_children(output, "dropout"), nn.Dropout
    if bert.pooler is not None:
        yield "pooler", bert.pooler, None
        yield "pooler.activation", *_children(bert.pooler, "activation"), nn.Tanh


def _called(bert: nn.Module) -> Iterator[tuple[Any, ...]]:
    """The modules whose weights a packed call reads or, if they are wrapped, that it calls with (T, E)."""
    yield "embeddings.word_embeddings", *_children(bert.embeddings, "word_embeddings"), nn.Embedding
    yield "embeddings.LayerNorm", *_children(bert.embeddings, "LayerNorm"), nn.LayerNorm
    for i, layer in enumerate(bert.encoder.layer):
        name, layer = f"encoder.layer.{i}", _inner(layer)
        for part in ("query", "key", "value"):
            yield f"{name}.attention.self.{part}", *_children(layer.attention.self, part), nn.Linear
        yield f"{name}.intermediate.dense", *_children(layer.intermediate, "dense"), nn.Linear
        for owner, output in (("attention.output", layer.attention.output), ("output", layer.output)):
            yield f"{name}.{owner}.dense", *_children(output, "dense"), nn.Linear
            yield f"{name}.{owner}.LayerNorm", *_children(output, "LayerNorm"), nn.LayerNorm


def _unknown_part(part: nn.Module, kind: type) -> str | None:
    """Why a module in place of a `kind` is not supported; None if it works per token and has no hook."""
    own = type(part)
    if own is kind:
        hooked = not is_plain(part, own) and _is_hooked(part)
        return "has a hook" if hooked else _foreign_weight(part)
    if not _is_known(own, kind):
        return f"is a {own.__module__}.{own.__qualname__}"
    if _follows_the_sequence(part):
        return f"is a {own.__module__}.{own.__qualname__} whose adapter looks along the sequence"
    for name, inner in _modules_that_see_tokens(part):
        if not type(inner).__module__.startswith((*_INNER, *QUANTISED)) and not _is_known(type(inner), kind):
            return f"holds {name}, a {type(inner).__module__}.{type(inner).__qualname__}"
        if _is_hooked(inner):
            return f"has a hook on {name}" if name else "has a hook"
    return None


def _foreign_weight(part: nn.Module) -> str | None:
    """The parameter of a plain module whose tensor class may override torch's functions; None if there is none."""
    for name, parameter in part._parameters.items():
        own = type(parameter)
        if (
            parameter is not None
            and own not in (nn.Parameter, torch.Tensor)
            and not own.__module__.startswith(_TENSORS)
        ):
            return f".{name} is a {own.__module__}.{own.__qualname__}"
    return None


def _is_known(own: type, kind: type) -> bool:
    """True if a class in place of a `kind` works per token."""
    module = own.__module__
    if module == "torch.nn.utils.parametrize":  # the subclass that parametrize creates
        return own.__mro__[1] is kind
    if module.startswith(QUANTISED):
        return True
    if module.startswith("peft.tuners."):
        return module.split(".")[2] in ADAPTERS
    return module == "peft.utils.other"


def _follows_the_sequence(part: nn.Module) -> bool:
    """True if a variant of PEFT's LoRA is active that depends on token positions (activated LoRA)."""
    variants = getattr(part, "lora_variant", {})
    return any("ALora" in type(v).__name__ for v in getattr(variants, "values", list)())


def _modules_that_see_tokens(part: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and those below it, except parametrizations, which see only weights."""
    yield name, part
    for child_name, child in part._modules.items():
        if child is not None and child_name != "parametrizations":
            yield from _modules_that_see_tokens(child, f"{name}.{child_name}".strip("."))


def _is_hooked(module: nn.Module) -> bool:
    """True if a module has a hook or an instance `forward` that is not known to be harmless."""
    if "forward" in module.__dict__ and not _is_device_hook(module):
        return True
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *(module._backward_hooks or {}).values(),
        *(module._backward_pre_hooks or {}).values(),
    ]
    return not all(map(_is_harmless, hooks))


def _is_harmless(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    home = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", "")
    if home.startswith(("transformers.", "peft.")) and "make_inputs_require_grad" in name:
        return True
    owner = getattr(function, "__self__", None)
    if owner is not None and type(owner).__module__.startswith("torch.distributed.fsdp"):
        return True
    return home.startswith((*_HARMLESS, "torch.distributed.fsdp", "torch.distributed._composable"))


def _is_device_hook(module: nn.Module) -> bool:
    """True if its forward is accelerate's, which moves tensors to the weights' device, and the weights are there."""
    hook: Any = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    for one in hooks:
        if type(one).__module__ != "accelerate.hooks" or type(one).__name__ != "AlignDevicesHook" or one.offload:
            return False
        device = None if one.execution_device is None else torch.device(one.execution_device)
        if device is not None and any(
            p.device.type != device.type for p in module._parameters.values() if p is not None
        ):
            return False
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward


@cache
def _activation(name: str) -> type[nn.Module]:
    """transformers' class for an activation."""
    from transformers.activations import ACT2FN

    return type(ACT2FN[name])
