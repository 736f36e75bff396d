"""Dev examples and folds, drawn from one source of labelled examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fastbert.training.finetune.examples import Reading, Source, Table
from fastbert.training.finetune.pair_examples import RankExample, VectorExample, row_of_pair
from fastbert.training.finetune.recipe import read_examples, task_of
from fastbert.training.finetune.settings import FinetuneSettings

DEV_SHARE = 0.1  # of the training examples, where no dev examples are given
_AS_THEY_ARE = ("text", "label", "words", "tags", "question", "context", "id")  # fields that are cells of a row


@dataclass(frozen=True)
class Labelled:
    """Examples as rows, which are read as the same examples.

    Attributes:
        labels: of the task, in all examples: a part may lack some.
        classes: the class of each example, where each has one; each part gets its share of each class.
        groups: the context of each question, or the anchor of each pair; all examples of one are in the same part.
    """

    table: Table
    labels: list[str]
    classes: np.ndarray | None
    groups: np.ndarray | None

    @classmethod
    def read(cls, source: Source, settings: FinetuneSettings, reading: Reading) -> Self:
        task = task_of(settings)
        examples = read_examples(task, source, reading)
        rows = [_row_of(example, reading) for example in examples]
        table = Table(str(source), rows, [example.where for example in examples])
        names = [getattr(example, "label", None) for example in examples]
        classes = np.array(names) if all(isinstance(name, str) for name in names) else None
        contexts = [example.context for example in examples if hasattr(example, "context")]
        if isinstance(examples[0], VectorExample) and examples[0].kind not in ("scored", "classes"):
            contexts = [example.texts[0] for example in examples]  # mined rows of one anchor stay together
        groups = np.unique(contexts, return_inverse=True)[1] if contexts else None
        return cls(table, task.labels(examples), classes, groups)

    def __len__(self) -> int:
        return len(self.table.rows)

    def part(self, places: np.ndarray) -> Self:
        """The examples at these places, in the order of the source."""
        places = np.sort(places)
        rows, where = self.table.rows, self.table.where or []
        table = Table(self.table.name, [rows[i] for i in places], [where[i] for i in places])
        of = lambda values: None if values is None else values[places]  # noqa: E731
        return type(self)(table, self.labels, of(self.classes), of(self.groups))

    def split(self, share: float, seed: int) -> dict[str, Source]:
        """Training and dev examples. A class with a single example is trained on.

        Args:
            share: of the examples (of the contexts, for questions) that become dev examples.

        Raises:
            ValueError: the share is out of range, or there is only one example or context.
        """
        from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit

        if not 0 < share < 1:
            raise ValueError(f"dev_share is {share}; it must be above 0 and below 1")
        self._check_parts("dev_share", share, 2)
        places, counts = np.arange(len(self)), self._counts()
        able = places if self.groups is not None else places[counts > 1]
        able = able if len(able) > 1 else places
        kinds = [GroupShuffleSplit] if self.groups is not None else [StratifiedShuffleSplit, ShuffleSplit]
        of = lambda values: None if values is None else values[able]  # noqa: E731
        for kind in kinds if self.classes is not None or self.groups is not None else [ShuffleSplit]:
            drawn = kind(1, test_size=share, random_state=seed).split(able, of(self.classes), of(self.groups))
            try:
                dev = able[next(drawn)[1]]
            except ValueError:  # more classes than the share has examples
                continue
            return {"train": self.part(np.setdiff1d(places, dev)).table, "dev": self.part(dev).table}
        raise ValueError(f"dev_share is {share}, which leaves nothing to train on or to test with, of {len(self)}")

    def folds(self, count: int, share: float, seed: int) -> Iterator[dict[str, Source]]:
        """Training, dev and test examples of each fold; each example is in the test of one.

        Raises:
            ValueError: there are fewer examples or contexts than folds.
        """
        from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

        if count < 2:
            raise ValueError(f"folds is {count}; it must be at least 2")
        self._check_parts("folds", count, count)
        few = self.classes is None or self._counts().min() < count
        kind = GroupKFold if self.groups is not None else KFold if few else StratifiedKFold
        drawn = kind(count, shuffle=True, random_state=seed)
        for rest, held in drawn.split(self.table.rows, None if few else self.classes, self.groups):
            yield {**self.part(rest).split(share, seed), "test": self.part(held).table}

    def _counts(self) -> np.ndarray:
        """For each example, how many have its class; without classes, all."""
        if self.classes is None:
            return np.full(len(self), len(self))
        _, which, counts = np.unique(self.classes, return_inverse=True, return_counts=True)
        return counts[which]

    def _check_parts(self, name: str, value: float, least: int) -> None:
        found, what = (len(self), "examples") if self.groups is None else (len(np.unique(self.groups)), "contexts")
        if found < least:
            raise ValueError(f"{name} is {value}; {self.table} holds {found} {what}, and it takes {least}")


def _row_of(example: Any, reading: Reading) -> dict[str, Any]:
    if isinstance(example, VectorExample | RankExample):
        return row_of_pair(example, reading)
    values = vars(example)
    row = {getattr(reading, name): values[name] for name in _AS_THEY_ARE if name in values}
    if values.get("pair") is not None:
        row[str(reading.pair)] = values["pair"]
    if "choices" in values:
        names = reading.choices
        row |= {names[0]: values["choices"]} if len(names) == 1 else dict(zip(names, values["choices"], strict=True))
    if "answers" in values:
        answers = values["answers"]
        row[reading.answers] = {"text": [a.text for a in answers], "answer_start": [a.start for a in answers]}
    return row
