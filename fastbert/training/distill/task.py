"""Distillation for a task: fine-tuning's loop, with a teacher that is fine-tuned for the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastbert.model import BertPreTrainedModel
from fastbert.model.outputs import ModelOutput
from fastbert.training.distill.layers import LayerLosses
from fastbert.training.distill.losses import choice_loss, label_loss, number_loss
from fastbert.training.distill.settings import DistillationSettings
from fastbert.training.distill.teacher import teaching
from fastbert.training.finetune.features import IGNORE
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.recipe import Recipe

LABELS = ("labels", "start_positions", "end_positions")  # arguments that are not passed to the teacher
Soften = Callable[[ModelOutput, ModelOutput, dict[str, Any], float], Tensor]


def _classes(student: ModelOutput, teacher: ModelOutput, arguments: dict[str, Any], temperature: float) -> Tensor:
    return choice_loss(student.logits, teacher.logits, temperature) / len(student.logits)


def _labels(student: ModelOutput, teacher: ModelOutput, arguments: dict[str, Any], temperature: float) -> Tensor:
    return label_loss(student.logits, teacher.logits, temperature) / len(student.logits)


def _numbers(student: ModelOutput, teacher: ModelOutput, arguments: dict[str, Any], temperature: float) -> Tensor:
    return number_loss(student.logits, teacher.logits) / len(student.logits)


def _tags(student: ModelOutput, teacher: ModelOutput, arguments: dict[str, Any], temperature: float) -> Tensor:
    """Soft targets at the tokens with a label, as in the hard loss."""
    asked = arguments["labels"] != IGNORE
    return choice_loss(student.logits[asked], teacher.logits[asked], temperature) / asked.sum()


def _spans(student: ModelOutput, teacher: ModelOutput, arguments: dict[str, Any], temperature: float) -> Tensor:
    """Soft targets of the answer's start and end, over the tokens of each sequence."""
    lengths = arguments["cu_seqlens"].diff().tolist()
    rows = lambda x: pad_sequence(x.float().split(lengths), batch_first=True, padding_value=-torch.inf)  # noqa: E731
    sides = (("start_logits", "end_logits"), (student, teacher))
    (start, start_target), (end, end_target) = ([rows(side[name]) for side in sides[1]] for name in sides[0])
    total = choice_loss(start, start_target, temperature) + choice_loss(end, end_target, temperature)
    return total / (2 * len(lengths))


# The soft loss of each task: the mean over the decisions of a batch.
SOFT: dict[str, Soften] = {
    "classification": _classes,
    "multi-label": _labels,
    "regression": _numbers,
    "token-classification": _tags,
    "question-answering": _spans,
    "multiple-choice": _classes,
}


class TaskDistillation(Finetuning):
    """One run; see Finetuning. Evaluations and the report are of the student alone.

    Args:
        teacher: of the task's class, on the student's device.
        distillation: the losses and their weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: BertPreTrainedModel,
        teacher: BertPreTrainedModel,
        distillation: DistillationSettings,
        folder: Path,
    ) -> None:
        if student.config.num_labels != teacher.config.num_labels:
            raise ValueError(
                f"the student has {student.config.num_labels} labels and the teacher {teacher.config.num_labels}; "
                "they must have the same"
            )
        self.teacher, self.distillation = teacher.eval(), distillation
        self.layers = LayerLosses(student, teacher, distillation).to(student.device)
        more: dict[str, Any] = {"extra": self.layers}
        if projections := self.layers.projections:
            own = {"params": list(projections.parameters()), "weight_decay": 0.0, "trust_ratio": False}
            more |= {"trained": nn.ModuleDict({"student": student, "projections": projections}), "groups": [own]}
        super().__init__(recipe, student, folder, **more)

    def _forward(self, arguments: dict[str, Any]) -> tuple[Tensor, ModelOutput]:
        """In training, the weighted sum of the losses; in an evaluation, the student's own loss."""
        if not self.model.training:
            return super()._forward(arguments)
        settings, need_states = self.distillation, self.layers.need_states
        loss, student = super()._forward({**arguments, "output_hidden_states": need_states})
        given = {name: value for name, value in arguments.items() if name not in LABELS}
        with teaching(self.device):
            teacher = self.teacher(**given, output_hidden_states=need_states, return_dict=True)
        soft = settings.output_weight * (1 - settings.alpha)
        loss = settings.output_weight * settings.alpha * loss
        if soft:
            loss = loss + soft * SOFT[self.recipe.settings.task](student, teacher, arguments, settings.temperature)
        if need_states:
            cu_seqlens, states = _packed(arguments, student.hidden_states)
            _, targets = _packed(arguments, teacher.hidden_states)
            between = self.layers(self.model, self.teacher, states, targets, cu_seqlens)
            weights = {"hidden": settings.hidden_weight, "relation": settings.relation_weight}
            loss = loss + sum(weights[name] * part for name, part in between.items()) / len(states[0])
        return loss, student

    def all_settings(self) -> dict[str, Any]:
        distillation = asdict(self.distillation)
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in distillation.items()}
        return {**super().all_settings(), "distillation": lists}

    def decisive(self) -> dict[str, Any]:
        distillation = {f"distillation.{name}": value for name, value in self.all_settings()["distillation"].items()}
        return {**super().decisive(), **distillation, "student": self.model.config.to_dict()}


def _packed(arguments: dict[str, Any], states: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """cu_seqlens and the states as (T, E), also if the task's batches are padded."""
    if "cu_seqlens" in arguments:
        return arguments["cu_seqlens"], list(states)
    real = arguments["attention_mask"].flatten(0, -2).bool()
    cu_seqlens = F.pad(real.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    return cu_seqlens, [x[real] for x in states]  # (B * C, S, E) each
