"""question-answering: the part of a context that answers a question, as transformers' pipeline before 5.3."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.inference.windows import Window, shortened
from fastbert.tasks.base import Pipeline, window_counts
from fastbert.tasks.text_classification import apply


@dataclass(frozen=True)
class QuestionSettings:
    """Settings of a call. A context is never cut: its windows are `max_seq_len` long.

    Args:
        top_k: how many answers, best first; with 1, the answer is not in a list.
        doc_stride: tokens that two windows of a context share (default: 128, or half of max_seq_len if that is less).
        max_answer_len: most tokens of an answer.
        max_seq_len: most tokens of question and window (default: 384, or what the model takes if that is less).
        max_question_len: tokens a question is cut to (default: it is not cut).
        handle_impossible_answer: whether "" may be an answer, with the least score of [CLS] over the windows.
        align_to_words: whether an answer ends where words do.

    Raises:
        ValueError: a number below 1.
    """

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    max_question_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True

    def __post_init__(self) -> None:
        for name in ("top_k", "max_answer_len", "max_question_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


class QuestionAnswering(Pipeline):
    """{question, context} to {score, start, end, answer}; start and end are code points of the context."""

    task = "question-answering"
    settings_class = QuestionSettings

    def __call__(self, *inputs: Any, question: Any = None, context: Any = None, **given: Any) -> Any:
        """The answer to a question, or a list of them.

        Args:
            inputs: a dict with `question` and `context`, or several, or a list of them.
            question, context: texts, or lists of equal length; one context may serve several questions.

        Raises:
            ValueError: both are missing, lists of unlike length, or an empty question or context.
        """
        for name in ("data", "X"):
            inputs = (*inputs, given.pop(name)) if name in given else inputs
        if question is not None or context is not None:
            items, single = _paired(question, context)
        else:
            given_items = list(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], list | tuple) else list(inputs)
            items, single = given_items, len(inputs) == 1 and not isinstance(inputs[0], list | tuple)
            if not items:
                raise ValueError("no question is given: question=..., context=..., or a dict of both")
        answers = list(self.stream(items, self.settings(**given)))
        return answers[0] if single or len(answers) == 1 else answers

    def check(self, item: Any, where: int) -> dict[str, str]:
        values = item if isinstance(item, dict) else vars(item) if hasattr(item, "__dict__") else {}
        question = values.get("question", values.get("question_text"))
        context = values.get("context", values.get("context_text"))
        if not isinstance(question, str) or not isinstance(context, str):
            raise TypeError(f"inputs[{where}] is {item!r:.80}; it must have a question and a context, both str")
        for name, text in (("question", question), ("context", context)):
            if not text.strip():
                raise ValueError(f"inputs[{where}]: the {name} is empty")
        return {"question": question, "context": context}

    def prepare(self, items: list[Any], settings: Any) -> list[Window]:
        longest = min(384, self.runner.max_length) if settings.max_seq_len is None else settings.max_seq_len
        stride = min(128, longest // 2) if settings.doc_stride is None else settings.doc_stride
        if stride > longest:
            raise ValueError(f"doc_stride is {stride}; it must be at most max_seq_len, {longest}")
        questions, most = [item["question"] for item in items], settings.max_question_len
        if most is not None:
            questions = [shortened(question, self.tokenizer, most) for question in questions]
        pairs = list(zip(questions, (item["context"] for item in items), strict=True))
        room = longest - self.tokenizer.num_special_tokens_to_add(True) - stride
        for (question, _), item in zip(pairs, items, strict=True):
            if len(question) >= room and (count := len(self.tokenizer.encode_plain([question])[0])) >= room:
                raise ValueError(
                    f"the question {item['question']!r:.60} has {count} tokens, which leave no room for windows of its "
                    f"context: max_seq_len is {longest}, doc_stride {stride}; max_question_len can cut it"
                )
        return self.runner.windows(pairs, max_length=longest, overlap=stride, longer="only_second")

    def run(self, windows: list[Window]) -> list[np.ndarray]:
        return self.runner.run(windows, _start_and_end, rows=len)

    def answer(self, item: dict[str, str], windows: list[Window], rows: list[np.ndarray], settings: Any) -> Any:
        answers: dict[str, dict[str, Any]] = {}  # by text: an answer that windows share, or tokens, is one
        nothing = 1e6
        spans = settings.top_k * 2 + 10 if settings.align_to_words else settings.top_k
        for window, logits in zip(windows, rows, strict=True):
            found, empty = self._spans(window.encoding, logits, spans, settings)
            nothing = min(nothing, empty)
            for score, first, last in found:
                start, end = self._characters(window.encoding, first, last, settings.align_to_words)
                text = item["context"][start:end]
                if (known := answers.get(text.lower())) is not None:
                    known["score"] += score
                else:
                    answers[text.lower()] = {"score": score, "start": start, "end": end, "answer": text}
        ranked = list(answers.values())
        if settings.handle_impossible_answer:
            ranked.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        ranked = sorted(ranked, key=lambda answer: answer["score"], reverse=True)[: settings.top_k]
        ranked = [answer | window_counts(windows) for answer in ranked]
        return ranked[0] if len(ranked) == 1 else ranked

    def _spans(
        self, encoding: Any, logits: np.ndarray, count: int, settings: Any
    ) -> tuple[list[tuple[float, int, int]], float]:
        """(score, first token, last token) of the best spans of a window, best first; and the score of no answer."""
        allowed = np.array([part == 1 for part in encoding.sequence_ids])
        cls = np.array(encoding.ids) == self.tokenizer.cls_token_id
        allowed |= cls
        start, end = (apply("softmax", np.where(allowed, column, np.float32(-10000.0))) for column in logits.T)
        nothing = float(start[0] * end[0])
        start[0] = end[0] = 0.0
        # The band of spans of at most max_answer_len tokens: row i, column j is the span i .. i + j.
        width = min(settings.max_answer_len, len(end))
        ends = np.lib.stride_tricks.sliding_window_view(np.concatenate([end, np.zeros(width - 1, end.dtype)]), width)
        scores = (start[:, None] * ends).ravel()
        if count < len(scores):
            best = np.argpartition(-scores, count)[:count]
            best = best[np.argsort(-scores[best], kind="stable")]
        else:
            best = np.argsort(-scores, kind="stable")
        spans = [(float(scores[i]), int(i) // width, int(i) // width + int(i) % width) for i in best]
        return [(s, a, b) for s, a, b in spans if b < len(end) and allowed[a] and allowed[b]], nothing

    def _characters(self, encoding: Any, first: int, last: int, whole_words: bool) -> tuple[int, int]:
        if whole_words:
            words = encoding.token_to_word(first), encoding.token_to_word(last)
            if None not in words:
                ends = [encoding.word_to_chars(word, 1) for word in words]
                if None not in ends:
                    return ends[0][0], ends[1][1]
        return encoding.offsets[first][0], encoding.offsets[last][1]


def _start_and_end(output: Any, ids: Any) -> Any:
    import torch

    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def _paired(question: Any, context: Any) -> tuple[list[dict[str, Any]], bool]:
    """Questions with their contexts, and whether there is a single one that came in no list."""
    if question is None or context is None:
        missing = "question" if question is None else "context"
        raise ValueError(f"{missing} is missing; a question needs its context")
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}], True
    questions, contexts = (_texts(name, x) for name, x in (("question", question), ("context", context)))
    questions = questions * len(contexts) if len(questions) == 1 else questions
    contexts = contexts * len(questions) if len(contexts) == 1 else contexts
    if len(questions) != len(contexts):
        raise ValueError(f"question has {len(questions)} texts, context {len(contexts)}; they must be as many")
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)], False


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a str or a list of them")
    return list(value)
