"""Reads the JSON files of a checkpoint. Size and depth are bounded, keys must be unique, errors name the file."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

LARGEST = 64 << 20  # bytes: twice the size of a tokenizer.json of 256,000 tokens with their merges
DEEPEST = 64  # nested lists and objects; a tokenizer's pipeline has about ten levels
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_LEAVES = {str, int, float, bool, type(None)}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def read_json(file: Path, kind: type = dict) -> Any:
    """The value in a JSON file, a dict (or a list, with kind=list).

    Raises:
        ValueError: the file is not JSON, not UTF-8, of another kind, has a duplicate key in one object, or more than
            LARGEST bytes or DEEPEST levels.
    """
    with open(file, "rb") as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{file} is longer than {LARGEST} bytes, the limit for a JSON file")
    return parse_json(content, file, kind)


def parse_json(content: bytes, source: str | Path, kind: type = dict) -> Any:
    """Parses `content`; see read_json. Errors begin with `source`."""
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object)
        if HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # fails for a string with half a surrogate pair
        deep = _depth_exceeds(value, DEEPEST)
    except _DoubledKeyError as error:
        raise ValueError(f"{source}: the key {shown(error.args[0])} occurs twice in one object") from None
    except RecursionError:
        deep = True
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ValueError(f"{source} is not a JSON file: {error}") from error
    if deep:
        raise ValueError(f"{source} is nested more than {DEEPEST} levels deep")
    if not isinstance(value, kind):
        wanted = "JSON object" if kind is dict else "list"
        raise ValueError(f"{source} holds a {type(value).__name__}, not a {wanted}")
    return value


def shown(value: object) -> str:
    """repr of a value from a file, shortened for an error message."""
    return _short.repr(value)


class _DoubledKeyError(Exception):
    """Raised for a duplicate key; carries it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _DoubledKeyError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return value


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[Any] = [[value]]
    for _ in range(limit + 1):
        holders = [items for items in level if not _LEAVES.issuperset(map(type, items))]  # fast for a vocabulary
        inner = [item for items in holders for item in items if isinstance(item, dict | list)]
        if not inner:
            return False
        level = [item.values() if isinstance(item, dict) else item for item in inner]
    return True
