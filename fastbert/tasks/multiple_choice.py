"""multiple-choice: which of several texts goes with a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fastbert.inference.windows import Window
from fastbert.tasks.base import Pipeline
from fastbert.tasks.text_classification import apply


class MultipleChoice(Pipeline):
    """{text, choices} to {label, score, scores}: the number of the choice, from 0, and each one's probability.

    A long text is split, a choice is not; of a choice's windows, the one with the highest score counts.
    """

    task = "multiple-choice"

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, dict)

    def check(self, item: Any, where: int) -> Any:
        choices = item.get("choices") if isinstance(item, dict) else None
        if not isinstance(choices, list | tuple) or len(choices) < 2 or not isinstance(item.get("text"), str):
            raise TypeError(f"inputs[{where}] is {item!r:.80}; it must be a dict with a text and two choices or more")
        return item

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        pairs = [(item["text"], choice) for item in items for choice in item["choices"]]
        return self.windows(pairs, settings, longer=None if settings.truncation else "only_first", offsets=False)

    def answers(
        self, items: list[Any], windows: Sequence[Window], rows: Sequence[np.ndarray], settings: Any
    ) -> Iterator[tuple[Any, list[Window]]]:
        ends = list(accumulate((len(item["choices"]) for item in items), initial=0))
        logits = np.full(ends[-1], -np.inf, np.float32)
        own: list[list[Window]] = [[] for _ in logits]
        for window, row in zip(windows, rows, strict=True):
            logits[window.item] = max(logits[window.item], float(row.item()))
            own[window.item].append(window)
        for begin, end in pairwise(ends):
            scores = apply("softmax", logits[begin:end])
            best = int(scores.argmax())
            answer = {"label": best, "score": float(scores[best]), "scores": scores.tolist()}
            yield answer, max(own[begin:end], key=len)
