"""Labelled examples of each kind, and the files they come in; whatever is wrong is one line with file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "squad"}
_LONGEST_FIELD = 1 << 24  # characters


class DataError(ValueError):
    """A file, or a line of it, that is no example of the task; the message says where and why."""


@dataclass(frozen=True)
class Reading:
    """How files are read: their format, and which columns hold what (csv: names, or numbers from 1; JSON: keys)."""

    format: str = "auto"  # csv, jsonl, conll or squad; auto goes by the suffix
    delimiter: str | None = None  # None: a tab for .tsv, else a comma
    header: bool = True
    quoted: bool = True
    label_separator: str = ","  # between the labels of a cell, where an example has several
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

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ValueError(f"delimiter is {self.delimiter!r}; it must be one character, no quote or line end")
        if not self.label_separator:
            raise ValueError("label_separator is empty; it must be at least one character")


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
    """A question, and where its context answers it; no answer where it does not."""

    where: str
    id: str
    question: str
    context: str
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class ChoiceExample:
    """A text and what may follow it; `label` is the number, from 0, of the right one."""

    where: str
    text: str
    choices: list[str]
    label: int


def read_texts(path: Path, reading: Reading) -> list[TextExample]:
    """Texts and pairs with the name of a class."""
    return [
        TextExample(row.where, row.text(reading.text), row.optional_text(reading.pair), row.name(reading.label))
        for row in _rows(path, reading)
    ]


def read_scores(path: Path, reading: Reading) -> list[TextExample]:
    """Texts and pairs with a number."""
    return [
        TextExample(row.where, row.text(reading.text), row.optional_text(reading.pair), row.number(reading.label))
        for row in _rows(path, reading)
    ]


def read_label_lists(path: Path, reading: Reading) -> list[TextExample]:
    """Texts and pairs with any number of classes, none among them."""
    return [
        TextExample(
            row.where,
            row.text(reading.text),
            row.optional_text(reading.pair),
            row.names(reading.label, reading.label_separator),
        )
        for row in _rows(path, reading)
    ]


def read_choices(path: Path, reading: Reading) -> list[ChoiceExample]:
    """Texts with several choices; all examples of a file have the same number of them."""
    examples: list[ChoiceExample] = []
    for row in _rows(path, reading):
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


def read_words(path: Path, reading: Reading) -> list[WordsExample]:
    """Words with BIO tags, from CoNLL columns (the word first, its tag last) or jsonl lists."""
    if _format(path, reading, otherwise="conll") == "conll":
        examples = list(_conll_sentences(path))
    else:
        examples = [WordsExample(r.where, r.texts(reading.words), r.texts(reading.tags)) for r in _rows(path, reading)]
    for example in examples:
        _check_tags(example)
    return examples


def _conll_sentences(path: Path) -> Iterator[WordsExample]:
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in enumerate([*_lines(path), ""], start=1):
        columns = _conll_columns(line)
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: one column, {columns[0]!r}; there must be a word and its tag")
            start = start if words else number
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield WordsExample(f"{path}:{start}", words, tags)
            words, tags = [], []


def _conll_columns(line: str) -> list[str]:
    """The columns of a line; where there are tabs, they alone part columns, and a word may hold blanks."""
    if "\t" not in line.strip():
        return line.split()
    return [column.strip() for column in line.strip().split("\t")]


def _check_tags(example: WordsExample) -> None:
    """As many tags as words, each O, B-TYPE, or an I-TYPE that goes on with its type's entity."""
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


def read_questions(path: Path, reading: Reading) -> list[QuestionExample]:
    """Questions on contexts, from SQuAD's JSON, 1.1 or 2.0, or jsonl with the columns of Hugging Face's."""
    read = _squad if _format(path, reading, otherwise="squad") == "squad" else _question_rows
    examples = list(read(path, reading))
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


def _squad(path: Path, reading: Reading) -> Iterator[QuestionExample]:
    text = "\n".join(_lines(path))
    try:
        articles = json.loads(text)["data"]
        questions = [(p["context"], question) for a in articles for p in a["paragraphs"] for question in p["qas"]]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
    except KeyError as error:
        raise DataError(f"{path}:1: is not SQuAD's JSON: no {error} where it should be") from None
    except TypeError:
        raise DataError(f"{path}:1: is not SQuAD's JSON: data, paragraphs and qas must be lists of objects") from None
    place = line = 0
    for context, question in questions:
        if not isinstance(question, dict):
            raise DataError(f"{path}:{line + 1}: a question is {question!r}; it must be an object")
        id = str(question.get("id"))
        if (found := text.find(json.dumps(id), place)) >= 0:
            line, place = line + text.count("\n", place, found), found
        row = _Row(f"{path}:{line + 1}", {**question, "context": context})
        if "\\u" in text:
            _check_characters(row.where, row.values)
        try:
            answers = [] if question.get("is_impossible") else question["answers"]
            answers = [_answer(answer["text"], answer["answer_start"]) for answer in answers]
        except KeyError as error:
            raise DataError(f"{row.where}: question {id!r} has no {error}") from None
        except TypeError:
            raise DataError(
                f"{row.where}: question {id!r}: answers is {question['answers']!r}; it must be a list of objects, each "
                "with a text and a whole number answer_start"
            ) from None
        yield QuestionExample(row.where, id, row.text("question"), row.text("context"), answers)


def _answer(text: Any, start: Any) -> Answer:
    if not isinstance(text, str) or type(start) is not int:
        raise TypeError
    return Answer(text, start)


def _question_rows(path: Path, reading: Reading) -> Iterator[QuestionExample]:
    for row in _rows(path, reading):
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
class _Row:
    """A line of csv or jsonl, its values by column; each method returns one as what it must be."""

    where: str
    values: dict[str, Any]

    def value(self, column: str) -> Any:
        if column not in self.values:
            raise DataError(f"{self.where}: no column {column!r}; there are {', '.join(map(repr, self.values))}")
        return self.values[column]

    def _typed(self, column: str, is_it: Callable[[Any], bool], what: str) -> Any:
        value = self.value(column)
        if not is_it(value):
            raise DataError(f"{self.where}: {column} is {value!r}; it must be {what}")
        return value

    def text(self, column: str) -> str:
        return self._typed(column, lambda value: isinstance(value, str) and bool(value.strip()), "a text, not empty")

    def optional_text(self, column: str | None) -> str | None:
        return None if column is None else self.text(column)

    def texts(self, column: str) -> list[str]:
        is_list = lambda value: isinstance(value, list) and all(isinstance(v, str) and v for v in value)  # noqa: E731
        return self._typed(column, is_list, "a list of texts")

    def name(self, column: str) -> str:
        """A class: a string, or a whole number (1.0 is 1) or a truth value that stands for one."""
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _rows(path: Path, reading: Reading) -> Iterator[_Row]:
    kind = _format(path, reading, otherwise="csv")
    if kind not in ("csv", "jsonl"):
        raise DataError(f"{path}: the format is {kind}; this task reads csv and jsonl")
    return _csv_rows(path, reading) if kind == "csv" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise DataError(f"{where}: is empty")
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: holds a JSON {type(values).__name__}, not an object")
        if "\\u" in line:
            _check_characters(where, values)
        yield _Row(where, values)


def _check_characters(where: str, values: dict[str, Any]) -> None:
    """Escapes can spell half a surrogate pair, which a Python string holds and no report's UTF-8."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: has half a surrogate pair, which is no character") from None


def _csv_rows(path: Path, reading: Reading) -> Iterator[_Row]:
    """Each line's fields by their column's name and number; a number wins where it is no name."""
    csv.field_size_limit(_LONGEST_FIELD)
    lines = (line + "\n" for line in _lines(path))
    rows = csv.reader(
        lines,
        delimiter=reading.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ","),
        quoting=csv.QUOTE_MINIMAL if reading.quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names: Sequence[str] | None = None
    start = 1
    try:
        for fields in rows:
            where, start = f"{path}:{start}", rows.line_num + 1
            if names is None and reading.header:
                names = [name.strip() for name in fields]
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise DataError(f"{where}: the header line names {twice[0]!r} twice")
                continue
            if not fields:
                continue
            if names is not None and len(fields) != len(names):
                raise DataError(f"{where}: {len(fields)} fields; the header line names {len(names)}")
            numbered = {str(i): value for i, value in enumerate(fields, start=1)}
            yield _Row(where, numbered if names is None else numbered | dict(zip(names, fields, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: is no csv: {error}") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: is not UTF-8 (byte {raw[error.start]:#04x})") from None
            yield line.removesuffix("\n").removesuffix("\r")


def _format(path: Path, reading: Reading, *, otherwise: str) -> str:
    return FORMATS.get(path.suffix.lower(), otherwise) if reading.format == "auto" else reading.format
