"""A description of how the compiled products treat a precision."""

from __future__ import annotations

from fastbert.engine.library import isa

_PRODUCTS = {"high": "three", "highest": "six"}


def describe_precision(precision: str | None) -> str | None:
    """For `explain`: how products that `supports_linear` accepts run here; None if there is nothing to add."""
    if precision is None:
        return None
    if precision == "int8":
        return "int8: sums in int32"
    try:
        amx = isa().startswith("amx")
    except ValueError:  # FASTBERT_ISA is wrong; doctor, which reports that, also calls this
        return None
    if amx:
        return f"{precision}: as {_PRODUCTS[precision]} products of bf16 pieces"
    return f"{precision}: in full fp32, as there is no AMX here"
