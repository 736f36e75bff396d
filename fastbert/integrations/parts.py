"""Checks that an encoder is made of known parts: those that a packed call bypasses, and those that it calls.

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

from fastbert.families import Family
from fastbert.families.layer_kinds import LayerKind, key_heads, layer_kinds
from fastbert.model.layer import is_plain, sharded

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


def attention_reason(config: Any, family: Family) -> str | None:
    """Why attention must not be computed by fastbert: transformers' function has been replaced; None if not."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None) or "eager"
    eager = getattr(sys.modules[family.module], "eager_attention_forward", None)
    if eager is None:  # the family's own code computes it, whatever the config says
        return None
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
    return f"{Path(str(sys.modules['transformers.modeling_outputs'].__file__)).parent}{os.sep}"


def foreign_part(model: nn.Module, family: Family) -> str | None:
    """The part of the encoder that is not known to work per token, or has a hook; None if there is none."""
    try:
        return _first_foreign(model, family)
    except KeyError as gone:
        return f"{gone.args[0]} is not where transformers puts it"


def _first_foreign(model: nn.Module, family: Family) -> str | None:
    for name, module, kind in _passed_over(model, family):
        own = type(module)
        if own is not kind and (kind is not None or not _is_class_of(own, family)):
            return f"{name} is a {own.__module__}.{own.__name__}"
        if kind is None and not _is_theirs(own.forward):
            return f"{own.__name__}.forward has been replaced"
        if _is_hooked(module):
            return f"{name} has a hook"
        if reason := _foreign_weight(module):
            return f"{name}{reason}"
    for path in _tables(model, family):
        if any(_attributes(_child(model, path), "max_norm", "sparse", "scale_grad_by_freq")):
            return f"{path} has max_norm, sparse or scale_grad_by_freq"
    if family.rms and not _is_theirs(_norm_class(family).forward):
        return f"{_norm_class(family).__name__}.forward has been replaced"
    for name, part, kind in _called(model, family):
        if reason := _unknown_part(part, kind):
            return f"{name}{'' if reason.startswith('.') else ' '}{reason}"
    norm = family.embeddings.norm
    if norm is not None and _child(model, norm).weight is None:
        return f"{norm} has no weight"
    if reason := _foreign_angles(model, family):
        return reason
    kinds = layer_kinds(model.config, family) if family.rotary is not None else None
    for i, layer in enumerate(family.layers(model)):
        attention = _inner(layer).get_submodule(family.layer.attention)
        width, place = vars(attention)[family.layer.head_size], f"{family.layer_list}.{i}.{family.layer.attention}"
        scaling = vars(attention).get("scaling", width**-0.5)  # some classes have none
        if type(scaling) is not float or scaling != width**-0.5:  # a tensor could be written to
            return f"{place}.scaling is {scaling}"
        if kinds is not None and (reason := _other_window(attention, _inner(layer), kinds[i])):
            return f"{place}{reason}"
    return None


def _foreign_angles(model: nn.Module, family: Family) -> str | None:
    """Why the rotary angles are not those of the config's settings, or the settings are not known; None if neither."""
    if family.rotary is None:
        return None
    try:
        kinds, _ = layer_kinds(model.config, family), key_heads(model.config)
    except ValueError as error:
        return str(error)
    module = _child(model, family.rotary)
    if len(kinds) != len(family.layers(model)):
        return f"{family.layer_list} has {len(family.layers(model))} layers; the config says {len(kinds)}"
    for kind in dict.fromkeys(kinds):
        name = f"{kind.name}_attention_scaling".lstrip("_")
        if vars(module).get(name) != 1.0:
            return f"{family.rotary}.{name} is {vars(module).get(name)}"
        if f"{kind.name}_inv_freq".lstrip("_") not in module._buffers:
            return f"{family.rotary} has no {kind.name}_inv_freq"
    return None


def _other_window(attention: nn.Module, layer: nn.Module, kind: LayerKind) -> str | None:
    """The first difference of an attention module from the config's kind of its layer; None if there is none."""
    own = vars(attention).get("sliding_window")
    if own != (None if kind.window is None else kind.window + 1):  # transformers has an exclusive bound
        return f".sliding_window is {own}"
    if kind.name and vars(layer).get("attention_type") != kind.name:
        return f": its layer's attention_type is {vars(layer).get('attention_type')!r}, the config's {kind.name!r}"
    return None


def difference(model: nn.Module, family: Family) -> str:
    """The first thing in which an encoder's modules differ from those of a family whose shape it has."""
    for place, module, known in _holders(model, family):
        own = set(module._modules)
        if missing := sorted(known - own):
            return f"{place} has no {missing[0]}"
        if more := sorted(own - known):
            return f"{place} has a {more[0]}, which {family.base} has not"
    return f"its class is not transformers' {family.base}"


def _holders(model: Any, family: Family) -> Iterator[tuple[str, nn.Module, set[str]]]:
    """The modules of an encoder that hold others, parents first: name, module, names of those within."""
    names = family.layer
    held: dict[str, set[str]] = {}
    for path in (*names.linears, *names.norms, *names.dropouts, *names.containers, names.activation):
        owner, _, name = path.rpartition(".")
        held.setdefault(owner, set()).add(name)
    above = family.embeddings
    inside = (above.word, *above.tables, *(path for path in (above.norm, above.dropout) if path is not None))
    known = {path.removeprefix(f"{above.owner}.") for path in inside}
    yield above.owner, model.get_submodule(above.owner), known
    for i, layer in enumerate(family.layers(model)):
        for path in sorted(held):
            yield f"{family.layer_list}.{i}.{path}".rstrip("."), layer.get_submodule(path), held[path]


def _child(module: nn.Module, path: str) -> Any:
    """The module at a path; a KeyError names the first part that is missing."""
    found: Any = module
    for name in path.split("."):
        found = found._modules[name]
    return found


def _attributes(module: nn.Module, *names: str) -> tuple[Any, ...]:
    """An instance's own attributes."""
    return tuple(vars(module)[name] for name in names)


def _inner(layer: nn.Module) -> nn.Module:
    """transformers' layer, even if FSDP has wrapped it."""
    return sharded(layer) or layer


def _is_class_of(kind: type, family: Family) -> bool:
    """True for one of transformers' classes of a family, or FSDP's subclass of one."""
    home = family.module
    return kind.__module__ == home or (hasattr(kind, "unshard") and kind.__mro__[2].__module__ == home)


def _tables(model: nn.Module, family: Family) -> list[str]:
    """The paths of the tables besides the words', which a config may leave out."""
    paths = family.embeddings.tables
    return [path for path in paths if family.table(model, path) is not None or path != family.embeddings.types]


def _passed_over(model: nn.Module, family: Family) -> Iterator[tuple[Any, ...]]:
    """The modules whose forward never runs in a packed call: name, module, type (None: one of transformers')."""
    names, activation = family.layer, _activation(getattr(model.config, family.activation))
    above, (owner, _, _) = family.embeddings, family.layer_list.rpartition(".")
    if above.owner:
        yield above.owner, _child(model, above.owner), None
    for path in _tables(model, family):
        yield path, _child(model, path), nn.Embedding
    if above.dropout is not None:
        yield above.dropout, _child(model, above.dropout), nn.Dropout
    if owner:
        yield owner, _child(model, owner), None
    if family.rotary is not None:
        yield family.rotary, _child(model, family.rotary), None
    if family.distance_table is not None:
        yield family.distance_table, _child(model, family.distance_table), nn.Embedding
    for i, layer in enumerate(_child(model, family.layer_list)):
        name, layer = f"{family.layer_list}.{i}", _inner(layer)
        yield name, layer, None  # before its parts are read: another class may have others
        for path in names.containers:
            yield f"{name}.{path}", _child(layer, path), None
        for path in names.dropouts:
            part = _child(layer, path)
            none = family.pre_norm and type(part) is nn.Identity  # in transformers' place of a rate of 0
            yield f"{name}.{path}", part, nn.Identity if none else nn.Dropout
        if not (i or family.first_norm):
            yield f"{name}.{names.out_norm}", _child(layer, names.out_norm), nn.Identity
        yield f"{name}.{names.activation}", _child(layer, names.activation), activation
    if getattr(model, "pooler", None) is not None:
        yield "pooler", model.pooler, None
        yield "pooler.activation", _child(model.pooler, "activation"), nn.Tanh


def _called(model: nn.Module, family: Family) -> Iterator[tuple[Any, ...]]:
    """The modules whose weights a packed call reads or, if they are wrapped, that it calls with (T, E)."""
    kind = _norm_class(family)
    yield family.embeddings.word, _child(model, family.embeddings.word), nn.Embedding
    for path in (family.embeddings.norm, family.final_norm):
        if path is not None:
            yield path, _child(model, path), kind
    if family.projection is not None and family.projection in model._modules:
        yield family.projection, _child(model, family.projection), nn.Linear
    for i, layer in enumerate(family.layers(model)):
        name, layer = f"{family.layer_list}.{i}", _inner(layer)
        for path in family.layer.linears:
            yield f"{name}.{path}", _child(layer, path), nn.Linear
        for path in family.layer.norms:
            if i or family.first_norm or path != family.layer.out_norm:
                yield f"{name}.{path}", _child(layer, path), kind


def _norm_class(family: Family) -> type[nn.Module]:
    """The class of a family's norms."""
    if not family.rms:
        return nn.LayerNorm
    found: Any = getattr(sys.modules[family.module], f"{family.prefix}RMSNorm")
    return found


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
