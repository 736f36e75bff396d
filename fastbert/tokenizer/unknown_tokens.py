"""A check that a vocabulary fits the text."""

from __future__ import annotations

MOST_UNKNOWN = 0.5  # share of tokens


def unknown_warning(source: str, unknown: int, tokens: int) -> str | None:
    """The warning for text of which most tokens are [UNK]; None for other text.

    Args:
        source: the text's file, as the warning names it.
        unknown: the number of [UNK] tokens.
        tokens: the number of all tokens, without [CLS], [SEP] and [PAD].
    """
    if not tokens or unknown <= MOST_UNKNOWN * tokens:
        return None
    return (
        f"warning: {source}: {unknown / tokens:.0%} of the tokens are [UNK]; "
        "the model's vocabulary does not fit this language or script"
    )
