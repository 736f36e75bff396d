"""text-classification: sentiment, topics, pairs of texts (entailment, paraphrase), with transformers' fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fastbert.inference.windows import Window
from fastbert.tasks.base import LengthSettings, Pipeline, by_item, window_counts

BEST: Literal["best"] = "best"  # top_k that was not given: the best class alone, not in a list
FUNCTIONS = ("softmax", "sigmoid", "none")


@dataclass(frozen=True)
class TextSettings(LengthSettings):
    """Settings of a call.

    Args:
        top_k: how many classes, best first; None for all. Not given: the best one, not in a list.
        function_to_apply: "softmax", "sigmoid" or "none", of the logits. Default: none for regression, sigmoid for
            several labels and for a single number, else softmax.
        long: "mean" or "max", of the logits of a long text's windows.

    Raises:
        ValueError: another function or long, or a top_k below 1.
    """

    top_k: int | Literal["best"] | None = BEST
    function_to_apply: str | None = None
    long: str = "mean"

    def __post_init__(self) -> None:
        if self.function_to_apply is not None and str(self.function_to_apply).lower() not in FUNCTIONS:
            raise ValueError(f"function_to_apply is {self.function_to_apply!r}; it must be {', '.join(FUNCTIONS)}")
        if self.long not in ("mean", "max"):
            raise ValueError(f"long is {self.long!r}; it must be 'mean' or 'max'")
        if isinstance(self.top_k, int) and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for all classes")


class TextClassification(Pipeline):
    """Texts, or pairs ({"text": ..., "text_pair": ...}, or a tuple of two), to [{label, score}]."""

    task = "text-classification"
    settings_class = TextSettings

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str | dict | tuple)

    def check(self, item: Any, where: int) -> Any:
        if isinstance(item, dict):
            # As in transformers, an empty second text is none.
            item = (item.get("text"), item["text_pair"]) if item.get("text_pair") else item.get("text")
        texts = item if isinstance(item, tuple) else (item,)
        if len(texts) > 2 or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"inputs[{where}] is {item!r:.80}; {self.task} takes a str, or a pair as "
                '{"text": ..., "text_pair": ...} or a tuple of two'
            )
        return item

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        """The windows of texts and pairs, which may be mixed."""
        kinds = [isinstance(item, str) for item in items]
        if all(kinds) or not any(kinds):
            return super().prepare(items, settings)
        found: list[Window] = []
        for i, item in enumerate(items):
            found += [replace(window, item=i) for window in super().prepare([item], settings)]
        return found

    def logits(self, rows: list[np.ndarray], settings: TextSettings) -> np.ndarray:
        """Of a text, from those of its windows: (classes,)."""
        if len(rows) == 1:
            return rows[0]
        return np.mean(rows, axis=0) if settings.long == "mean" else np.max(rows, axis=0)

    def scores(self, logits: np.ndarray, function: str | None = None) -> np.ndarray:
        """Of each class, by the model's kind of problem."""
        if function is None:
            kind, count = self.runner.config.problem_type, self.runner.config.num_labels
            several = kind == "multi_label_classification" or count == 1
            function = "none" if kind == "regression" else "sigmoid" if several else "softmax"
        return apply(function.lower(), logits)

    def answers(
        self, items: list[Any], windows: Sequence[Window], rows: Sequence[np.ndarray], settings: Any
    ) -> Iterator[tuple[Any, list[Window]]]:
        own, of_items = by_item(items, windows, rows)
        if not items:
            return
        scores = self.scores(np.stack([self.logits(each, settings) for each in of_items]), settings.function_to_apply)
        names = self.runner.config.id2label
        order = np.argsort(-scores, axis=1, kind="stable")[:, : 1 if settings.top_k == BEST else settings.top_k]
        values = np.take_along_axis(scores, order, axis=1).tolist()
        for classes, best, several in zip(order.tolist(), values, own, strict=True):
            more = window_counts(several)
            found = [{"label": names[i], "score": score, **more} for i, score in zip(classes, best, strict=True)]
            yield found[0] if settings.top_k == BEST else found, several

    def single(self, answer: Any, inputs: Any, given: dict[str, Any]) -> Any:
        """The answer; in a list, as transformers has it, if it is of one text and the call has no top_k."""
        return [answer] if "top_k" not in given and isinstance(inputs, str) else answer


def apply(function: str, logits: np.ndarray) -> np.ndarray:
    """One of FUNCTIONS, over the last axis."""
    if function == "none":
        return logits
    if function == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    exponents /= exponents.sum(axis=-1, keepdims=True)
    return exponents
