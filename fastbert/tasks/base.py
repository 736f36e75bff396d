"""Pipeline: the common part of the tasks. Inputs are tokenized ahead in a thread, and run in packed batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np

from fastbert.inference.ahead import ahead
from fastbert.inference.windows import Window, count_tokens
from fastbert.tasks.base_runner import BaseRunner, chunks

Value = TypeVar("Value")

# Arguments of transformers' pipelines that batches of packed tokens have no use for.
IGNORED_ARGUMENTS = {"batch_size", "num_workers", "padding", "framework", "use_fast"}


@dataclass(frozen=True)
class LengthSettings:
    """Settings for a text with more tokens than the model takes.

    Args:
        truncation: True cuts it, as transformers' pipelines do; else it runs in overlapping windows, and an answer
            that was made of several has their number, `windows`, and the text's number of tokens, `tokens`.
        max_length: most tokens of a window or of a cut text (default: as many as the model takes).
        stride: tokens that two windows share (default: 128, or a quarter of max_length if that is less).
    """

    truncation: bool | str = False
    max_length: int | None = None
    stride: int | None = None


class Pipeline:
    """A model that answers for one task. The arguments of a call can be given when it is made, as defaults."""

    task: ClassVar[str]
    settings_class: ClassVar[type[Any]] = LengthSettings

    def __init__(self, runner: BaseRunner, **defaults: Any) -> None:
        self.runner, self.defaults = runner, defaults
        self.settings()

    @property
    def model(self) -> Any:
        return self.runner.model

    @property
    def tokenizer(self) -> Any:
        return self.runner.tokenizer

    def settings(self, **given: Any) -> Any:
        """The settings of a call.

        Raises:
            TypeError: the task has no such argument.
        """
        values = {name: value for name, value in {**self.defaults, **given}.items() if name not in IGNORED_ARGUMENTS}
        values |= values.pop("tokenizer_kwargs", None) or values.pop("tokenize_kwargs", None) or {}
        known = [field.name for field in fields(self.settings_class)]
        if unknown := [name for name in values if name not in known]:
            raise TypeError(f"{self.task} takes no {unknown[0]}; it takes {', '.join(known)}")
        return self.settings_class(**values)

    def __call__(self, inputs: Any, **given: Any) -> Any:
        """The answer to one input, a list of them for a list, or an iterator for any other iterable."""
        settings = self.settings(**given)
        if self.is_one(inputs):
            return self.single(next(self.stream([inputs], settings)), inputs, given)
        answers = self.stream(inputs, settings)
        return list(answers) if isinstance(inputs, list | tuple) else answers

    def stream(self, inputs: Iterable[Any], settings: Any = None) -> Iterator[Any]:
        """The answers in order, in bounded memory."""
        return (answer for answer, _ in self.with_windows(inputs, settings))

    def with_windows(self, inputs: Iterable[Any], settings: Any = None) -> Iterator[tuple[Any, list[Window]]]:
        """The answers, each with the windows of its input."""
        settings = self.settings() if settings is None else settings
        items = (self.check(item, where) for where, item in enumerate(inputs))

        def prepare(chunk: list[Any]) -> list[Window]:
            return self.prepare(chunk, settings)

        for chunk, windows in ahead(chunks(items, lambda item: self.size(item, settings)), prepare):
            yield from self.answers(chunk, windows, self.run(windows), settings)

    def size(self, item: Any, settings: Any) -> int:
        """The characters that are tokenized for an input."""
        return _characters(item)

    def is_one(self, inputs: Any) -> bool:
        """True for one input, False for several."""
        return isinstance(inputs, str)

    def check(self, item: Any, where: int) -> Any:
        """The input in the form that `prepare` takes.

        Raises:
            TypeError: it is no text.
        """
        if not isinstance(item, str):
            raise TypeError(f"inputs[{where}] is a {type(item).__name__}; {self.task} takes a str")
        return item

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        """The windows of inputs; without their places in the text, unless the task's answer has them."""
        return self.windows(items, settings, offsets=False)

    def windows(self, texts: list[Any], settings: Any, **options: Any) -> list[Window]:
        """The windows of texts or pairs, cut or split as the settings say; see inference.windows.windows_of."""
        return self.runner.windows(
            texts, max_length=settings.max_length, overlap=settings.stride, cut=bool(settings.truncation), **options
        )

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        """The numbers that answers are made of: an array for each window."""
        return self.runner.run(windows, logits)

    def answers(
        self, items: list[Any], windows: Sequence[Window], rows: Sequence[np.ndarray], settings: Any
    ) -> Iterator[tuple[Any, list[Window]]]:
        """The answer to each input, from its windows and the rows of each."""
        for item, own, values in zip(items, *by_item(items, windows, rows), strict=True):
            yield self.answer(item, own, values, settings), own

    def answer(self, item: Any, windows: list[Window], rows: list[np.ndarray], settings: Any) -> Any:
        raise NotImplementedError

    def single(self, answer: Any, inputs: Any, given: dict[str, Any]) -> Any:
        """The answer to an input that came alone, in a call with the arguments `given`."""
        return answer


def by_item(
    items: Sequence[Any], windows: Sequence[Window], rows: Sequence[Value]
) -> tuple[list[list[Window]], list[list[Value]]]:
    """The windows of each input, and what `rows` has for each of them."""
    own: list[list[Window]] = [[] for _ in items]
    values: list[list[Value]] = [[] for _ in items]
    for window, row in zip(windows, rows, strict=True):
        own[window.item].append(window)
        values[window.item].append(row)
    return own, values


def logits(output: Any, ids: Any) -> Any:
    return output.logits


def window_counts(windows: list[Window]) -> dict[str, int]:
    """The fields of an answer whose text needed several windows: their number, and that of tokens; else none."""
    if len(windows) == 1:
        return {}
    return {"windows": len(windows), "tokens": count_tokens(windows)}


def _characters(item: Any) -> int:
    if isinstance(item, str):
        return len(item)
    return sum(map(_characters, item.values() if isinstance(item, dict) else item)) if item else 0
