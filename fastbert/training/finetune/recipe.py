"""The recipe of a fine-tuning run: its settings, labels and data, read from files and made into tensors."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastbert.config import BertConfig
from fastbert.inference.batching import token_budget_batches
from fastbert.model import BertPreTrainedModel
from fastbert.model.outputs import ModelOutput
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.finetune.examples import DataError, Reading, Source, Table
from fastbert.training.finetune.features import Feature, plan_epoch
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.tasks import TASKS, Predictions, Task, class_counts
from fastbert.training.finetune.text_settings import TextSettings, check_loss, with_loss

EVALUATION_TOKENS = 8192  # per batch


@dataclass(frozen=True)
class Dataset:
    """Labelled examples, and their features."""

    path: Source
    examples: list
    features: list[Feature]

    @property
    def truncated(self) -> int:
        return sum(feature.truncated for feature in self.features)

    def unknown(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """The number of [UNK] tokens, and of all but [CLS], [SEP] and [PAD]."""
        special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
        ids = np.concatenate([ids for feature in self.features for ids, _ in feature.sequences])
        return int((ids == tokenizer.unk_token_id).sum()), int((~np.isin(ids, special)).sum())

    def digest(self) -> str:
        """A hash of the features, by which a resumed run checks its data."""
        digest = hashlib.sha256()
        for feature in self.features:
            for ids, types in feature.sequences:
                digest.update(ids.tobytes() + types.tobytes())
            digest.update(repr(feature.label).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a data set, including `loss`, and the prediction for each example."""

    scores: dict[str, float]
    predictions: Predictions


@dataclass(frozen=True)
class Recipe:
    """The data, labels and settings of a run; independent of the training framework."""

    settings: FinetuneSettings
    task: Task
    tokenizer: Tokenizer
    labels: list[str]
    train: Dataset
    dev: Dataset
    test: Dataset | None
    prompts: Mapping[str, str] = field(default_factory=dict)  # of a model that makes vectors, if not its folder's

    @classmethod
    def read(
        cls,
        settings: FinetuneSettings,
        model: str | Path,
        paths: Mapping[str, Source],  # train, dev and, where there is one, test
        reading: Reading | None = None,
        *,
        revision: str | None = None,
        labels: list[str] | None = None,
    ) -> Self:
        """Reads and encodes the data; fills in the settings that depend on data and model.

        The label set is that of the training data, or `labels`, those of a model that has some already.

        Raises:
            DataError: a file or line is wrong; names both.
            ValueError: the task is unknown, or a setting does not fit the task or the model.
        """
        task = task_of(settings)
        start = TextSettings.of(model, revision, settings)
        config = BertConfig.from_pretrained(start.folder, revision=start.revision)
        tokenizer = AutoTokenizer.from_pretrained(start.folder, revision=start.revision)
        tokenizer = tokenizer.with_prefix_space() if task.splits_words else tokenizer
        tokenizer = tokenizer.lower_cased() if start.lower_case else tokenizer
        most = config.max_length
        limit = min(tokenizer.model_max_length, most, task.max_length or most, start.max_length or most)
        if settings.max_length is not None and settings.max_length > most:
            raise ValueError(f"max_length is {settings.max_length}; the model takes {most} tokens")
        settings = replace(settings, max_length=settings.max_length or limit)
        examples = {name: read_examples(task, path, reading or Reading()) for name, path in paths.items()}
        if settings.no_answer is None:
            settings = replace(settings, no_answer=any(getattr(e, "answers", None) == [] for e in examples["train"]))
        prompts = {"query": settings.query_prompt, "document": settings.document_prompt}
        if task.losses:
            settings = with_loss(settings, examples["train"], start)
            for found in examples.values():
                check_loss(settings, task.losses, found)
        labels = _label_set(task.labels(examples["train"]), labels, paths["train"])
        _check_best(task, settings.best, labels, paths["dev"], examples["dev"])
        data = {
            name: Dataset(paths[name], found, task.encode(found, tokenizer, labels, settings))
            for name, found in examples.items()
        }
        given = {name: text for name, text in prompts.items() if text is not None}
        recipe = cls(settings, task, tokenizer, labels, data["train"], data["dev"], data.get("test"), given)
        if settings.epochs is None:
            settings = replace(settings, epochs=settings.default_epochs(len(recipe._epoch(0))))
        return replace(recipe, settings=settings)

    def fresh_model(self, path: str | Path, *, revision: str | None = None) -> BertPreTrainedModel:
        """The checkpoint in float32 with a head for the task, whose weights are seeded."""
        torch.manual_seed(self.settings.seed)
        if self.settings.of_vectors:
            own = {"dropout": self.settings.dropout, "max_length": self.settings.max_length}
            return self.task.model.from_pretrained(path, revision=revision, prompts=self.prompts, **own)
        config = BertConfig.from_pretrained(path, revision=revision)
        if self.task.problem_type is not None or self.labels:
            names = self.labels or ["LABEL_0"]
            config.id2label = dict(enumerate(names))
            config.label2id = {name: i for i, name in enumerate(names)}
            config.problem_type = self.task.problem_type
        else:
            config.num_labels = self.task.outputs
        if self.settings.dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = self.settings.dropout
            config.classifier_dropout = None  # as hidden_dropout_prob
        config.extra.pop("_name_or_path", None)  # names the original checkpoint
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="newly initialised")  # training follows
            return self.task.model.from_pretrained(
                path, config=config, dtype=torch.float32, revision=revision, ignore_mismatched_sizes="head"
            )

    def class_weights(self) -> Tensor | None:
        """With "balanced", a weight per class: N / (number of classes * its own count) (King and Zeng, 2001)."""
        if self.settings.class_weights == "none":
            return None
        counts = class_counts(self.train.features, len(self.labels))
        weights = counts.sum() / (len(self.labels) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32)

    def plan(self) -> list[list[list[list[int]]]]:
        """Indices of training features, nested by epoch, step and batch."""
        return [self._epoch(epoch) for epoch in range(self.settings.epochs or 0)]  # `read` has filled it in

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        settings = self.settings
        most, tokens = settings.batch_bounds
        batches = plan_epoch(
            [feature.length for feature in self.train.features],
            seed=settings.seed,
            epoch=epoch,
            order=settings.order,
            batch_size=most,
            tokens=tokens,
            classes=[feature.label for feature in self.train.features] if settings.loss == "supervised" else None,
        )
        if settings.of_vectors and len(batches) > 1 and len(batches[-1]) == 1:  # it would have nothing to compare with
            batches[-2] += batches.pop()
        return [batches[start : start + settings.accumulate] for start in range(0, len(batches), settings.accumulate)]

    def data(self) -> dict[str, dict[str, Any]]:
        """Each data set as the report has it: file, number of examples, hash."""
        sets = {"train": self.train, "dev": self.dev, "test": self.test}
        return {
            name: {"file": str(d.path), "examples": len(d.examples), "truncated": d.truncated, "hash": d.digest()}
            for name, d in sets.items()
            if d is not None
        }

    def decisive(self) -> dict[str, Any]:
        """The settings and data hashes that must be equal to resume a run."""
        data = {"training data": self.train.digest(), "dev data": self.dev.digest(), "labels": self.labels}
        return self.settings.decisive() | data

    def evaluate(self, data: Dataset, run: Callable[[list[Feature]], tuple[float, float, ModelOutput]]) -> Evaluation:
        """Loss, scores and predictions.

        Args:
            run: from a batch to its mean loss, the weight of this mean, and the model's output.
        """
        features = data.features
        logits: list[np.ndarray] = [np.empty(0)] * len(features)
        loss = total = 0.0
        for batch in token_budget_batches([feature.length for feature in features], EVALUATION_TOKENS):
            chosen = [features[i] for i in batch]
            part, weight, output = run(chosen)
            if weight:
                loss, total = loss + part * weight, total + weight
            for i, rows in zip(batch, self.task.logits(output, chosen), strict=True):
                logits[i] = rows
        predictions = self.task.decode(data.examples, features, logits, self.labels, self.settings)
        scores = {"loss": loss / max(total, 1e-9), **self.task.score(predictions, self.labels)}
        return Evaluation(scores, [_source(e) | p for e, p in zip(data.examples, predictions, strict=True)])


_TEXTS = ("text", "pair", "choices", "question", "texts", "query")


def _source(example: Any) -> dict[str, Any]:
    """The position of an example in its file, and those texts that it has."""
    texts = {name: getattr(example, name, None) for name in _TEXTS}
    line = example.where.rpartition(":")[2]
    where = int(line) if line.isdecimal() else example.where
    return {"line": where} | {name: text for name, text in texts.items() if text is not None}


def task_of(settings: FinetuneSettings) -> Task:
    """The task of the settings, after a check that they fit it."""
    if settings.task not in TASKS:
        raise ValueError(f"task is {settings.task!r}; it must be one of {', '.join(TASKS)}")
    task = TASKS[settings.task]
    if settings.loss is not None and settings.loss not in task.losses:
        known = f"{settings.task} has the losses {', '.join(task.losses)}" if task.losses else "the task has one loss"
        raise ValueError(f"loss is {settings.loss!r}; {known}")
    if settings.of_vectors and (settings.tokens is not None or settings.accumulate > 1):
        name = "accumulate" if settings.tokens is None else "tokens"
        raise ValueError(
            f"{name} is {getattr(settings, name)}; a step of {settings.task} is one batch of batch_size examples, "
            "computed mini_batch_tokens at a time"
        )
    if settings.class_weights != "none" and not task.weighable:
        raise ValueError(f"class_weights is {settings.class_weights!r}; {settings.task} has no classes to weigh")
    scores = (*task.scores, *task.two_class_scores)
    if settings.best not in (None, "loss", *scores):
        raise ValueError(f"best is {settings.best!r}; {settings.task} has the scores {', '.join(scores)} and loss")
    return task


def _check_best(task: Task, best: str | None, labels: list[str], path: Source, dev: list) -> None:
    """Checks that the score that selects the best checkpoint can be computed from these labels and dev examples."""
    if best not in task.two_class_scores:
        return
    if len(labels) != 2:
        raise ValueError(f"best is {best!r}, a score of two labels; there are {len(labels)}")
    if best == "auc" and len(found := {example.label for example in dev}) < 2:
        raise DataError(f"{path}: every label is {found.pop()!r}; best is 'auc', which takes examples of both labels")


def better(score: str, value: float) -> float:
    """The value of a score, with its sign such that higher is better."""
    return -value if score in ("loss", "mse", "mae") else value


def read_examples(task: Task, path: Source, reading: Reading) -> list:
    """The examples of a file, at least one."""
    examples = task.read(path, reading)
    if not examples:
        raise DataError(
            f"{path} holds no example" if isinstance(path, Table) else f"{path}:1: the file holds no example"
        )
    return examples


def _label_set(found: list[str], known: list[str] | None, path: Source) -> list[str]:
    """The labels of the training data; or the `known` ones, if they include these. A task may have none."""
    if known is None or not found:
        return found
    if unknown := [label for label in found if label not in known]:
        raise DataError(f"{path}: label {unknown[0]!r} is none of the model's {len(known)}: {', '.join(known[:20])}")
    return known
