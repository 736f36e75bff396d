"""The rules of transformers' question-answering pipeline before 5.3, and the scores of SQuAD's own script."""

from __future__ import annotations

import re
import string
from collections import Counter

import torch
import transformers


class Reference:
    """The rules, a window at a time, over transformers' model and tokenizer.

    `is_close` says of the last call that which spans were tried was a matter of rounding.
    """

    def __init__(self, folder):
        self.model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def __call__(
        self,
        question,
        context,
        top_k=1,
        doc_stride=None,
        max_answer_len=15,
        max_seq_len=None,
        handle_impossible_answer=False,
        align_to_words=True,
    ):
        max_seq_len = max_seq_len or min(self.tokenizer.model_max_length, 384)
        batch = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_seq_len,
            stride=min(max_seq_len // 2, 128) if doc_stride is None else doc_stride,
            return_overflowing_tokens=True,
        )
        answers, no_answer, self.is_close = [], 1e6, False
        for row, ids in enumerate(batch["input_ids"]):
            inputs = {n: torch.tensor([batch[n][row]]) for n in batch if n != "overflow_to_sample_mapping"}
            with torch.no_grad():
                output = self.model(**inputs)
            encoding = batch.encodings[row]
            may = [
                part == 1 or i == self.tokenizer.cls_token_id
                for part, i in zip(encoding.sequence_ids, ids, strict=True)
            ]
            start, end = (
                logits[0].masked_fill(~torch.tensor(may), -1e4).softmax(-1).numpy().copy()
                for logits in (output.start_logits, output.end_logits)
            )
            no_answer = min(no_answer, float(start[0] * end[0]))
            start[0] = end[0] = 0
            spans = {
                (i, j): float(start[i] * end[j])
                for i in range(len(ids))
                for j in range(len(ids))
                if 0 <= j - i < max_answer_len
            }
            ranked = sorted(spans, key=lambda span: -spans[span])
            tried, others = ranked[: (count := 2 * top_k + 10 if align_to_words else top_k)], ranked[count:]
            if others and spans[tried[-1]] - spans[others[0]] <= 1e-5 * spans[tried[-1]]:
                self.is_close = True
            for i, j in tried:
                if not (may[i] and may[j]):
                    continue
                first, last = encoding.offsets[i][0], encoding.offsets[j][1]
                words = [encoding.token_to_word(token) for token in (i, j)]
                if align_to_words and None not in words:
                    first, last = encoding.word_to_chars(words[0], 1)[0], encoding.word_to_chars(words[1], 1)[1]
                text = context[first:last]
                known = [a for a in answers if a["answer"].lower() == text.lower()]
                if known:
                    known[0]["score"] += spans[i, j]
                else:
                    answers.append({"score": spans[i, j], "start": first, "end": last, "answer": text})
        if handle_impossible_answer:
            answers.append({"score": no_answer, "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda a: -a["score"])[:top_k]
        return answers[0] if len(answers) == 1 else answers


def plain(text):
    """As SQuAD's script compares answers: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match_and_f1(predicted, golds):
    """Both in percent, the means over questions of the best over each question's answers."""

    def f1(a, b):
        a, b = plain(a).split(), plain(b).split()
        same = sum((Counter(a) & Counter(b)).values())
        return 2 * same / (len(a) + len(b)) if same else 0.0

    pairs = list(zip(predicted, golds, strict=True))
    exact = sum(max(plain(p) == plain(g) for g in gold) for p, gold in pairs)
    return 100 * exact / len(pairs), 100 * sum(max(f1(p, g) for g in gold) for p, gold in pairs) / len(pairs)
