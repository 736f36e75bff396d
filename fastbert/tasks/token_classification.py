"""token-classification: entities, parts of speech; with transformers' fields, strategies and offsets.

Offsets are code points of the text, as Python counts them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastbert.inference.windows import Window, central_tokens
from fastbert.tasks.base import LengthSettings, Pipeline, logits, window_counts
from fastbert.tasks.text_classification import apply

WORDS = ("first", "average", "max")  # strategies by which a word has one class
STRATEGIES = ("none", "simple", *WORDS)


@dataclass(frozen=True)
class TokenSettings(LengthSettings):
    """Settings of a call.

    Args:
        aggregation_strategy: "none": an answer for each token; "simple": one for each run of tokens of an entity;
            "first", "average", "max": the same, where a word has the class of its first token, of the mean of its
            tokens' probabilities, or of the token that is surest.
        ignore_labels: classes that are left out.
        is_split_into_words: whether an input is a list of words; offsets then are of the words, joined by `delimiter`.
        stride: as of LengthSettings, but for one thing: where it is given, entities are found in each window and of
            those that overlap the longest is kept, as transformers does. Else each token counts in the window where it
            is most central, and entities are found once.

    Raises:
        ValueError: another strategy.
    """

    aggregation_strategy: str = "none"
    ignore_labels: list[str] = field(default_factory=lambda: ["O"])
    is_split_into_words: bool = False
    delimiter: str = " "

    def __post_init__(self) -> None:
        strategy = getattr(self.aggregation_strategy, "value", self.aggregation_strategy)
        object.__setattr__(self, "aggregation_strategy", str(strategy).lower())
        if self.aggregation_strategy not in STRATEGIES:
            raise ValueError(
                f"aggregation_strategy is {self.aggregation_strategy!r}; it must be one of {', '.join(STRATEGIES)}"
            )
        if self.ignore_labels is None:
            object.__setattr__(self, "ignore_labels", ["O"])


class Tokens(NamedTuple):
    """The T tokens of a text, special ones apart."""

    places: list[int]  # in their windows
    ids: list[int]
    starts: list[int]
    ends: list[int]
    continues: list[bool]  # a word that the token before is of
    scores: np.ndarray  # (T, classes): probabilities


Unit = tuple[int, int, int, float]  # first and last token, class, score


class TokenClassification(Pipeline):
    """Texts to lists of {entity or entity_group, score, word, start, end}, and `index` without aggregation."""

    task = "token-classification"
    settings_class = TokenSettings

    def __call__(self, inputs: Any, **given: Any) -> Any:
        settings = self.settings(**given)
        several = isinstance(inputs, list | tuple) and inputs
        if settings.is_split_into_words and several and all(isinstance(word, str) for word in inputs):
            return list(self.stream([inputs], settings))  # in a list, as transformers has it
        return super().__call__(inputs, **given)

    def check(self, item: Any, where: int) -> Any:
        if isinstance(item, list | tuple) and all(isinstance(word, str) for word in item):
            return list(item)
        return super().check(item, where)

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        for where, item in enumerate(items):
            if isinstance(item, str) == settings.is_split_into_words:
                wanted = "a list of words" if settings.is_split_into_words else "a str"
                raise TypeError(
                    f"inputs[{where}] is {item!r:.60}; it must be {wanted}, as is_split_into_words is "
                    f"{settings.is_split_into_words}"
                )
        return self.windows(items, settings, words=settings.is_split_into_words)

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        return self.runner.run(windows, logits, rows=len)

    def answer(self, item: Any, windows: list[Window], rows: list[np.ndarray], settings: Any) -> list[dict[str, Any]]:
        ignored = [i for i, name in self.runner.config.id2label.items() if name in settings.ignore_labels]
        if ignored and all(np.isin(row.argmax(axis=1), ignored).all() for row in rows):
            return []  # most texts hold no entity
        text = settings.delimiter.join(item) if settings.is_split_into_words else item
        parts = self.tokens(item, text, windows, rows, settings)
        found = [entity for tokens in parts for entity in self._entities(text, tokens, settings)]
        if len(parts) > 1:
            found = _longest(found)
        more = window_counts(windows)
        return [entity | more for entity in found] if more else found

    def tokens(
        self, item: Any, text: str, windows: list[Window], rows: list[np.ndarray], settings: Any
    ) -> list[Tokens]:
        """The tokens of a text: together; or, with a stride, those of each window."""
        words, gap = (item, len(settings.delimiter)) if settings.is_split_into_words else (None, 0)
        columns = [_columns(window.encoding, words, gap) for window in windows]
        if settings.stride is None:
            places = [central_tokens(windows)]
        else:
            places = [[(number, place) for _, place in central_tokens([w])] for number, w in enumerate(windows)]
        together = apply("softmax", np.concatenate(rows))  # all windows' tokens
        starts_of = np.cumsum([0, *map(len, rows)])
        continues = self._word_rule(text, settings)
        found = []
        for several in places:
            picked = [[columns[number][column][place] for number, place in several] for column in range(4)]
            ids, starts, ends, numbers = picked
            before = [None, *numbers][: len(numbers)]
            follows = [False] * len(ids)
            if settings.aggregation_strategy in WORDS:
                follows = [i > 0 and continues(*token) for i, token in enumerate(zip(*picked, before, strict=True))]
            table = together[np.array([starts_of[n] + i for n, i in several], dtype=np.intp)]
            found.append(Tokens([i for _, i in several], ids, starts, ends, follows, table))
        return found

    def _word_rule(self, text: str, settings: Any) -> Callable[[int, int, int, Any, Any], bool]:
        """A function that is True for a token that continues the word before it.

        WordPiece knows its words. Of other tokenizers, whose words hold punctuation, transformers says that a word goes
        on up to a space; so it is here, but that a character of a language without spaces is a word.
        """
        unknown = self.tokenizer.unk_token_id
        if self.tokenizer.knows_words:
            return lambda id, start, end, word, before: id != unknown and word is not None and word == before

        def goes_on(id: int, start: int, end: int, word: Any, before: Any) -> bool:
            if id == unknown or start == 0 or " " in text[start - 1 : start + 1]:
                return False
            return not (is_ideograph(text[start - 1]) or is_ideograph(text[start : start + 1]))

        return goes_on

    def _entities(self, text: str, tokens: Tokens, settings: Any) -> list[dict[str, Any]]:
        names, ignored = self.runner.config.id2label, set(settings.ignore_labels)
        units = _units(tokens, settings.aggregation_strategy)
        if settings.aggregation_strategy == "none":
            return [
                {
                    "entity": names[label],
                    "score": score,
                    "index": tokens.places[i],
                    "word": self._strings(text, tokens, i, i)[0],
                    "start": tokens.starts[i],
                    "end": tokens.ends[i],
                }
                for i, _, label, score in units
                if names[label] not in ignored
            ]
        tags = {label: _tag(name) for label, name in names.items()}
        kept = {label: name.split("-", 1)[-1] for label, name in names.items()}
        entities = []
        for run in _runs(units, tags):
            kind = kept[run[0][2]]
            if kind not in ignored:
                entities.append(
                    {
                        "entity_group": kind,
                        "score": float(np.mean([score for *_, score in run])),
                        "word": self._joined(text, tokens, run, settings.aggregation_strategy),
                        "start": tokens.starts[run[0][0]],
                        "end": tokens.ends[run[-1][1]],
                    }
                )
        return entities

    def _strings(self, text: str, tokens: Tokens, first: int, last: int) -> list[str]:
        """The forms of tokens; of one that is unknown, its part of the text."""
        unknown = self.tokenizer.unk_token_id
        return [
            text[tokens.starts[i] : tokens.ends[i]]
            if tokens.ids[i] == unknown
            else str(self.tokenizer.convert_ids_to_tokens(tokens.ids[i]))
            for i in range(first, last + 1)
        ]

    def _joined(self, text: str, tokens: Tokens, run: list[Unit], strategy: str) -> str:
        join = self.tokenizer.convert_tokens_to_string
        words = [self._strings(text, tokens, first, last) for first, last, *_ in run]
        if strategy == "simple":
            return join([string for word in words for string in word])
        return join([join(word) for word in words])


def _columns(encoding: Any, words: list[str] | None, gap: int) -> tuple[list, list, list, list]:
    """Ids, starts, ends and word numbers of tokens; offsets within words become those within the joined text."""
    starts, ends = ([place[side] for place in encoding.offsets] for side in (0, 1))
    numbers = encoding.word_ids
    if words is not None:
        begins = np.concatenate([[0], np.cumsum([len(word) + gap for word in words])])
        shift = [0 if number is None else int(begins[number]) for number in numbers]
        starts, ends = ([at + by for at, by in zip(column, shift, strict=True)] for column in (starts, ends))
    return encoding.ids, starts, ends, numbers


def _units(tokens: Tokens, strategy: str) -> list[Unit]:
    """Each token with its class; or each word, by the strategy."""
    labels, best = tokens.scores.argmax(axis=1).tolist(), tokens.scores.max(axis=1).tolist()
    if strategy not in WORDS:
        return [(i, i, label, score) for i, (label, score) in enumerate(zip(labels, best, strict=True))]
    edges = [i for i, follows in enumerate(tokens.continues) if not follows] + [len(labels)]
    units = []
    for first, after in pairwise(edges):
        label, score = labels[first], best[first]
        if after - first > 1 and strategy == "max":
            surest = max(range(first, after), key=best.__getitem__)
            label, score = labels[surest], best[surest]
        elif after - first > 1 and strategy == "average":
            mean = np.nanmean(tokens.scores[first:after], axis=0)
            label = int(mean.argmax())
            score = float(mean[label])
        units.append((first, after - 1, label, score))
    return units


def _runs(units: list[Unit], tags: dict[int, tuple[str, str]]) -> list[list[Unit]]:
    """Neighbours of one class, of which B- begins another."""
    runs: list[list[Unit]] = []
    for unit in units:
        prefix, kind = tags[unit[2]]
        if runs and prefix != "B" and kind == tags[runs[-1][-1][2]][1]:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _tag(label: str) -> tuple[str, str]:
    return (label[0], label[2:]) if label[:2] in ("B-", "I-") else ("I", label)


def _longest(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, the longest; of equals, the surer."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if kept and kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            rank = lambda e: (e["end"] - e["start"], e["score"])  # noqa: E731
            kept[-1] = max(kept[-1], entity, key=rank)
        else:
            kept.append(entity)
    return kept


def is_ideograph(character: str) -> bool:
    """True for a character of a script that writes words without spaces: Chinese characters, kana."""
    name = unicodedata.name(character, "") if character else ""
    return name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA"))
