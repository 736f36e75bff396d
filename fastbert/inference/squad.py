"""Questions of SQuAD's JSON, of version 1.1 or 2.0."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastbert.inference.input_files import InputError, RecordProblem, Row, json_object

COLUMNS = ("id", "question", "context", "answers")  # of a row, as Hugging Face's SQuAD has them


def read_questions(name: str, text: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """A row for each question. Its answers, if the file has them, are {"text": [...], "answer_start": [...]}.

    Args:
        name: the file's, for errors.
        columns: what a row calls COLUMNS.

    Raises:
        InputError: the text is no JSON, or not SQuAD's.
    """
    try:
        articles = json.loads(text)["data"]
        questions = [(p["context"], question) for a in articles for p in a["paragraphs"] for question in p["qas"]]
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}: is not JSON: {error.msg}") from None
    except KeyError as error:
        raise InputError(f"{name}:1: is not SQuAD's JSON: no {error} where it should be") from None
    except TypeError:
        raise InputError(f"{name}:1: is not SQuAD's JSON: data, paragraphs and qas must be lists of objects") from None
    names = dict(zip(COLUMNS, columns or COLUMNS, strict=True))
    place, line, escapes = 0, 1, "\\u" in text
    for context, question in questions:
        id = json.dumps(question.get("id") if isinstance(question, dict) else None)
        if (found := text.find(id, place)) >= 0:
            line, place = line + text.count("\n", place, found), found
        try:
            values = _values({**json_object(question, escapes=escapes), "context": context})
        except RecordProblem as problem:
            yield Row(line, {}, str(problem))
        else:
            yield Row(line, {names[column]: value for column, value in values.items()})


def _values(question: dict[str, Any]) -> dict[str, Any]:
    """The values of COLUMNS, but for those that a question does not have.

    Raises:
        RecordProblem: its answers are of another form.
    """
    found = {name: question[name] for name in COLUMNS if name in question}
    if question.get("is_impossible"):
        return found | {"answers": {"text": [], "answer_start": []}}
    if "answers" in found:
        id, answers = question.get("id"), found["answers"]
        try:
            texts, starts = [answer["text"] for answer in answers], [answer["answer_start"] for answer in answers]
            is_right = all(isinstance(text, str) for text in texts) and all(type(start) is int for start in starts)
        except KeyError as error:
            raise RecordProblem(f"has a question {id!r} with an answer that has no {error}") from None
        except TypeError:
            is_right = False
        if not is_right:
            raise RecordProblem(
                f"has a question {id!r} with the answers {answers!r}; they must be a list of objects, each with a text "
                "and a whole number answer_start"
            )
        found["answers"] = {"text": texts, "answer_start": starts}
    return found
