"""The rows of files as inputs of a task, with all their columns."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from fastbert.inference import conll
from fastbert.inference.input_files import SUFFIXES, Form, RecordProblem, Row, no_column, open_parquet
from fastbert.inference.records import Record, Records, text_of


@dataclass(frozen=True)
class TaskReading(Form):
    """How files are read, and the names of their columns (csv: names, or numbers from 1; JSON: keys).

    Args:
        text, pair: of texts, and of the second text where there are pairs.
        words: a list of words, instead of `text`, to tag: of a JSON object, or a column of CoNLL.
        question, context: to answer questions.
        choices: one key of a list, or a column for each choice.
        allow_empty: whether a text may be empty.
    """

    text: str = "text"
    pair: str | None = None
    words: str = "words"
    question: str = "question"
    context: str = "context"
    choices: tuple[str, ...] = ("choices",)
    allow_empty: bool = False


class TaskRows(Records):
    """The rows of several inputs, in order: a Record has all values of its row, and the input of the task."""

    reading: TaskReading

    def __init__(self, inputs: list[str], reading: TaskReading, task: str) -> None:
        self._task = task
        super().__init__(inputs, reading)

    def _check(self, name: str, kind: str) -> None:
        if kind == "parquet":
            with open_parquet(name, self._needed({self.reading.words: None})):
                pass

    def _kind(self, name: str) -> str:
        if self._task == "token-classification":  # .txt and .tsv are lines of text
            return self.reading.format_of(name, conll.SUFFIXES | SUFFIXES)
        kind = super()._kind(name)
        return "questions" if self._task == "question-answering" and kind == "json" else kind

    def _columns(self, kind: str) -> list[str] | None:
        """The columns to read; None for all, under the names that the file has."""
        if kind == "conll":
            return [self.reading.words, conll.COLUMNS[1]]
        return [self.reading.text] if kind == "text" else None

    def _needed(self, values: dict[str, Any]) -> list[str]:
        return needed(self._task, self.reading, values)

    def _record(self, file: int, row: Row, kind: str) -> Record:
        if row.problem is not None:
            raise RecordProblem(row.problem)
        text, found = task_input(self._task, self.reading, row, kind)
        return Record(file, row.line, text, values=dict(row.values), input=found)


def needed(task: str, reading: TaskReading, values: Container[str]) -> list[str]:
    """The columns that the task's input is made of, in a row with the columns `values`."""
    if task == "question-answering":
        return [reading.question, reading.context]
    if task == "token-classification" and reading.words in values:
        return []
    pair = [reading.pair] if reading.pair is not None else []
    return [reading.text, *pair, *(reading.choices if task == "multiple-choice" else ())]


def task_input(task: str, reading: TaskReading, row: Row, kind: str) -> tuple[str, Any]:
    """The text of a row that counts, and the input of the task; `kind` is the format of the row's file.

    Raises:
        RecordProblem: a column is missing, or has no text where there must be one.
    """
    values = dict(row.values)
    by_number = {str(i): value for i, value in enumerate(values.values(), start=1)} if kind == "csv" else {}
    named = by_number | values
    for name in needed(task, reading, named):
        if name not in named:
            raise RecordProblem(f"has {no_column(name, values)}")

    def text(name: str) -> str:
        return text_of(Row(row.line, named), name, kind, allow_empty=reading.allow_empty)

    if task == "question-answering":
        found: Any = {"question": text(reading.question), "context": text(reading.context)}
        return found["context"], found
    if task == "token-classification" and reading.words in named:
        words = named[reading.words]
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
            raise RecordProblem(f"has {words!r:.80} for words in {reading.words!r}, not a list of texts")
        return " ".join(words), words
    main = text(reading.text)
    if task == "multiple-choice":
        choices = [named[name] for name in reading.choices]
        choices = choices[0] if len(choices) == 1 else choices
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise RecordProblem(f"has {choices!r:.80} for choices, not a list of two texts or more")
        return main, {"text": main, "choices": choices}
    return main, main if reading.pair is None else (main, text(reading.pair))
