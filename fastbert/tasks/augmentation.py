"""augment: variants of texts for training, by the words that a masked-language model puts in some places."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.tasks.fill_mask import FillMaskPipeline
from fastbert.tasks.pipelines import pipeline
from fastbert.tasks.text_classification import apply

ACTIONS = ("substitute", "insert")
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

    A text without a word to change, or too long for the model, is returned as it is. All places of all texts run packed
    in one go. The arguments are nlpaug's.

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
    pipe = model if isinstance(model, FillMaskPipeline) else pipeline("fill-mask", model, **options)
    draw = random.Random(seed)
    given = [texts] if isinstance(texts, str) else list(texts)
    kept = {word.lower() for word in stopwords}
    copies = [text.split() for text in given for _ in range(n)]
    places = [_places(words, draw, kept, aug_p, aug_min, aug_max) for words in copies]
    mask = pipe.tokenizer.mask_token
    masked = [_with_masks(words, at, mask, action) for words, at in zip(copies, places, strict=True)]
    fits = [
        bool(at) and len(pipe.tokenizer(text)["input_ids"]) <= pipe.runner.max_length
        for at, text in zip(places, masked, strict=True)
    ]
    windows = pipe.prepare([text for text, fit in zip(masked, fits, strict=True) if fit], pipe.settings())
    rows = iter(pipe.run(windows))
    allowed = _words_of(pipe)
    made = []
    for words, at, fit in zip(copies, places, fits, strict=True):
        if not fit:
            made.append(" ".join(words))
            continue
        chosen = [
            _drawn(pipe, logits, allowed, top_k, draw, words[i]) for i, logits in zip(at, next(rows), strict=True)
        ]
        made.append(_joined(words, dict(zip(at, chosen, strict=True)), action))
    groups = [made[start : start + n] for start in range(0, len(made), n)]
    return groups[0] if isinstance(texts, str) else groups


def _places(words: list[str], draw: random.Random, kept: set[str], share: float, least: int, most: int) -> list[int]:
    able = [i for i, word in enumerate(words) if any(map(str.isalnum, word)) and word.lower() not in kept]
    count = min(max(round(len(words) * share), least), most, len(able))
    return sorted(draw.sample(able, count))


def _with_masks(words: list[str], places: list[int], mask: str, action: str) -> str:
    return _joined(words, dict.fromkeys(places, mask), action)


def _joined(words: list[str], new: dict[int, str], action: str) -> str:
    out: list[str] = []
    for i, word in enumerate(words):
        if i in new:
            out.append(new[i])
        if i not in new or action == "insert":
            out.append(word)
    return " ".join(out)


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
    """A word for a place, not the one that was there."""
    scores = logits[allowed]
    best = allowed[np.argsort(-scores, kind="stable")[: top_k + 1]]
    names = [pipe.tokenizer.decode([int(i)]).strip() for i in best]
    likely = [(name, int(i)) for name, i in zip(names, best, strict=True) if name and name.lower() != old.lower()][
        :top_k
    ]
    chances = apply("softmax", logits[[i for _, i in likely]])
    return draw.choices([name for name, _ in likely], weights=chances.tolist())[0]
