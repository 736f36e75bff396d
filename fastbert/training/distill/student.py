"""Students: models of the teacher's class with fewer or narrower layers, initialised from its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from fastbert.config import BertConfig, family_of
from fastbert.families import Family
from fastbert.families.layer_kinds import layer_kinds
from fastbert.model import BertPreTrainedModel
from fastbert.model.bert import EncoderModel
from fastbert.tokenizer.tokenizer import Tokenizer

_LAYER = re.compile(r"(?:^|(?<=\.))(layers?)\.(\d+)\.")


def spread(layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each student layer, ending at the last: TinyBERT's 2, 5, 8, 11 for 4 of 12 layers."""
    return [(i + 1) * teacher_layers // layers - 1 for i in range(layers)]


def make_student(
    teacher: BertPreTrainedModel,
    *,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    dropout: float | None = None,
) -> BertPreTrainedModel:
    """A model of the teacher's class, in float32, with its config except for the sizes; transformers also loads it.

    Layer i of the student has the weights of the teacher's layer `layers[i]`; embeddings, pooler and head are the
    teacher's. From tensors wider than the student's, the leading rows and columns are taken: the first units of each
    layer and, with heads of the teacher's width, the first heads. No weight is random.

    Args:
        layers: layers of the teacher, from 0; None: `num_layers` spread evenly, or all of them.
        hidden_size: at most the teacher's.
        intermediate_size: at most the teacher's; None: in the teacher's ratio to hidden_size.
        num_attention_heads: None: heads have the teacher's width.
        dropout: dropout of states and attention; None: the teacher's.

    Raises:
        ValueError: the teacher lacks a layer, a size exceeds the teacher's, or heads do not divide a width.
    """
    config = teacher.config
    count = config.num_hidden_layers
    if layers is not None and num_layers not in (None, len(layers)):
        raise ValueError(f"layers are {len(layers)} and num_layers is {num_layers}; one of them is enough")
    if num_layers is not None and not 1 <= num_layers <= count:
        raise ValueError(f"num_layers is {num_layers}; it must be 1 to {count}, which the teacher has")
    layers = list(layers) if layers is not None else spread(num_layers or count, count)
    check_layers("layers", layers, count)
    width = config.hidden_size if hidden_size is None else hidden_size
    if num_attention_heads is None and width % config.head_dim:
        raise ValueError(
            f"hidden_size is {width}, no multiple of the {config.head_dim} units that a head of the teacher has; "
            "num_attention_heads must say how many heads there are"
        )
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": intermediate_size or max(1, config.intermediate_size * width // config.hidden_size),
        "num_attention_heads": num_attention_heads or width // config.head_dim,
    }
    for name in ("hidden_size", "intermediate_size"):
        if sizes[name] > getattr(config, name):
            raise ValueError(f"{name} is {sizes[name]}; the teacher has {getattr(config, name)}, a student no more")
    if dropout is not None:
        sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    options = {"add_pooling_layer": teacher.pooler is not None} if isinstance(teacher, EncoderModel) else {}
    extra = _extra(config, layers, sizes["num_attention_heads"], dropout)
    own = replace(deepcopy(config), num_hidden_layers=len(layers), extra=extra, **sizes)
    student = type(teacher)(own, **options)
    _copy(teacher, student, layers)
    student.matmul_precision = teacher.matmul_precision
    return student.eval()


def _extra(config: BertConfig, layers: Sequence[int], heads: int, dropout: float | None) -> dict[str, Any]:
    """The other settings of a student: the kinds of the layers that it takes, grouped heads, dropout."""
    family, extra = family_of(config.model_type), deepcopy(config.extra)
    if not family.first_norm and 0 in list(layers)[1:]:
        raise ValueError(f"layers are {list(layers)}; layer 0 of the teacher has no norm and can be the first only")
    if family.has_windows:
        kinds = layer_kinds(config, family)
        extra["layer_types"] = [kinds[layer].name for layer in layers]
    group = config.num_attention_heads // config.key_heads
    if group > 1:
        if heads % group:
            raise ValueError(f"num_attention_heads is {heads}; each head of keys serves {group}, which must divide it")
        extra["num_key_value_heads"] = heads // group
    extra.pop("head_dim", None)
    if dropout is not None and "embedding_dropout" in extra:
        extra["embedding_dropout"] = dropout
    return extra


def check_layers(name: str, layers: Sequence[int], count: int) -> None:
    """Raises ValueError if `layers` is empty, or has one that a teacher of `count` layers lacks."""
    if not layers:
        raise ValueError(f"{name} is empty; there must be at least one")
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"{name}: {layer} is no layer of the teacher, which has 0 to {count - 1}")


def check_vocabularies(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises ValueError if a token does not have the same id in both vocabularies."""
    theirs, own = teacher.get_vocab(), student.get_vocab()
    if theirs == own:
        return
    by_number = (*sorted(theirs, key=theirs.__getitem__), *sorted(own, key=own.__getitem__))
    token = next(token for token in by_number if theirs.get(token) != own.get(token))
    sides = [f"{vocabulary[token]}" if token in vocabulary else "none" for vocabulary in (theirs, own)]
    raise ValueError(
        f"teacher and student have different vocabularies, of {len(theirs)} and {len(own)} tokens: {token!r} has "
        f"number {sides[0]} in the teacher's and {sides[1]} in the student's"
    )


@torch.no_grad()
def _copy(teacher: BertPreTrainedModel, student: BertPreTrainedModel, layers: Sequence[int]) -> None:
    theirs, family = dict(teacher.named_parameters()), family_of(teacher.config.model_type)
    for name, parameter in student.named_parameters():
        source = theirs[_LAYER.sub(lambda found: f"{found[1]}.{layers[int(found[2])]}.", name)]
        blocks = _blocks(name, family)
        to = parameter.unflatten(0, (blocks, -1))
        to.copy_(source.unflatten(0, (blocks, -1))[tuple(map(slice, to.shape))])


def _blocks(name: str, family: Family) -> int:
    """How many products a tensor holds, one after the other."""
    names = family.layer
    if names.key is None and f".{names.query}." in name:
        return 3
    return 2 if family.gated and names.gate is None and f".{names.up}." in name else 1
