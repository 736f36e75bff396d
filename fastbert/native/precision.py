"""What the compiled products make of a precision, in words."""

from __future__ import annotations


def describe_precision(precision: str | None) -> str | None:
    """For `explain`: how products that `supports_linear` takes run here; None where there is nothing to say."""
    return f"{precision}: in full fp32, no split products yet" if precision in ("high", "highest") else None
