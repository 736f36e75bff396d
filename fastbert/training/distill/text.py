"""Distillation on plain text: the objective that pre-training's loop minimises for a student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fastbert.model import BertPreTrainedModel
from fastbert.training.distill.layers import LayerLosses
from fastbert.training.distill.losses import choice_loss
from fastbert.training.distill.settings import DistillationSettings
from fastbert.training.distill.teacher import teaching
from fastbert.training.objective import Counts, MicroBatch, Objective, states_of

_LOGIT_ROWS = 512  # rows of logits at a time


class TextDistillation(Objective):
    """The weighted sum of the student's own losses and the distillation losses; each is a part.

    The teacher is not a submodule: it is not trained, saved, replicated or set to train mode. It must be of the
    student's class, on its device.
    """

    def __init__(
        self, student: BertPreTrainedModel, teacher: BertPreTrainedModel, settings: DistillationSettings
    ) -> None:
        super().__init__(student)
        self._teacher = (teacher.eval(),)
        self.settings = settings
        self.layers = LayerLosses(student, teacher, settings).to(student.device)
        weights = {
            "soft_loss": settings.output_weight * (1 - settings.alpha),
            "hidden_loss": settings.hidden_weight,
            "relation_loss": settings.relation_weight,
        }
        self.parts = (*Objective.parts, *(name for name, weight in weights.items() if weight))

    @property
    def teacher(self) -> BertPreTrainedModel:
        return self._teacher[0]

    @property
    def trained(self) -> nn.Module:
        return self if self.layers.projections else self.model

    @property
    def extra(self) -> LayerLosses:
        return self.layers

    def forward(self, micro_batch: MicroBatch, whole: Counts | None = None) -> Tensor:
        """(len(parts),): what this micro-batch adds to each part of the step's loss; `scores` without a whole."""
        if whole is None:
            return self.scores(micro_batch)
        settings, batch = self.settings, micro_batch.batch
        student = states_of(self.model, micro_batch, output_hidden_states=self.layers.need_states)
        with teaching(micro_batch.labelled.device):
            teacher = states_of(self.teacher, micro_batch, output_hidden_states=self.layers.need_states)
        zero = micro_batch.labelled.new_zeros((), dtype=torch.float32)
        parts = {name: zero for name in self.parts}
        hard, soft = settings.output_weight * settings.alpha, settings.output_weight * (1 - settings.alpha)
        if student.mlm is not None:
            assert teacher.mlm is not None, "the teacher is of the student's class"
            right, alike = self._words(student.mlm, teacher.mlm, micro_batch) / max(1, whole.labels)
            parts["mlm_loss"] = hard * right
            if soft:
                parts["soft_loss"] = soft * alike
        if student.nsp is not None:
            assert teacher.nsp is not None, "the teacher is of the student's class"
            logits = student.nsp.float()
            right = F.cross_entropy(logits, batch.sentence_labels(), reduction="sum") / whole.sequences
            parts["nsp_loss"] = hard * right
            if soft:
                alike = choice_loss(logits, teacher.nsp, settings.temperature) / whole.sequences
                parts["soft_loss"] = parts["soft_loss"] + soft * alike
        if self.layers.need_states:
            between = self.layers(self.model, self.teacher, student.hidden, teacher.hidden, batch.cu_seqlens)
            parts["hidden_loss"] = settings.hidden_weight * between.get("hidden", zero) / whole.tokens
            parts["relation_loss"] = settings.relation_weight * between.get("relation", zero) / whole.tokens
        return torch.stack([parts[name].float() for name in self.parts])

    def _words(self, student: Tensor, teacher: Tensor, micro_batch: MicroBatch) -> Tensor:
        """(2,): cross entropy and soft targets at the labelled tokens (n, E), summed.

        Both losses compute the logits for a few tokens at a time, and again in the backward.
        """
        head = self.model.predictions
        if not len(student) or not self.settings.output_weight:
            return head(student[:0]).sum().float().expand(2)  # a gradient of 0 for every parameter, as DDP expects
        labels = micro_batch.batch.labels.index_select(0, micro_batch.labelled)
        columns = (x.split(_LOGIT_ROWS) for x in (student, teacher, labels))
        sums = [
            torch.utils.checkpoint.checkpoint(self._word_sums, *rows, use_reentrant=False)
            for rows in zip(*columns, strict=True)
        ]
        return torch.stack(sums).sum(dim=0)

    def _word_sums(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.predictions(student).float()
        right = F.cross_entropy(logits, labels, reduction="sum")
        if self.settings.alpha == 1:
            return torch.stack([right, torch.zeros_like(right)])
        with teaching(teacher.device):
            targets = self.teacher.predictions(teacher)
        return torch.stack([right, choice_loss(logits, targets, self.settings.temperature)])
