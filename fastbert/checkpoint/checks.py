"""Checks of the fields of JSON files, with one form of error: `FILE: FIELD is VALUE; it must be ...`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeGuard

from fastbert.checkpoint.json_files import shown

Check = tuple[Callable[[Any], bool], str]  # a predicate, and the description of valid values


def fields(where: object, values: dict[str, Any], known: dict[str, Check], *, others: bool = False) -> None:
    """Raises ValueError for a value that fails its Check and, unless `others`, for a name that is not in `known`."""
    for name, value in values.items():
        if name in known:
            is_right, wanted = known[name]
            if not is_right(value):
                refuse(where, name, value, wanted)
        elif not others:
            raise ValueError(f"{where}: fastbert does not know the field {shown(name)}; it knows {', '.join(known)}")


def refuse(where: object, field: str, value: object, wanted: str) -> NoReturn:
    raise ValueError(f"{where}: {field} is {shown(value)}; it must be {wanted}")


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(least: int, most: int, note: str = "") -> Check:
    return (lambda value: is_integer(value) and least <= value <= most), f"an integer from {least} to {most}{note}"


def number(least: int, most: int) -> Check:
    def is_right(value: Any) -> bool:
        finite = is_integer(value) or (isinstance(value, float) and math.isfinite(value))
        return finite and least <= value <= most

    return is_right, f"a number from {least} to {most}"


def or_null(check: Check) -> Check:
    return (lambda value: value is None or check[0](value)), f"null or {check[1]}"


def one_of(*values: object) -> Check:
    return (lambda v: any(type(v) is type(x) and v == x for x in values)), " or ".join(map(repr, values))


FLAG: Check = (lambda value: type(value) is bool), "true or false"
STRING: Check = (lambda value: isinstance(value, str)), "a string"
STRINGS: Check = (
    (lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)),
    "a list of strings",
)
OBJECT: Check = (lambda value: isinstance(value, dict)), "an object"
