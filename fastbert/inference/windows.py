"""Texts as the model sees them: whole, cut, or in overlapping windows of tokens with their places in the text."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from fastbert.tokenizer.tokenizer import Tokenizer

OVERLAP = 128  # most tokens that two windows of a long text share, unless a call says otherwise


@dataclass(frozen=True)
class Window:
    """A text, a pair, or a part of a long one, with its special tokens."""

    item: int  # index of its input
    encoding: Any  # of the tokenizers library: ids, type_ids, sequence_ids; where asked for, offsets, word_ids
    part: int = 0  # which text of a pair is split into windows
    start: int = 0  # tokens of that text before the window
    cut: bool = False  # the text had more tokens, which are left out

    def __len__(self) -> int:
        return len(self.encoding)

    @property
    def text_tokens(self) -> int:
        """The number of tokens of the text that is split, special ones apart."""
        return int(self.encoding.sequence_ids.count(self.part))


def windows_of(
    tokenizer: Tokenizer,
    texts: Sequence[str] | Sequence[tuple[str, str]] | Sequence[Sequence[str]],
    limit: int,
    *,
    overlap: int | None = None,
    cut: bool = False,
    longer: str | None = None,
    words: bool = False,
    offsets: bool = True,
) -> list[Window]:
    """The windows of each text or pair, in order; several where it has more than `limit` tokens.

    Args:
        overlap: tokens that two windows share (default: OVERLAP, or a quarter of the limit if that is less).
        cut: whether a text ends at the limit instead.
        longer: which of a pair is split or cut: "only_first", "only_second", or None for the longer one.
        words: whether a text is a list of words.
        offsets: whether the windows have their places in the text.

    Raises:
        ValueError: an overlap that leaves no room, or a pair whose shorter text leaves none.
    """
    paired = bool(texts) and not words and not isinstance(texts[0], str)
    room = limit - tokenizer.num_special_tokens_to_add(paired)
    stride = 0 if cut else min(OVERLAP, room // 4) if overlap is None else overlap
    if not 0 <= stride < room:
        raise ValueError(f"stride is {stride}; it must be 0 to {room - 1}, as windows have {room} tokens of text")
    options: dict[str, Any] = {"max_length": limit, "is_split_into_words": words, "offsets": offsets}
    if cut:
        encodings = tokenizer.encodings(list(texts), truncation=longer or True, **options)
        full = (len(encoding) == limit and bool(encoding.overflowing) for encoding in encodings)
        return [Window(i, encoding, cut=cut) for i, (encoding, cut) in enumerate(zip(encodings, full, strict=True))]
    options["stride"] = stride
    if not paired or longer is not None:
        return _split(tokenizer, list(texts), longer or "only_first", options)
    found: list[Window] = []
    for i, (pair, encoding) in enumerate(zip(texts, tokenizer.encodings(list(texts), offsets=offsets), strict=True)):
        if len(encoding) <= limit:
            found.append(Window(i, encoding))
            continue
        firsts, seconds = (encoding.sequence_ids.count(part) for part in (0, 1))
        if min(firsts, seconds) + stride >= room:
            raise ValueError(
                f"a pair of {len(encoding)} tokens has {min(firsts, seconds)} in its shorter text, which leave no room "
                f"for windows of {limit}: max_length and stride are the limits, or truncation=True"
            )
        side = "only_second" if seconds > firsts else "only_first"
        found += [replace(window, item=i) for window in _split(tokenizer, [pair], side, options)]
    return found


def _split(tokenizer: Tokenizer, texts: list, side: str, options: dict[str, Any]) -> list[Window]:
    if tokenizer.truncation_side != "right":  # the first window is to be the beginning of the text
        tokenizer = copy(tokenizer)
        tokenizer.truncation_side = "right"
    part = int(side == "only_second")
    found: list[Window] = []
    for i, first in enumerate(tokenizer.encodings(texts, truncation=side, **options)):
        found.append(Window(i, first, part))
        for encoding in first.overflowing:
            start = found[-1].start + found[-1].text_tokens - options["stride"]
            found.append(Window(i, encoding, part, start))
    return found


def shortened(text: str, tokenizer: Tokenizer, most: int) -> str:
    """The text of the first `most` tokens."""
    encoding = tokenizer(text, add_special_tokens=False).encodings[0]
    return text if len(encoding) <= most else text[: encoding.offsets[most - 1][1]]


def count_tokens(windows: Sequence[Window]) -> int:
    """The tokens of a text or pair, each once, special ones apart."""
    last = windows[-1]
    return last.start + sum(part is not None for part in last.encoding.sequence_ids)


def central_tokens(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """(window, place) of each token of a text or pair, in order, from the window in which it is most central.

    Special tokens are left out.
    """
    if len(windows) == 1:
        return [(0, place) for place, part in enumerate(windows[0].encoding.sequence_ids) if part is not None]
    best: dict[tuple[int, int], tuple[int, int, int]] = {}  # by text of a pair and token of it
    for number, window in enumerate(windows):
        parts = window.encoding.sequence_ids
        following = [window.start if part == window.part else 0 for part in (0, 1)]
        for place, part in enumerate(parts):
            if part is not None:
                key = part, following[part]
                following[part] += 1
                context = min(place, len(parts) - 1 - place)
                if key not in best or context > best[key][0]:
                    best[key] = context, number, place
    return [(number, place) for _, (_, number, place) in sorted(best.items())]
