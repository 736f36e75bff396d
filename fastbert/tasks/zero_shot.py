"""zero-shot-classification: which of the given labels a text entails, by a model of natural-language inference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.inference.windows import Window
from fastbert.tasks.base import LengthSettings, Pipeline, window_counts
from fastbert.tasks.base_runner import BaseRunner
from fastbert.tasks.text_classification import apply


@dataclass(frozen=True)
class ZeroShotSettings(LengthSettings):
    """Settings of a call.

    Args:
        candidate_labels: a list, or a str with commas between them.
        hypothesis_template: a sentence with {} for a label.
        multi_label: whether several labels may be right: each has a probability of its own.

    A long text is split or cut, never its hypothesis; of its windows, the one that entails a label most counts for it.

    Raises:
        ValueError: there is no label, or no {} in the template.
    """

    candidate_labels: Any = ()
    hypothesis_template: str = "This example is {}."
    multi_label: bool = False

    @property
    def labels(self) -> list[str]:
        given = self.candidate_labels
        return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else list(given)

    def __post_init__(self) -> None:
        if self.hypothesis_template.format("a label") == self.hypothesis_template:
            raise ValueError(f"hypothesis_template is {self.hypothesis_template!r}; it must have {{}} for a label")


class ZeroShotClassification(Pipeline):
    """Texts to {sequence, labels, scores}, best label first. All texts with all labels run packed in one go."""

    task = "zero-shot-classification"
    settings_class = ZeroShotSettings

    def __call__(self, inputs: Any, candidate_labels: Any = None, **given: Any) -> Any:
        """As Pipeline; the labels may stand second.

        Raises:
            ValueError: no label, or no text.
        """
        if candidate_labels is not None:
            given["candidate_labels"] = candidate_labels
        if not self.settings(**given).labels:
            raise ValueError("candidate_labels is empty; there must be a label at least")
        return super().__call__(inputs, **given)

    def __init__(self, runner: BaseRunner, **defaults: Any) -> None:
        super().__init__(runner, **defaults)
        classes = runner.config.label2id
        named = [int(index) for label, index in classes.items() if label.lower().startswith("entail")]
        if not named:  # as in transformers
            shown = ", ".join(map(repr, runner.config.id2label.values()))
            warnings.warn(
                f"no class of the model is named entailment; of {shown} the last is taken for it", stacklevel=3
            )
        self.entailment = named[0] if named else runner.config.num_labels - 1

    def size(self, item: Any, settings: Any) -> int:
        return super().size(item, settings) * len(settings.labels)

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        hypotheses = [settings.hypothesis_template.format(label) for label in settings.labels]
        pairs = [(text, hypothesis) for text in items for hypothesis in hypotheses]
        return self.windows(pairs, settings, longer="only_first", offsets=False)

    def answers(
        self, items: list[Any], windows: Sequence[Window], rows: Sequence[np.ndarray], settings: Any
    ) -> Iterator[tuple[Any, list[Window]]]:
        labels, yes = settings.labels, self.entailment
        no = -1 if yes == 0 else 0
        logits = np.full((len(items) * len(labels), rows[0].shape[-1]), -np.inf, np.float32)
        own: list[list[Window]] = [[] for _ in logits]
        for window, row in zip(windows, rows, strict=True):
            own[window.item].append(window)
            if row[yes] > logits[window.item, yes]:
                logits[window.item] = row
        table = logits.reshape(len(items), len(labels), -1)
        if settings.multi_label or len(labels) == 1:
            scores = apply("softmax", table[..., [no, yes]])[..., 1]
        else:
            scores = apply("softmax", table[..., yes])
        for number, (item, row) in enumerate(zip(items, scores, strict=True)):
            order = row.argsort()[::-1]
            ranked = {"labels": [labels[i] for i in order], "scores": row[order].tolist()}
            most = max(own[number * len(labels) : (number + 1) * len(labels)], key=len)
            yield {"sequence": item, **ranked, **window_counts(most)}, most
