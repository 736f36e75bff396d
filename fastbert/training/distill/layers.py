"""Losses between the layers of two models, and learned projections if their widths differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert.config import family_of
from fastbert.model import BertPreTrainedModel
from fastbert.model.layer import Layer
from fastbert.model.plan import project
from fastbert.training.distill.losses import relation_loss, state_loss
from fastbert.training.distill.settings import DistillationSettings
from fastbert.training.distill.student import check_layers, spread
from fastbert.training.training_state import CheckpointError

PROJECTIONS = "projections.safetensors"


class LayerLosses(nn.Module):
    """The losses of states and of relations between a student and its teacher.

    If the student is narrower, each of its layers has a linear projection to the teacher's width. The projection is
    initialised to map the student's units to the teacher's first units, from which `make_student` took them. The
    projections are not part of the student: a checkpoint stores them in a file of their own.

    Raises:
        ValueError: the models do not have the layers or heads.
    """

    def __init__(
        self, student: BertPreTrainedModel, teacher: BertPreTrainedModel, settings: DistillationSettings
    ) -> None:
        super().__init__()
        self.settings = settings
        own, theirs = student.config, teacher.config
        layers, count = own.num_hidden_layers, theirs.num_hidden_layers
        if own.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"the student's vocab_size is {own.vocab_size} and the teacher's {theirs.vocab_size}; "
                "both read the same tokens"
            )
        self.of_states = list(spread(layers, count) if settings.hidden_layers is None else settings.hidden_layers)
        check_layers("hidden_layers", self.of_states, count)
        if len(self.of_states) != layers:
            raise ValueError(
                f"hidden_layers has {len(self.of_states)} layers; the student has {layers}, each needs one"
            )
        self.of_relations = count - 1 if settings.relation_layer is None else settings.relation_layer
        check_layers("relation_layer", [self.of_relations], count)
        self.heads = settings.relation_heads or theirs.num_attention_heads
        for whose, width in (("student", own.hidden_size), ("teacher", theirs.hidden_size)):
            if settings.relation_weight and width % self.heads:
                raise ValueError(
                    f"relation_heads is {self.heads}; the {whose}'s hidden_size, {width}, is no multiple of it"
                )
        self.projections = nn.ModuleList()
        if settings.hidden_weight and own.hidden_size != theirs.hidden_size:
            for _ in range(layers):
                linear = nn.Linear(own.hidden_size, theirs.hidden_size)
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
                self.projections.append(linear)

    @property
    def need_states(self) -> bool:
        return bool(self.settings.hidden_weight or self.settings.relation_weight)

    def forward(
        self,
        student: BertPreTrainedModel,
        teacher: BertPreTrainedModel,
        student_states: Sequence[Tensor],  # L + 1 of (T, E), from the embeddings on
        teacher_states: Sequence[Tensor],
        cu_seqlens: Tensor,
    ) -> dict[str, Tensor]:
        """The losses with a weight, {"hidden": ..., "relation": ...}: summed over tokens, mean over layers."""
        losses = {}
        if self.settings.hidden_weight:
            losses["hidden"] = self._states(student_states, teacher_states)
        if self.settings.relation_weight:
            qkv = _qkv(student, len(student_states) - 2, student_states)
            with torch.no_grad(), torch.autocast(qkv.device.type, enabled=False):
                target = _qkv(teacher, self.of_relations, teacher_states)
            losses["relation"] = relation_loss(qkv, target, cu_seqlens, self.settings.relations, self.heads)
        return losses

    def _states(self, student_states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> Tensor:
        losses = []
        for i, j in enumerate(self.of_states):
            x = student_states[i + 1]
            if self.projections:
                x = project(self.projections[i], x)
            losses.append(state_loss(x, teacher_states[j + 1], self.settings.hidden_loss))
        return torch.stack(losses).mean()

    def save(self, folder: Path) -> None:
        """Writes the projections, if there are any."""
        if self.projections:
            save_file(self.projections.state_dict(), folder / PROJECTIONS)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        if not self.projections:
            return
        try:
            self.projections.load_state_dict(load_file(folder / PROJECTIONS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{folder / PROJECTIONS} cannot be read: {' '.join(str(error).split())}") from error


def _qkv(model: BertPreTrainedModel, layer: int, states: Sequence[Tensor]) -> Tensor:
    """Queries, keys and values (T, 3, H, D) of a layer, recomputed from its input states, without positions."""
    family = family_of(model.config.model_type)
    return Layer(family.layers(model.base_model)[layer], family).relations(states[layer], model.matmul_precision)
