"""Names of tensors in files, where they differ from the names of parameters.

transformers stores a few families under the names of their first authors, with queries, keys and values, or the halves
of a gated product, in one tensor; both forms are read, and that one is written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from fastbert.families import BERT, Family

if TYPE_CHECKING:
    from torch import Tensor

_LEGACY = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


class Part(NamedTuple):
    """A parameter in a stored tensor: one of `blocks` equal blocks of its rows."""

    name: str
    block: int = 0
    blocks: int = 1


def plain_name(name: str, family: Family = BERT) -> str:
    """A parameter's name without a leading `bert.`, or as a family has it, and with LayerNorm's current names."""
    for prefix in (family.attribute, *family.older_attributes):
        if name.startswith(f"{prefix}."):
            name = name.removeprefix(f"{prefix}.")
            break
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name


def parts_of(stored: str, family: Family = BERT) -> list[Part]:
    """The parameters in a stored tensor, by their plain names."""
    name = plain_name(stored, family)
    for theirs, ours in family.stored_names:
        name = _renamed(name, theirs, ours)
    for theirs, several in family.stored_together:
        found = [_renamed(name, theirs, ours) for ours in several]
        if found[0] != name:
            return [Part(plain, i, len(several)) for i, plain in enumerate(found)]
    return [Part(name)]


def stored_state(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """A state under the names of files."""
    import torch

    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        for theirs, several in family.stored_together:
            whole = next((n for n in (_renamed(name, ours, theirs) for ours in several) if n != name), None)
            if whole is not None:
                parts.setdefault(whole, {})[name] = tensor
                if len(parts[whole]) == len(several):
                    order = [_renamed(whole, theirs, ours) for ours in several]
                    found[_as_stored(whole, family)] = torch.cat([parts[whole][n].detach() for n in order])
                break
        else:
            found[_as_stored(name, family)] = tensor
    return found


def _as_stored(name: str, family: Family) -> str:
    for theirs, ours in reversed(family.stored_names):
        name = _renamed(name, ours, theirs)
    return name


def _renamed(name: str, old: str, new: str) -> str:
    """`name` with the components `old` replaced."""
    return re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
