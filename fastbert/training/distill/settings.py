"""The settings of a distillation, which those of fine-tuning or of pre-training go with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastbert.training.distill.losses import RELATIONS
from fastbert.training.settings import Settings, SettingsError, limited


@dataclass(frozen=True)
class DistillationSettings:
    """Loss: output_weight (alpha hard + (1 - alpha) soft) + hidden_weight states + relation_weight relations.

    Layers are counted from 0.
    """

    teacher: str  # a folder or hub id in Hugging Face layout
    layers: tuple[int, ...] | None = None  # of the teacher, copied into the student; spread evenly without
    temperature: float = limited(2.0, above=0.0)
    alpha: float = limited(0.5, least=0.0, most=1.0)  # share of the true labels in the loss of the output
    output_weight: float = limited(1.0, least=0.0)
    hidden_weight: float = limited(1.0, least=0.0)
    hidden_loss: Literal["mse", "cosine"] = "mse"
    hidden_layers: tuple[int, ...] | None = None  # of the teacher, one for each of the student's to come close to
    relation_weight: float = limited(0.0, least=0.0)
    relations: tuple[str, ...] = ("qq", "kk", "vv")
    relation_heads: int | None = limited(None, least=1)  # into which both sides are cut; as many as the teacher has
    relation_layer: int | None = None  # of the teacher, for the student's last one; the last without
    teacher_precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if unknown := [relation for relation in self.relations if relation not in RELATIONS]:
            raise SettingsError(
                f"distillation.relations holds {unknown[0]!r}; a relation is one of {', '.join(RELATIONS)}"
            )
        if not self.relations:
            raise SettingsError("distillation.relations is empty; distillation.relation_weight = 0 does without them")
        if not (self.output_weight or self.hidden_weight or self.relation_weight):
            raise SettingsError("distillation: all weights are 0; there is nothing to learn")


@dataclass(frozen=True)
class TextSettings(Settings):
    """Of distillation on plain text: those of pre-training, where [model] names the student's sizes, and more."""

    distillation: DistillationSettings = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.config is not None:
            raise SettingsError("model.config is given; a student is made of its teacher, or is a model.checkpoint")
