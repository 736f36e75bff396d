"""What the compiled products make of a precision, in words."""

from __future__ import annotations

from fastbert.native.extension import isa

_PRODUCTS = {"high": "three", "highest": "six"}


def describe_precision(precision: str | None) -> str | None:
    """For `explain`: how products that `supports_linear` takes run here; None where there is nothing to say."""
    if precision not in _PRODUCTS:
        return None
    if isa().startswith("amx"):
        return f"{precision}: as {_PRODUCTS[precision]} products of bf16 pieces"
    return f"{precision}: in full fp32, as there is no AMX here"
