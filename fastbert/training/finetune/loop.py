"""The training loop of a fine-tuning run, on its recipe."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.model import BertPreTrainedModel
from fastbert.model.outputs import ModelOutput
from fastbert.training.distributed import Processes
from fastbert.training.finetune.features import Feature
from fastbert.training.finetune.layers import freeze, layer_groups
from fastbert.training.finetune.recipe import Dataset, Evaluation, Recipe, better
from fastbert.training.finetune.tasks import class_counts, loss_of, single_label
from fastbert.training.loop import Trainer
from fastbert.training.objective import Counts
from fastbert.training.training_state import read_state

NOT_THE_MODELS = ("grades", "sizes")  # arguments that a loss reads, and the model does not
LOGGED = 50  # least number of log lines of a run, if it has as many steps
LOG_EVERY = 20  # most steps between log lines


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
