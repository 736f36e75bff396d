"""Which texts run together."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 2048  # texts sorted by length together, which bounds the memory held for them; `embed` commits as many at once


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits texts into batches of at most `max_tokens` real tokens, which is all that a packed batch costs.

    Texts of like length go together, the longest first: a batch that does not fit into memory fails at
    once and not at the end, memory taken for the first batch serves all others, and the time still to go
    is over- rather than underestimated. Texts of one length keep their order, so the split is a function
    of the lengths alone. A text over the budget gets a batch of its own; one of no tokens counts as one.

    Args:
        lengths: tokens of each text.
        max_tokens: at least 1.

    Returns:
        Lists of indices into `lengths`; each index stands in exactly one.

    Raises:
        ValueError: max_tokens is less than 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    batches: list[list[int]] = []
    left = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        cost = max(lengths[index], 1)
        if cost > left or not batches:
            batches.append([])
            left = max_tokens
        batches[-1].append(index)
        left -= cost
    return batches
