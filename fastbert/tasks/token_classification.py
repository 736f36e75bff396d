"""token-classification: entities, parts of speech; with transformers' fields, strategies and offsets.

Offsets are code points of the text, as Python counts them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from fastbert.inference.windows import Window, central_tokens
from fastbert.tasks.base import LengthSettings, Pipeline, by_item, logits, window_counts
from fastbert.tasks.text_classification import apply
from fastbert.tokenizer.tokenizer import Tokenizer

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


class Group(NamedTuple):
    """Tokens in which entities are found: those of a text; with a stride, those of a window."""

    item: int
    places: list[tuple[int, int]]  # (window, place in it) of each token, special ones apart


class Tokens(NamedTuple):
    """The T tokens of several groups, one after the other."""

    group: np.ndarray  # (T,)
    places: np.ndarray  # (T,) in their windows
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    continues: np.ndarray  # (T,) true for one of the word that the token before is of
    scores: np.ndarray  # (T, classes): probabilities


class Units(NamedTuple):
    """Tokens with their class; or words, by the strategy."""

    first: np.ndarray  # (U,) tokens
    last: np.ndarray
    label: np.ndarray
    score: np.ndarray


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

    def answers(
        self, items: list[Any], windows: Sequence[Window], rows: Sequence[np.ndarray], settings: Any
    ) -> Iterator[tuple[Any, list[Window]]]:
        windows_of, own = by_item(items, windows, range(len(windows)))
        texts = [settings.delimiter.join(item) if settings.is_split_into_words else item for item in items]
        entities = self._entities(items, texts, windows, rows, own, settings)
        for several, parts in zip(windows_of, entities, strict=True):
            found = _longest([each for part in parts for each in part]) if len(parts) > 1 else parts[0] if parts else []
            more = window_counts(several)
            yield [entity | more for entity in found] if more else found, several

    def _entities(
        self,
        items: list[Any],
        texts: list[str],
        windows: Sequence[Window],
        rows: Sequence[np.ndarray],
        own: list[list[int]],
        settings: Any,
    ) -> list[list[list[dict[str, Any]]]]:
        """The entities of each group, for each text; `own` are the windows of a text."""
        found: list[list[list[dict[str, Any]]]] = [[] for _ in items]
        if not windows:
            return found
        logits_of_all = np.concatenate(rows)
        first_of = np.cumsum([0, *map(len, rows)])
        names = self.runner.config.id2label
        ignored = np.array([names[label] in settings.ignore_labels for label in range(logits_of_all.shape[1])])
        # Most texts hold no entity: nothing else is done for them.
        held = np.cumsum(np.append(0, ~ignored[logits_of_all.argmax(axis=1)]))
        holds = held[first_of[1:]] > held[first_of[:-1]]
        groups = [
            group
            for item, numbers in enumerate(own)
            if holds[numbers].any()
            for group in _groups(item, numbers, windows, settings.stride is not None)
        ]
        if not groups:
            return found
        tokens = self.tokens(groups, items, texts, windows, logits_of_all, first_of, settings)
        for group, several in zip(groups, self._found(groups, tokens, texts, settings), strict=True):
            found[group.item].append(several)
        return found

    def tokens(
        self,
        groups: list[Group],
        items: list[Any],
        texts: list[str],
        windows: Sequence[Window],
        logits_of_all: np.ndarray,
        first_of: np.ndarray,
        settings: Any,
    ) -> Tokens:
        """The tokens of groups; the logits are of all windows' tokens, those of window n from `first_of[n]` on."""
        pairs = np.array([pair for group in groups for pair in group.places], np.int64).reshape(-1, 2)
        number, places = pairs.T
        used, which = np.unique(number, return_inverse=True)
        encodings = [windows[n].encoding for n in used.tolist()]
        at = np.cumsum([0, *map(len, encodings)])[which] + places
        group_of = np.repeat(np.arange(len(groups)), [len(group.places) for group in groups])
        total = sum(map(len, encodings))
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, total)[at]
        spans = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
        offsets = np.fromiter(spans, np.int64, 2 * total).reshape(-1, 2)[at]
        words = None
        if settings.is_split_into_words or (settings.aggregation_strategy in WORDS and self.tokenizer.knows_words):
            numbers = (-1 if word is None else word for word in chain.from_iterable(e.word_ids for e in encodings))
            words = np.fromiter(numbers, np.int64, total)[at]
        if settings.is_split_into_words:  # offsets within words become those within the joined text
            assert words is not None
            bounds = np.cumsum([0, *(len(group.places) for group in groups)]).tolist()
            for group, (first, after) in zip(groups, pairwise(bounds), strict=True):
                begin = np.cumsum([0, *(len(word) + len(settings.delimiter) for word in items[group.item])])
                mine = words[first:after]
                offsets[first:after] += np.where(mine >= 0, begin[mine], 0)[:, None]
        continues = np.zeros(len(pairs), bool)
        if settings.aggregation_strategy in WORDS:
            follows = group_of[1:] == group_of[:-1]
            continues[1:] = follows & self._goes_on(groups, texts, group_of, ids, offsets, words)[1:]
        scores = apply("softmax", logits_of_all[first_of[number] + places])
        return Tokens(group_of, places, ids, offsets[:, 0], offsets[:, 1], continues, scores)

    def _goes_on(
        self,
        groups: list[Group],
        texts: list[str],
        group_of: np.ndarray,
        ids: np.ndarray,
        offsets: np.ndarray,
        words: np.ndarray | None,
    ) -> np.ndarray:
        """True for a token that continues the word before it, if there is one.

        WordPiece knows its words. Of other tokenizers, whose words hold punctuation, transformers says that a word goes
        on up to a space; so it is here, but that a character of a language without spaces is a word.
        """
        known = ids != (-1 if self.tokenizer.unk_token_id is None else self.tokenizer.unk_token_id)
        if words is not None and self.tokenizer.knows_words:
            return known & (words >= 0) & (words == np.concatenate([[-1], words[:-1]]))

        def goes_on(text: str, start: int) -> bool:
            if start == 0 or " " in text[start - 1 : start + 1]:
                return False
            return not (is_ideograph(text[start - 1]) or is_ideograph(text[start : start + 1]))

        where = zip(group_of.tolist(), offsets[:, 0].tolist(), strict=True)
        return known & np.fromiter((goes_on(texts[groups[g].item], start) for g, start in where), bool, len(ids))

    def _found(
        self, groups: list[Group], tokens: Tokens, texts: list[str], settings: Any
    ) -> list[list[dict[str, Any]]]:
        """The entities of each group."""
        found: list[list[dict[str, Any]]] = [[] for _ in groups]
        names, ignored = self.runner.config.id2label, set(settings.ignore_labels)
        strategy = settings.aggregation_strategy
        units = _units(tokens, strategy)
        word = _Words(self.tokenizer, tokens, [texts[group.item] for group in groups])
        starts, ends, group_of = tokens.starts.tolist(), tokens.ends.tolist(), tokens.group.tolist()
        labels = range(tokens.scores.shape[1])
        if strategy == "none":
            places = tokens.places.tolist()
            kept = np.flatnonzero(~np.array([names[label] in ignored for label in labels])[units.label])
            for i, label, score in zip(
                *(x.tolist() for x in (kept, units.label[kept], units.score[kept])), strict=True
            ):
                entity = {"entity": names[label], "score": score, "index": places[i], "word": word.string(i)}
                found[group_of[i]].append(entity | {"start": starts[i], "end": ends[i]})
            return found
        kinds = [names[label].split("-", 1)[-1] for label in labels]
        begin, end = _runs(units, tokens.group, [_tag(names[label]) for label in labels])
        kept = np.flatnonzero(~np.array([kind in ignored for kind in kinds])[units.label[begin]])
        firsts, lasts = units.first.tolist(), units.last.tolist()
        for u, after, label in zip(
            begin[kept].tolist(), end[kept].tolist(), units.label[begin[kept]].tolist(), strict=True
        ):
            first, last = firsts[u], lasts[after - 1]
            joined = (
                word.of_tokens(first, last) if strategy == "simple" else word.of_words(firsts[u:after], lasts[u:after])
            )
            score = float(units.score[u] if after == u + 1 else units.score[u:after].mean())
            entity = {"entity_group": kinds[label], "score": score, "word": joined}
            found[group_of[first]].append(entity | {"start": starts[first], "end": ends[last]})
        return found


class _Words:
    """The strings of tokens, and of entities."""

    def __init__(self, tokenizer: Tokenizer, tokens: Tokens, texts: list[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts  # a text for each group
        self._tokens = tokens
        self._ids = tokens.ids.tolist()

    def string(self, i: int) -> str:
        """The form of a token; of one that is unknown, its part of the text."""
        if self._ids[i] == self._tokenizer.unk_token_id:
            return self._texts[self._tokens.group[i]][self._tokens.starts[i] : self._tokens.ends[i]]
        return str(self._tokenizer.convert_ids_to_tokens(self._ids[i]))

    def of_tokens(self, first: int, last: int) -> str:
        return self._tokenizer.convert_tokens_to_string([self.string(i) for i in range(first, last + 1)])

    def of_words(self, firsts: list[int], lasts: list[int]) -> str:
        words = [self.of_tokens(first, last) for first, last in zip(firsts, lasts, strict=True)]
        return self._tokenizer.convert_tokens_to_string(words)


def _groups(item: int, numbers: list[int], windows: Sequence[Window], by_window: bool) -> list[Group]:
    """The groups of a text with these windows."""
    if by_window or len(numbers) == 1:
        return [Group(item, [(n, place) for _, place in central_tokens([windows[n]])]) for n in numbers]
    places = central_tokens([windows[n] for n in numbers])
    return [Group(item, [(numbers[n], place) for n, place in places])]


def _units(tokens: Tokens, strategy: str) -> Units:
    labels, best = tokens.scores.argmax(axis=1), tokens.scores.max(axis=1).astype(np.float64)
    if strategy not in WORDS:
        every = np.arange(len(labels))
        return Units(every, every, labels, best)
    first = np.flatnonzero(~tokens.continues)
    after = np.append(first[1:], len(labels))
    label, score = labels[first], best[first]
    for unit in np.flatnonzero(after - first > 1) if strategy != "first" else ():
        part = slice(first[unit], after[unit])
        if strategy == "max":
            surest = first[unit] + int(best[part].argmax())
            label[unit], score[unit] = labels[surest], best[surest]
        else:
            mean = np.nanmean(tokens.scores[part], axis=0)
            label[unit] = mean.argmax()
            score[unit] = mean[label[unit]]
    return Units(first, after - 1, label, score)


def _runs(units: Units, group: np.ndarray, tags: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """First and end of each run of neighbours of one class, of which B- begins another."""
    kinds = [kind for _, kind in tags]
    kind = np.array([kinds.index(kind) for kind in kinds])[units.label]
    begins = np.array([prefix == "B" for prefix, _ in tags])[units.label]
    group = group[units.first]
    begins[:1] = True
    begins[1:] |= (kind[1:] != kind[:-1]) | (group[1:] != group[:-1])
    begin = np.flatnonzero(begins)
    return begin, np.append(begin[1:], len(kind))


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
