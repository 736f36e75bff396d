"""Labelled examples of each kind, and readers of their files. Errors are one line that names file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.inference import conll
from fastbert.inference.input_files import ROWS, Form, InputError, no_column
from fastbert.inference.records import read_rows
from fastbert.training.finetune.tag_schemes import to_bio

DataError = InputError  # a file or one of its lines is not an example of the task
_WORDS = conll.SUFFIXES | {suffix: kind for suffix, kind in ROWS.items() if kind != "csv"}  # no list in a csv's cell


@dataclass(frozen=True)
class Reading(Form):
    """How files are read, and the names of their columns (csv: names, or numbers from 1; JSON: keys).

    In addition to the formats of Form, "conll" and "squad" are allowed.
    """

    label_separator: str = ","  # between the labels in a cell, if an example has several
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    choices: tuple[str, ...] = ("choices",)  # one key of a list, or a column for each choice
    words: str = "words"
    tags: str = "tags"
    id: str = "id"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    anchor: str = "anchor"
    positive: str = "positive"
    negatives: tuple[str, ...] = ("negative",)  # each a text, or a list of them; also negative_1, negative_2 ...
    query: str = "query"
    document: str = "document"  # a text, or a list of them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.label_separator:
            raise ValueError("label_separator is empty; it must be at least one character")


@dataclass(frozen=True)
class Table:
    """Rows that are in memory, in place of a file; errors name where a row is from, or else `name[i]`."""

    name: str
    rows: list[dict[str, Any]]
    where: list[str] | None = None

    def __str__(self) -> str:
        return self.name


Source = Path | Table


@dataclass(frozen=True)
class TextExample:
    """A text or pair; its label is a name, a number, or a list of names."""

    where: str  # file:line
    text: str
    pair: str | None
    label: Any


@dataclass(frozen=True)
class WordsExample:
    """Words, each with its tag."""

    where: str
    words: list[str]
    tags: list[str]


@dataclass(frozen=True)
class Answer:
    text: str
    start: int  # in characters of the context


@dataclass(frozen=True)
class QuestionExample:
    """A question, its context and the answers in it; none if it has no answer."""

    where: str
    id: str
    question: str
    context: str
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class ChoiceExample:
    """A text and its possible continuations; `label` is the index, from 0, of the right one."""

    where: str
    text: str
    choices: list[str]
    label: int


def read_texts(path: Source, reading: Reading) -> list[TextExample]:
    """Texts and pairs with the name of a class."""
    return _labelled(path, reading, lambda row: row.name(reading.label))


def read_scores(path: Source, reading: Reading) -> list[TextExample]:
    """Texts and pairs with a number."""
    return _labelled(path, reading, lambda row: row.number(reading.label))


def read_label_lists(path: Source, reading: Reading) -> list[TextExample]:
    """Texts and pairs with any number of classes, or none."""
    return _labelled(path, reading, lambda row: row.names(reading.label, reading.label_separator))


def _labelled(path: Source, reading: Reading, label: Callable[[RowValues], Any]) -> list[TextExample]:
    pair = reading.pair
    columns = [reading.text] if pair is None else [reading.text, pair]
    return [
        TextExample(row.where, row.text(reading.text), None if pair is None else row.text(pair), label(row))
        for row in rows_of(path, reading, [*columns, reading.label])
    ]


def read_choices(path: Source, reading: Reading) -> list[ChoiceExample]:
    """Texts with several choices; all examples of a file have the same number of them."""
    examples: list[ChoiceExample] = []
    for row in rows_of(path, reading, [reading.text, *reading.choices, reading.label]):
        if len(reading.choices) == 1:
            choices = row.texts(reading.choices[0])
        else:
            choices = [row.text(column) for column in reading.choices]
        label = row.number(reading.label)
        if len(choices) < 2:
            raise DataError(f"{row.where}: {len(choices)} choices; there must be at least 2")
        if examples and len(choices) != len(examples[0].choices):
            raise DataError(f"{row.where}: {len(choices)} choices; {examples[0].where} has {len(examples[0].choices)}")
        if label not in range(len(choices)):
            raise DataError(f"{row.where}: label {label:g} is no number of a choice, 0 to {len(choices) - 1}")
        examples.append(ChoiceExample(row.where, row.text(reading.text), choices, int(label)))
    return examples


def read_words(path: Source, reading: Reading) -> list[WordsExample]:
    """Words with BIO tags, from CoNLL columns or lists; tags of another scheme are converted."""
    rows = rows_of(path, reading, [reading.words, reading.tags], _WORDS)
    examples = [WordsExample(row.where, row.texts(reading.words), row.texts(reading.tags)) for row in rows]
    tags = to_bio([example.tags for example in examples])
    examples = [WordsExample(e.where, e.words, converted) for e, converted in zip(examples, tags, strict=True)]
    for example in examples:
        _check_tags(example)
    return examples


def _check_tags(example: WordsExample) -> None:
    """Checks for one tag per word, each O, B-TYPE, or an I-TYPE that continues an entity of its type."""
    words, tags = example.words, example.tags
    if len(words) != len(tags):
        raise DataError(f"{example.where}: {len(words)} words and {len(tags)} tags; each word has one")
    if not words:
        raise DataError(f"{example.where}: no words")
    before = "O"
    for word, tag in zip(words, tags, strict=True):
        prefix, dash, kind = tag.partition("-")
        if tag != "O" and not (prefix in ("B", "I") and dash and kind):
            raise DataError(f"{example.where}: tag {tag!r} of {word!r}; tags are O, B-TYPE and I-TYPE")
        if prefix == "I" and before[2:] != kind:
            raise DataError(f"{example.where}: {tag} of {word!r} follows {before}; an entity begins with B-{kind}")
        before = tag


def read_questions(path: Source, reading: Reading) -> list[QuestionExample]:
    """Questions on contexts, from SQuAD 1.1 or 2.0 JSON, or from rows with the columns of Hugging Face's SQuAD."""
    examples = list(_questions(path, reading))
    seen: dict[str, str] = {}
    for example in examples:
        for answer in example.answers:
            found = example.context[answer.start : answer.start + len(answer.text)] if answer.start >= 0 else ""
            if not answer.text or found != answer.text:
                raise DataError(
                    f"{example.where}: question {example.id!r}: the answer {answer.text!r} is not in its context at "
                    f"character {answer.start}, where there is {found!r}"
                )
        if example.id in seen:
            raise DataError(f"{example.where}: question {example.id!r} is at {seen[example.id]}, too")
        seen[example.id] = example.where
    return examples


def _answer(text: Any, start: Any) -> Answer:
    if not isinstance(text, str) or type(start) is not int:
        raise TypeError
    return Answer(text, start)


def _questions(path: Source, reading: Reading) -> Iterator[QuestionExample]:
    names = [reading.id, reading.question, reading.context, reading.answers]
    for row in rows_of(path, reading, None, squad=names):  # an id may be missing
        value = row.value(reading.answers)
        try:
            texts, starts = value["text"], value["answer_start"]
            if not (isinstance(texts, list) and isinstance(starts, list)):
                raise TypeError
            answers = [_answer(text, start) for text, start in zip(texts, starts, strict=True)]
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{row.where}: {reading.answers} is {value!r}; it must be two lists, text and answer_start (of whole "
                "numbers)"
            ) from None
        id = str(row.values.get(reading.id, row.where))
        yield QuestionExample(row.where, id, row.text(reading.question), row.text(reading.context), answers)


@dataclass(frozen=True)
class RowValues:
    """A row's values by column; each method checks a value's type and returns it."""

    where: str
    values: dict[str, Any]

    def value(self, column: str) -> Any:
        if column not in self.values:
            raise DataError(f"{self.where}: {no_column(column, self.values)}")
        return self.values[column]

    def _typed(self, column: str, is_it: Callable[[Any], bool], what: str) -> Any:
        value = self.value(column)
        if not is_it(value):
            raise DataError(f"{self.where}: {column} is {value!r}; it must be {what}")
        return value

    def text(self, column: str) -> str:
        return self._typed(column, lambda value: isinstance(value, str) and bool(value.strip()), "a text, not empty")

    def texts(self, column: str) -> list[str]:
        is_list = lambda value: isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)  # noqa: E731
        return self._typed(column, is_list, "a list of texts, none of them empty")

    def name(self, column: str) -> str:
        """A class name from a string, an integer (1.0 is 1) or a boolean."""
        is_name = lambda v: _is_whole(v) or (isinstance(v, str | int) and bool(str(v).strip()))  # noqa: E731
        value = self._typed(column, is_name, "a name or a number")
        if _is_whole(value):
            value = int(value)
        return str(value).strip()

    def names(self, column: str, separator: str) -> list[str]:
        is_label = lambda v: isinstance(v, str | int)  # noqa: E731
        is_list = lambda v: isinstance(v, str) or (isinstance(v, list) and all(map(is_label, v)))  # noqa: E731
        value = self._typed(column, is_list, "a list of labels, names or numbers")
        parts = value.split(separator) if isinstance(value, str) else value
        return list(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))

    def number(self, column: str) -> float:
        value = self.value(column)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not abs(number) < float("inf"):
            raise DataError(f"{self.where}: {column} is {value!r}; it must be a number")
        return number

    def numbers(self, column: str) -> tuple[float, ...]:
        """One number, or a list of them."""
        value = self.value(column)
        parts = value if isinstance(value, list) else [value]
        return tuple(RowValues(self.where, {column: part}).number(column) for part in parts)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def rows_of(
    path: Source,
    reading: Reading,
    columns: Sequence[str] | None,
    formats: Mapping[str, str] = ROWS,
    squad: Sequence[str] = (),
) -> Iterator[RowValues]:
    """The rows of a file of one of the `formats`; or, where its columns are named, of SQuAD's."""
    if isinstance(path, Table):
        for i, values in enumerate(path.rows):
            yield RowValues(path.where[i] if path.where else f"{path.name}[{i}]", values)
        return
    kind = reading.format_of(path, formats, "--format")
    known = dict.fromkeys([*formats.values(), *(["squad"] if squad else [])])
    if kind not in known:
        raise DataError(f"{path}: the format is {kind}; this task reads {', '.join(known)}")
    if squad and kind in ("json", "squad"):
        kind, columns = "questions" if kind == "json" else kind, squad
    for row in read_rows(path, reading, kind, columns):
        where = f"{path}: row {row.line}" if kind == "parquet" else f"{path}:{row.line}"
        if row.problem is not None:
            raise DataError(f"{where}: {row.problem}")
        yield RowValues(where, row.values)
