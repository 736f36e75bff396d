"""Fine-tuning: the recipe of a run, from files to tensors, and the training loop on it."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.checkpoint.hub import resolve_file, resolve_folder
from fastbert.checkpoint.json_files import read_json
from fastbert.config import BertConfig
from fastbert.inference.batching import token_budget_batches
from fastbert.inference.sentence_settings import prompt_named, read_settings
from fastbert.model import BertPreTrainedModel
from fastbert.model.outputs import ModelOutput
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.distributed import Processes
from fastbert.training.finetune.examples import DataError, Reading, Source, Table
from fastbert.training.finetune.features import Feature, plan_epoch
from fastbert.training.finetune.layers import freeze, layer_groups
from fastbert.training.finetune.pair_examples import VectorExample
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.tasks import TASKS, Predictions, Task, class_counts, loss_of, single_label
from fastbert.training.loop import Trainer
from fastbert.training.objective import Counts
from fastbert.training.training_state import read_state
from fastbert.training.vectors.losses import LOSSES, USUAL
from fastbert.training.vectors.model import SETTINGS, TRANSFORMER

EVALUATION_TOKENS = 8192  # per batch
NOT_THE_MODELS = ("grades", "sizes")  # arguments that a loss reads, and the model does not
LOGGED = 50  # least number of log lines of a run, if it has as many steps
LOG_EVERY = 20  # most steps between log lines


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
class TextSettings:
    """What a model's sentence-transformers files say about its texts; None and empty without them."""

    folder: str | Path  # of the encoder
    revision: str | None = None
    max_length: int | None = None
    lower_case: bool = False
    include_prompt: bool = True
    prompt: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path, revision: str | None, task: str) -> Self:
        """Of a folder or hub id, as a task of vectors reads it."""
        if task == "sparse-embedding":
            found = {name: _optional(path, name, revision) for name in (TRANSFORMER, SETTINGS)}
            longest = found[TRANSFORMER].get("max_seq_length")
            return cls(path, revision, longest, prompts=found[SETTINGS].get("prompts") or {})
        return cls._of_sentences(path, revision)

    @classmethod
    def _of_sentences(cls, path: str | Path, revision: str | None) -> Self:
        found = read_settings(path, None, None, revision)
        folder: str | Path = path
        if found.transformer and found.modules_file is not None:
            folder = resolve_folder(path, found.transformer, revision=revision, named_by=found.modules_file)
            revision = None
        how = (found.max_length, found.lower_case, found.include_prompt, found.prompt, found.prompts)
        return cls(folder, revision, *how)

    def prompt_for(self, *names: str) -> str:
        return prompt_named(self.prompts, self.prompt, *names)


def _optional(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON object of a model's folder, empty where there is none."""
    file = resolve_file(path, name, revision=revision, required=False)
    return {} if file is None else read_json(file)


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
        start = (
            TextSettings.of(model, revision, settings.task) if settings.of_vectors else TextSettings(model, revision)
        )
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
        if task.losses:
            settings = chosen_loss(settings, examples["train"], start)
            for name in ("dev", "test"):
                if name in examples:
                    chosen_loss(settings, examples[name], start)  # it reads them, too
        labels = _label_set(task.labels(examples["train"]), labels, paths["train"])
        _check_best(task, settings.best, labels, paths["dev"], examples["dev"])
        data = {
            name: Dataset(paths[name], found, task.encode(found, tokenizer, labels, settings))
            for name, found in examples.items()
        }
        recipe = cls(settings, task, tokenizer, labels, data["train"], data["dev"], data.get("test"))
        if settings.epochs is None:
            settings = replace(settings, epochs=settings.default_epochs(len(recipe._epoch(0))))
        return replace(recipe, settings=settings)

    def fresh_model(self, path: str | Path, *, revision: str | None = None) -> BertPreTrainedModel:
        """The checkpoint in float32 with a head for the task, whose weights are seeded."""
        torch.manual_seed(self.settings.seed)
        if self.settings.of_vectors:
            own = {"dropout": self.settings.dropout, "max_length": self.settings.max_length}
            return self.task.model.from_pretrained(path, revision=revision, **own)
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


def chosen_loss(settings: FinetuneSettings, examples: Sequence, start: TextSettings) -> FinetuneSettings:
    """The settings with those that follow from the data and the model: loss, score, prompts.

    Raises:
        DataError: the examples are not what the loss learns from.
    """
    if not isinstance(examples[0], VectorExample):
        return replace(settings, loss=settings.loss or "binary")
    kind = examples[0].kind
    loss = settings.loss or USUAL.get(kind, "distillation")
    if kind not in LOSSES[loss].learns_from:
        known = " or ".join(_KINDS[name] for name in LOSSES[loss].learns_from)
        raise DataError(f"{examples[0].where}: the examples are {_KINDS[kind]}; loss {loss!r} learns from {known}")
    if loss not in (losses := task_of(settings).losses):
        raise DataError(
            f"{examples[0].where}: the examples are {_KINDS[kind]}, from which {settings.task} does not learn; its "
            f"losses are {', '.join(losses)}"
        )
    of_scored = settings.best in ("spearman", "pearson")
    if settings.best not in (None, "loss") and of_scored != (kind == "scored"):
        raise ValueError(f"best is {settings.best!r}, which {_KINDS[kind]} do not have")
    changes: dict[str, Any] = {"loss": loss, "include_prompt": start.include_prompt}
    if settings.best is None and kind == "scored":
        changes["best"] = "spearman"
    if settings.query_prompt is None:
        changes["query_prompt"] = start.prompt_for("query")
    if settings.document_prompt is None:
        changes["document_prompt"] = start.prompt_for("document", "passage")
    return replace(settings, **changes)


_KINDS = {
    "pairs": "pairs or triplets without a label",
    "classes": "texts with a class",
    "scored": "pairs with a score",
    "margins": "triplets with a teacher's margins",
    "scores": "triplets with a teacher's scores",
}


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


@dataclass(frozen=True)
class Batch:
    """A batch of features; `counts.labels` is the weight of its mean loss."""

    features: list[Feature]
    counts: Counts


class Finetuning(Trainer):
    """One run; see Trainer. Each evaluation ends with a checkpoint; the newest and the best are kept.

    Args:
        recipe: data and settings of the run.
        model: of the task's class, on its device, in float32.
        folder: folder of checkpoints and log.
        trained: a module that holds the model, if more than the model is trained.
        groups: optimizer groups of the parameters of `trained` that are not the model's.
        extra: see Trainer.
        processes: see Trainer.
    """

    evaluation = ("dev", "dev", "dev loss")

    def __init__(
        self,
        recipe: Recipe,
        model: BertPreTrainedModel,
        folder: Path,
        *,
        trained: nn.Module | None = None,
        groups: Sequence[dict] = (),
        extra: Any = None,
        processes: Processes | None = None,
    ) -> None:
        self.recipe, self.task, settings = recipe, recipe.task, recipe.settings
        self.best_score = settings.best or self.task.scores[0]
        freeze(model, embeddings=settings.freeze_embeddings, layers=settings.freeze_layers)
        epochs = recipe.plan()
        self.plan = [step for epoch in epochs for step in epoch]
        self.epoch_ends = set(accumulate(map(len, epochs)))
        log_every = max(1, min(LOG_EVERY, len(self.plan) // LOGGED))
        super().__init__(
            settings.of_run(len(self.plan), log_every, folder),
            model,
            recipe.tokenizer,
            trained=model if trained is None else trained,
            groups=[*layer_groups(model, settings.weight_decay, settings.layer_decay), *groups],
            extra=extra,
            processes=processes,
        )
        weights = recipe.class_weights()
        self.class_weights = None if weights is None else weights.to(self.device)
        self.scores: list[list[float]] = []  # [step, score, dev loss] of each evaluation

    def is_finished(self) -> bool:
        return super().is_finished() or self._out_of_patience()

    @property
    def best_step(self) -> int | None:
        """The step of the best score; of equal scores, the one with the lower loss, then the first."""
        return int(max(self.scores, key=lambda entry: (entry[1], -entry[2]))[0]) if self.scores else None

    def _out_of_patience(self) -> bool:
        """True if patience is exhausted. It counts evaluations since the best score was first reached.

        An equal score with a lower loss is no progress.
        """
        if self.recipe.settings.patience is None or not self.scores:
            return False
        values = [score for _, score, _ in self.scores]
        return len(values) - 1 - values.index(max(values)) >= self.recipe.settings.patience

    def due(self) -> tuple[bool, bool, bool]:
        report, *_ = super().due()
        evaluate_every, save_every = self.recipe.settings.evaluate_every, self.recipe.settings.save_every
        evaluate = self.step in self.epoch_ends if evaluate_every is None else self.step % evaluate_every == 0
        evaluate = evaluate or self.step == self.settings.training.steps
        return report or evaluate, evaluate, evaluate or bool(save_every and self.step % save_every == 0)

    def next_step(self) -> list[Batch]:
        """The batches of the next step, without those that have no labels."""
        batches = [self._batch([self.recipe.train.features[i] for i in batch]) for batch in self.plan[self.step]]
        return [batch for batch in batches if batch.counts.labels]

    def _batch(self, features: list[Feature]) -> Batch:
        return Batch(features, Counts(self._weight(features), tokens=sum(feature.length for feature in features)))

    def losses(self, batch: Batch, whole: Counts) -> Tensor:
        """A batch's share of the step's loss, which is the mean over all decisions of its batches."""
        return self._loss(batch.features)[0].reshape(1) * (batch.counts.labels / whole.labels)

    def _weight(self, features: Sequence[Feature]) -> float:
        """The weight of a batch's mean loss: its number of decisions, or the sum of their class weights."""
        if self.class_weights is None:
            return sum(feature.weight for feature in features)
        return float(class_counts(features, len(self.class_weights)) @ self.class_weights.cpu().numpy())

    def _loss(self, features: Sequence[Feature]) -> tuple[Tensor, ModelOutput]:
        arguments = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in self.task.collate(features).items()
        }
        with self.autocast():
            return self._forward(arguments)

    def _forward(self, arguments: dict[str, Any]) -> tuple[Tensor, ModelOutput]:
        """The loss of a batch, in float32, and the model's output."""
        known = {name: value for name, value in arguments.items() if name not in NOT_THE_MODELS}
        output = self.model(**known, return_dict=True)  # overrides the config
        return loss_of(self.task, output, arguments, self.class_weights, self.recipe.settings).float(), output

    @torch.no_grad()
    def evaluate(self, data: Dataset) -> Evaluation:
        """Loss, scores and predictions of the current model, without dropout."""
        self.model.eval()

        def run(features: list[Feature]) -> tuple[float, float, ModelOutput]:
            loss, output = self._loss(features)
            return float(loss), self._weight(features), output

        return self.recipe.evaluate(data, run)

    def evaluate_heldout(self) -> tuple[dict[str, float], list[str]]:
        """Loss and scores on the dev examples."""
        evaluation = self.evaluate(self.recipe.dev)
        scores = evaluation.scores
        value = better(self.best_score, scores[self.best_score])
        self.scores.append([self.step, value, scores["loss"]])
        # The best checkpoint minimises these, in order; of equals, the first is kept.
        self.heldout_loss = [-value, scores["loss"]]
        if (label := single_label(evaluation.predictions)) is None:
            return scores, []
        told = f"the model predicts {label!r} for every example of {self.recipe.dev.path}"
        return scores, [f"warning: step {self.step:,}: {told}"]

    def all_settings(self) -> dict[str, Any]:
        """All settings by name; JSON-compatible."""
        return asdict(self.recipe.settings)

    def decisive(self) -> dict[str, Any]:
        return self.recipe.decisive()

    def position(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def move_to(self, position: dict[str, Any]) -> None:
        self.scores = position["scores"]

    def read(self, folder: Path) -> None:
        super().read(folder)
        self.load_weights(folder)

    def where(self) -> str:
        """The next epoch and the next step in it."""
        if self.step == self.settings.training.steps:
            return "only the report is missing"
        ends = sorted(self.epoch_ends)
        done = sum(end <= self.step for end in ends)
        return f"next is epoch {done + 1} of {len(ends)}, step {self.step - [0, *ends][done] + 1} in it"

    def load_weights(self, checkpoint: Path) -> None:
        """Loads the weights of a checkpoint of this run."""
        self.model.load_state_dict(type(self.model).from_pretrained(checkpoint).state_dict())

    def load_best(self) -> None:
        """Loads the weights of the best checkpoint."""
        self.load_weights(next(p for p in self.checkpoints.complete() if read_state(p).step == self.best_step))

    def remove_checkpoints(self) -> None:
        """Removes the checkpoints, after the final model is written."""
        shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
