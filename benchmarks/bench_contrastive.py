"""Training of embedders and rerankers on a CPU: trainers that people use, the same accelerated, and ours.

    python benchmarks/bench_contrastive.py
    python benchmarks/bench_contrastive.py --tasks peft setfit --rounds 3

Each trainer makes the same number of steps on the same questions and passages of SQuAD, from MiniLM, dropout on; each
run is a process of its own, and the runs take turns. The seconds are those of training: the trainer's tokenizing and
batching count, imports and loading do not. It needs `sentence-transformers[train]`, and `peft` and `setfit` for these
tasks. A trainer that cannot run is named with its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assets import fetch
from pairs_data import write_pairs

BATCH, RATE, MAX_LENGTH, NEGATIVES = 32, 5e-5, 256, 2


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def encoder_accelerated(model: Any) -> None:
    """Accelerates the transformers model inside one of sentence-transformers."""
    import fastbert

    fastbert.accelerate(model)


def st_arguments(kind: Any, folder: str) -> Any:
    return kind(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )


def embedding(model: str, data: Path, accelerated: bool, wrap: Callable[[Any], Any] = lambda model: model) -> float:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    made = SentenceTransformer(model, device="cpu")
    made = wrap(made)
    if accelerated:
        encoder_accelerated(made)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=made,
            args=st_arguments(SentenceTransformerTrainingArguments, folder),
            train_dataset=Dataset.from_list(rows_of(data / "train.jsonl")),
            loss=MultipleNegativesRankingLoss(made),
        )
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def peft(model: str, data: Path, accelerated: bool) -> float:
    from peft import LoraConfig, TaskType, get_peft_model

    def wrap(made: Any) -> Any:
        adapter = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=16, lora_dropout=0.1)
        made[0].model = get_peft_model(made[0].model, adapter)
        return made

    return embedding(model, data, accelerated, wrap)


def rerank(model: str, data: Path, accelerated: bool) -> float:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    made = CrossEncoder(model, num_labels=1, device="cpu", max_length=MAX_LENGTH)
    if accelerated:
        encoder_accelerated(made.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CrossEncoderTrainer(
            model=made,
            args=st_arguments(CrossEncoderTrainingArguments, folder),
            train_dataset=Dataset.from_list(graded(rows_of(data / "train.jsonl"))),
            loss=BinaryCrossEntropyLoss(made),
        )
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def graded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each question with its passage and the passages of the next ones."""
    found = []
    for i, row in enumerate(rows):
        found.append({"query": row["anchor"], "document": row["positive"], "label": 1.0})
        for k in range(1, NEGATIVES + 1):
            other = rows[(i + 7 * k) % len(rows)]["positive"]
            found.append({"query": row["anchor"], "document": other, "label": 0.0})
    return found


def setfit(model: str, data: Path, accelerated: bool) -> float:
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    made = SetFitModel.from_pretrained(model)
    if accelerated:
        encoder_accelerated(made.model_body)
    rows = rows_of(data / "train.jsonl")[:32]
    examples = [
        {"text": row[name], "label": label} for row in rows for label, name in enumerate(("anchor", "positive"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, batch_size=BATCH, num_epochs=1, max_steps=16, save_strategy="no", report_to="none"
        )
        trainer = Trainer(model=made, args=arguments, train_dataset=Dataset.from_list(examples))
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def ours(task: str) -> Callable[[str, Path, bool], float]:
    def run(model: str, data: Path, accelerated: bool) -> float:
        from fastbert.training.finetune.recipe import Recipe
        from fastbert.training.finetune.settings import FinetuneSettings
        from fastbert.training.finetune.trials import training_of

        with tempfile.TemporaryDirectory() as name:
            folder, source = Path(name), data / "train.jsonl"
            if task == "rerank":
                source = folder / "graded.jsonl"
                source.write_text("".join(json.dumps(row) + "\n" for row in graded(rows_of(data / "train.jsonl"))))
            start = time.perf_counter()
            batch = {"batch_size": BATCH} if task == "embedding" else {"batch_size": BATCH // (NEGATIVES + 1)}
            settings = FinetuneSettings(task=task, epochs=1, lr=RATE, max_length=MAX_LENGTH, **batch)
            recipe = Recipe.read(settings, model, {"train": source, "dev": source})
            training = training_of(recipe, recipe.fresh_model(model), folder / "out")
            training.due = lambda: (False, False, False)  # nothing but training is timed
            training.run()
            return time.perf_counter() - start

    return run


# What each task's trainers are called, and how one is run.
TASKS: dict[str, dict[str, tuple[Callable[[str, Path, bool], float], bool]]] = {
    "embedding": {
        "SentenceTransformerTrainer": (embedding, False),
        "SentenceTransformerTrainer, accelerated": (embedding, True),
        "fastbert finetune": (ours("embedding"), False),
    },
    "rerank": {
        "CrossEncoderTrainer": (rerank, False),
        "CrossEncoderTrainer, accelerated": (rerank, True),
        "fastbert finetune": (ours("rerank"), False),
    },
    "peft": {
        "SentenceTransformerTrainer and LoRA": (peft, False),
        "SentenceTransformerTrainer and LoRA, accelerated": (peft, True),
    },
    "setfit": {"SetFit": (setfit, False), "SetFit, accelerated": (setfit, True)},
}


def in_a_process(task: str, trainer: str, model: str, data: Path) -> float | str:
    """The seconds of training, or why there are none."""
    command = [sys.executable, __file__, "--one", task, trainer, "--model", model, "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return float(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=256, help="(default: 256)")
    parser.add_argument("--model", help="(default: the real MiniLM)")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="a file of JSON lines to append to")
    args = parser.parse_args()
    model = args.model or str(fetch("minilm"))
    if args.one:
        task, trainer = args.one
        run, accelerated = TASKS[task][trainer]
        print(run(model, args.data, accelerated))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(Path(folder), train=args.questions, dev=8)
        for task in args.tasks:
            seconds: dict[str, list[float]] = {trainer: [] for trainer in TASKS[task]}
            reasons: dict[str, str] = {}
            for _ in range(args.rounds):
                for trainer in TASKS[task]:
                    found = in_a_process(task, trainer, model, data)
                    if isinstance(found, str):
                        reasons[trainer] = found
                    else:
                        seconds[trainer].append(found)
            report(task, seconds, reasons, args.output)
    return 0


def report(task: str, seconds: dict[str, list[float]], reasons: dict[str, str], output: Path | None) -> None:
    """Prints a line for each trainer: median seconds, and how many times as fast as the first."""
    first = next(iter(seconds))
    base = statistics.median(seconds[first]) if seconds[first] else None
    print(f"\n{task}, MiniLM")
    for trainer, values in seconds.items():
        if not values:
            print(f"  {trainer:55} did not run: {reasons[trainer]}")
            continue
        middle = statistics.median(values)
        faster = base / middle if base else float("nan")
        print(f"  {trainer:55} {middle:8.1f} s  {faster:5.2f} times {first}")
        if output is not None:
            row = {"task": task, "trainer": trainer, "seconds": values, "times": faster}
            with open(output, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
