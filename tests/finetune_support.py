"""Small made-up data for each fine-tuning task, with a tiny random model: 20 examples can be learned by heart."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

import fastbert
from fastbert.training.finetune.examples import Reading
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.recipe import Recipe
from fastbert.training.finetune.settings import VECTOR_TASKS, FinetuneSettings
from fastbert.training.finetune.trials import training_of

NAMES = ["anna", "bob", "carl", "dora", "emma", "fritz", "gina", "hugo"]
PLACES = ["rome", "oslo", "lima", "bonn", "kyoto", "cairo", "quito", "seoul"]
VERBS = ["saw", "left", "loves", "hates", "found", "lost"]
OTHERS = [
    "where",
    "is",
    "in",
    "and",
    "who",
    "?",
    ".",
    ",",
    "today",
    "the",
    "a",
    "of",
    "##s",
    "##a",
    "##b",
    "caf",
    "##e",
]
CJK = list("東京都大阪")
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, *PLACES, *VERBS, *OTHERS, *CJK]
SIZES = {
    "vocab_size": len(VOCAB),
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}
N = 20


def save_model(folder: Path, **sizes) -> Path:
    torch.manual_seed(0)
    fastbert.BertModel(fastbert.BertConfig(**{**SIZES, **sizes})).save_pretrained(folder)
    fastbert.BertTokenizer(VOCAB, model_max_length=64).save_pretrained(folder)
    return folder


def sentence(i: int) -> list[str]:
    """A different one for each number."""
    return [NAMES[i % 8], VERBS[i % 6], PLACES[(i // 3) % 8], *(["today"] * (i % 3))]


def write(folder: Path, task: str, name: str = "data", n: int = N) -> Path:
    """`n` examples of the task, in the file that is usual for it."""
    rows = range(n)
    if task == "classification":
        return write_csv(folder / f"{name}.csv", [(" ".join(sentence(i)), "abc"[i % 3]) for i in rows])
    if task == "multi-label":
        labels = lambda i: [label for bit, label in enumerate("xyz") if i >> bit & 1]  # noqa: E731
        return write_jsonl(
            folder / f"{name}.jsonl", [{"text": " ".join(sentence(i)), "label": labels(i)} for i in rows]
        )
    if task == "regression":
        rows = [(" ".join(sentence(i)), " ".join(sentence(i + 5)), f"{i * 7 % n / n:.3f}") for i in rows]
        return write_csv(folder / f"{name}.tsv", rows, header=("text", "second", "label"), delimiter="\t")
    if task == "token-classification":
        blocks = []
        for i in rows:
            name_, verb, place, *rest = sentence(i)
            tags = [(name_, "B-PER"), (f"{name_}ab", "I-PER"), (verb, "O"), (place, "B-LOC"), *((w, "O") for w in rest)]
            blocks.append("".join(f"{word} x {tag}\n" for word, tag in tags))
        path = folder / f"{name}.conll"
        path.write_text("-DOCSTART- -X- O\n\n" + "\n".join(blocks), encoding="utf-8")
        return path
    if task == "question-answering":
        return write_squad(folder / f"{name}.json", [question(i) for i in rows])
    if task in ("embedding", "sparse-embedding", "rerank"):
        other = lambda i: f"{PLACES[i // 3 % 8]} {NAMES[i % 8]} {VERBS[i % 6]}"  # noqa: E731
        triplet = lambda i: {"anchor": " ".join(sentence(i)), "positive": other(i), "negative": other(i + 5)}  # noqa: E731
        return write_jsonl(folder / f"{name}.jsonl", map(triplet, rows))
    choices = lambda i: [PLACES[(i + k) % 8] for k in range(3)]  # noqa: E731
    return write_jsonl(
        folder / f"{name}.jsonl",
        [{"text": " ".join(sentence(i)), "choices": choices(i), "label": i * 5 % 3} for i in rows],
    )


def question(i: int) -> dict:
    """Whom, or where: the answer stands somewhere in four sentences; every fifth has none."""
    parts = [" ".join(sentence(i + k * 3)) + "." for k in range(4)]
    context = " ".join(parts)
    answer = sentence(i + 3)[2 * (i % 2)]
    start = len(parts[0]) + 1 + parts[1].index(answer)
    answers = [] if i % 5 == 4 else [{"text": answer, "answer_start": start}]
    asked = f"{'where' if i % 2 else 'who'} is {VERBS[(i + 3) % 6]} {NAMES[i % 8]}?"
    return {"id": f"q{i}", "question": asked, "context": context, "answers": answers, "is_impossible": not answers}


def write_csv(path: Path, rows, header=("text", "label"), delimiter=",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_squad(path: Path, questions) -> Path:
    paragraphs = [{"context": q["context"], "qas": [{k: v for k, v in q.items() if k != "context"}]} for q in questions]
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}, indent=1))
    return path


READING = {"regression": Reading(pair="second")}
QUICK = {"epochs": 40, "tokens": 128, "lr": 2e-3, "stride": 4, "max_question": 8, "evaluate_every": 1000}


def make_recipe(folder: Path, task: str, model: Path | None = None, **settings) -> Recipe:
    """On the same examples for training and dev."""
    model = model or save_model(folder / "model")
    data = write(folder, task)
    own = {"tokens": None} if "batch_size" in settings or task in VECTOR_TASKS else {}
    own |= {"batch_size": 10, "lr": 5e-4} if task in VECTOR_TASKS else {}
    return Recipe.read(
        FinetuneSettings(task=task, **{**QUICK, **own, **settings}),
        model,
        {"train": data, "dev": data},
        READING.get(task),
    )


def make_run(folder: Path, task: str, **settings) -> Finetuning:
    """As the command makes it, in `folder`/out."""
    recipe = make_recipe(folder, task, **settings)
    return training_of(recipe, recipe.fresh_model(folder / "model"), folder / "out")
