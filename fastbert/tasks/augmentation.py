"""augment: variants of texts for training, by the words that a masked-language model puts in some places."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.inference.batching import blocks
from fastbert.tasks.fill_mask import FillMaskPipeline
from fastbert.tasks.pipelines import made_pipeline
from fastbert.tasks.text_classification import apply
from fastbert.tasks.token_classification import is_ideograph

ACTIONS = ("substitute", "insert")
Place = tuple[int, int]  # of a word in its text
_BLOCK, _BLOCK_CHARS = 64, 1 << 16  # texts that run together: each mask has a logit for each token of the vocabulary
_BEGINS = ("Ġ", "▁")  # a token that begins a word, where a space before it is part of it


def augment(
    texts: str | Sequence[str],
    *,
    model: FillMaskPipeline | str | Path,
    action: str = "substitute",
    n: int = 1,
    aug_p: float = 0.3,
    aug_min: int = 1,
    aug_max: int = 10,
    top_k: int = 100,
    stopwords: Collection[str] = (),
    seed: int = 0,
    **options: Any,
) -> list[Any]:
    """Variants of texts, in which some words were replaced or added: n for a str, a list of n for each of a list.

    Args:
        model: a fill-mask pipeline; or what `pipeline` takes, with its options.
        action: "substitute" words, or "insert" words before them.
        n: how many variants of each text.
        aug_p: the share of words.
        aug_min: the least words.
        aug_max: the most words.
        top_k: the likeliest words of a place that one is drawn from, by their probabilities.
        stopwords: words that stay, in lower case.
        seed: of all that is drawn.

    A text without a word to change, or too long for the model, is returned as it is. What is not a word stays. The
    arguments are nlpaug's.

    Raises:
        ValueError: another action, or a number out of range.
    """
    if action not in ACTIONS:
        raise ValueError(f"action is {action!r}; it must be {' or '.join(ACTIONS)}")
    if not 0 < aug_p <= 1:
        raise ValueError(f"aug_p is {aug_p}; it must be above 0 and at most 1")
    for name, value in (("n", n), ("aug_max", aug_max), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    pipe = made_pipeline("fill-mask", model, options)
    draw = random.Random(seed)
    given = [texts] if isinstance(texts, str) else list(texts)
    kept = {word.lower() for word in stopwords}
    copies = [text for text in given for _ in range(n)]
    places = [_places(text, draw, kept, aug_p, aug_min, aug_max) for text in copies]
    allowed = _words_of(pipe)
    made: list[str] = []
    for block in blocks(zip(copies, places, strict=True), lambda item: len(item[0]), _BLOCK, _BLOCK_CHARS):
        made += _changed(pipe, block, action, lambda logits, old: _drawn(pipe, logits, allowed, top_k, draw, old))
    groups = [made[start : start + n] for start in range(0, len(made), n)]
    return groups[0] if isinstance(texts, str) else groups


def _places(text: str, draw: random.Random, kept: set[str], share: float, least: int, most: int) -> list[Place]:
    words = list(_words(text))
    able = [(start, end) for start, end in words if text[start:end].lower() not in kept]
    count = min(max(round(len(words) * share), least), most, len(able))
    return sorted(draw.sample(able, count))


def _words(text: str) -> Iterator[Place]:
    """The words of a text, without the punctuation around them; a Chinese or Japanese character is one."""
    for part in re.finditer(r"\S+", text):
        letters = [i for i in range(*part.span()) if text[i].isalnum()]
        if any(is_ideograph(text[i]) for i in letters):
            yield from ((i, i + 1) for i in letters if is_ideograph(text[i]))
        elif letters:
            end = letters[-1] + 1
            while end < part.end() and unicodedata.combining(text[end]):
                end += 1
            yield letters[0], end


def _changed(
    pipe: FillMaskPipeline,
    block: list[tuple[str, list[Place]]],
    action: str,
    chosen: Callable[[np.ndarray, str], str],
) -> list[str]:
    """The texts with a new word, `chosen` by the logits and the old word, at each place."""
    masked = [_with(text, dict.fromkeys(at, pipe.tokenizer.mask_token), action) for text, at in block]
    fits = [
        bool(at) and len(encoding) <= pipe.runner.max_length
        for (_, at), encoding in zip(block, pipe.tokenizer.encodings(masked, offsets=False), strict=True)
    ]
    windows = pipe.prepare([text for text, fit in zip(masked, fits, strict=True) if fit], pipe.settings())
    rows = iter(pipe.run(windows))
    made = []
    for (text, at), fit in zip(block, fits, strict=True):
        new = {}
        if fit:
            new = {place: chosen(logits, text[slice(*place)]) for place, logits in zip(at, next(rows), strict=True)}
        made.append(_with(text, new, action))
    return made


def _with(text: str, new: dict[Place, str], action: str) -> str:
    """The text with words in place of those at some places, or before them."""
    out, done = [], 0
    for (start, end), word in new.items():
        out += [text[done:start], word]
        if action == "insert":
            out += ["" if is_ideograph(text[start]) else " ", text[start:end]]
        done = end
    return "".join([*out, text[done:]])


def _words_of(pipe: FillMaskPipeline) -> np.ndarray:
    """The ids of tokens that are whole words, or begin one."""
    tokenizer = pipe.tokenizer
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    marked = not tokenizer.knows_words and any(token.startswith(_BEGINS) for token in vocabulary)
    return np.array(
        sorted(
            i
            for token, i in vocabulary.items()
            if i not in special
            and (token.startswith(_BEGINS) if marked else not token.startswith("##"))
            and any(map(str.isalnum, token))
        )
    )


def _drawn(
    pipe: FillMaskPipeline, logits: np.ndarray, allowed: np.ndarray, top_k: int, draw: random.Random, old: str
) -> str:
    """A word for a place, not the one that was there; that one if there is no other."""
    likely: dict[str, int] = {}
    for i in allowed[np.argsort(-logits[allowed], kind="stable")]:
        name = pipe.tokenizer.decode([int(i)]).strip()
        if name and name.lower() != old.lower():
            likely.setdefault(name, int(i))
        if len(likely) == top_k:
            break
    if not likely:
        return old
    chances = apply("softmax", logits[list(likely.values())])
    return draw.choices(list(likely), weights=chances.tolist())[0]
