"""What the compiled products make of a precision, in words."""

from __future__ import annotations

from fastbert.native.extension import isa

_PRODUCTS = {"high": "three", "highest": "six"}


def describe_precision(precision: str | None) -> str | None:
    """For `explain`: how products that `supports_linear` takes run here; None where there is nothing to say."""
    if precision is None:
        return None
    if precision == "int8":
        return "int8: sums in int32"
    try:
        amx = isa().startswith("amx")
    except ValueError:  # FASTBERT_ISA is wrong: doctor, which says so, asks here too
        return None
    if amx:
        return f"{precision}: as {_PRODUCTS[precision]} products of bf16 pieces"
    return f"{precision}: in full fp32, as there is no AMX here"
