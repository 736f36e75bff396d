"""Splits texts into batches by their number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

WINDOW = 2048  # texts that are sorted by length together; bounds memory. `fastbert embed` commits after each window

Item = TypeVar("Item")


def blocks(
    items: Iterable[Item], characters: Callable[[Item], int], most: int, most_characters: int
) -> Iterator[list[Item]]:
    """Lists of at most `most` items; one also ends when its items reach `most_characters`."""
    block: list[Item] = []
    held = 0
    for item in items:
        block.append(item)
        held += characters(item)
        if len(block) >= most or held >= most_characters:
            yield block
            block, held = [], 0
    if block:
        yield block


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits texts into batches of at most `max_tokens` real tokens. A packed batch has no other cost.

    Texts are sorted by length, the longest first. A batch that does not fit into memory then fails at the
    start, later batches reuse the memory of the first, and the remaining time is overestimated rather than
    underestimated. Texts of equal length keep their order, so the split depends on the lengths alone.
    A text over the budget gets a batch of its own. A text without tokens counts as one token.

    Args:
        lengths: number of tokens of each text.
        max_tokens: at least 1.

    Returns:
        Lists of indices into `lengths`; each index is in exactly one list.

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
