"""The attention of each layer, as a config says: its heads, rotary angles and window.

The config is transformers' or fastbert's; both keep the fields under transformers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastbert.families.family import Family

_ROPE_TYPES = ("default", "linear")
FULL, LOCAL = "full_attention", "sliding_attention"


class LayerKind(NamedTuple):
    """The attention of a layer. Its name, as transformers calls it, is "" where all layers are alike."""

    name: str
    theta: float  # the base of the rotary angles
    factor: float  # positions are divided by it
    window: int | None  # see ops.attention


def layer_kinds(config: Any, family: Family) -> list[LayerKind]:
    """The kind of each layer, of a family with rotary positions.

    Raises:
        ValueError: settings that fastbert does not know; the message names the field, its value and the limit.
    """
    count = _field(config, "num_hidden_layers")
    names = _layer_types(config, count) if family.has_windows else [""] * count
    kinds = {name: _kind(config, family, name) for name in dict.fromkeys(names)}
    return [kinds[name] for name in names]


def place_count(config: Any, family: Family) -> int:
    """The number of positions of a sequence: `max_position_embeddings`, or the `n_positions` of NomicBERT's older files
    if that is more: rotary angles do not depend on how many there are."""
    most, older = _field(config, "max_position_embeddings"), _field(config, "n_positions")
    return max(most, older) if family.rotary is not None and _is_count(older) else int(most)


def key_heads(config: Any) -> int:
    """Heads of keys and values; each serves as many heads of queries."""
    heads = _field(config, "num_attention_heads")
    groups = _field(config, "num_key_value_heads") or heads
    if not _is_count(groups) or heads % groups:
        raise ValueError(f"config: num_key_value_heads is {groups!r}; it must divide num_attention_heads, {heads}")
    width = _field(config, "head_dim")
    if width is not None and width * heads != _field(config, "hidden_size"):
        raise ValueError(
            f"config: head_dim is {width!r}; it must be {_field(config, 'hidden_size') // heads}, hidden_size / "
            "num_attention_heads"
        )
    return int(groups)


def _kind(config: Any, family: Family, name: str) -> LayerKind:
    where = f"rope_parameters.{name}".rstrip(".")
    given = _field(config, "rope_parameters") or {}
    if name and isinstance(given, Mapping):
        if not given.keys() <= {FULL, LOCAL}:
            raise ValueError(f"config: rope_parameters is {given!r}; it must be an object by {FULL!r} and {LOCAL!r}")
        given = given.get(name) or {}
    scaling = _field(config, "rope_scaling") or {}
    if not isinstance(given, Mapping) or not isinstance(scaling, Mapping):
        raise ValueError(f"config: {where} is {given or scaling!r}; it must be an object")
    given = {**scaling, **given}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise ValueError(f"config: {where}.rope_type is {kind!r}; fastbert knows {', '.join(map(repr, _ROPE_TYPES))}")
    if given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"config: {where}.partial_rotary_factor is {given['partial_rotary_factor']!r}; fastbert knows 1 only"
        )
    older = {FULL: "global_rope_theta", LOCAL: "local_rope_theta"}.get(name, "rope_theta")
    candidates = (given.get("rope_theta"), _field(config, older), family.rope_theta[name])
    theta = next(value for value in candidates if value is not None)
    factor = given.get("factor", 1.0) if kind == "linear" else 1.0
    for field, value in (("rope_theta", theta), ("factor", factor)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise ValueError(f"config: {where}.{field} is {value!r}; it must be a number above 0, below 1e12")
    return LayerKind(name, float(theta), float(factor), _window(config) if name == LOCAL else None)


def _window(config: Any) -> int:
    """Keys on each side of a query: half of the config's window."""
    width = _field(config, "local_attention", 128)
    if not _is_count(width) or width % 2:
        raise ValueError(f"config: local_attention is {width!r}; it must be an even number of at least 2")
    return int(width) // 2


def _layer_types(config: Any, count: int) -> list[str]:
    names = _field(config, "layer_types")
    if names is None:
        every = _field(config, "global_attn_every_n_layers", 3)
        if not _is_count(every):
            raise ValueError(f"config: global_attn_every_n_layers is {every!r}; it must be an integer of at least 1")
        return [LOCAL if i % every else FULL for i in range(count)]
    if not isinstance(names, list | tuple) or len(names) != count or not set(names) <= {FULL, LOCAL}:
        raise ValueError(f"config: layer_types is {names!r}; it must be {count} of {FULL!r} and {LOCAL!r}")
    return list(names)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _field(config: Any, name: str, default: Any = None) -> Any:
    found = vars(config).get(name, vars(config).get("extra", {}).get(name))
    return default if found is None else found
