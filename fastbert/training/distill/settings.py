"""The settings of a distillation, used with those of fine-tuning or of pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastbert.training.settings import Settings, SettingsError, option

RELATIONS = tuple(f"{a}{b}" for a in "qkv" for b in "qkv")


@dataclass(frozen=True)
class DistillationSettings:
    """Loss: output_weight (alpha hard + (1 - alpha) soft) + hidden_weight states + relation_weight relations.

    Layers are counted from 0.
    """

    teacher: str  # a folder or hub id in Hugging Face layout
    layers: tuple[int, ...] | None = None  # the teacher's layers that are copied; None: spread evenly
    temperature: float = option(2.0, "of the soft targets", above=0.0)
    alpha: float = option(0.5, "share of the labels in the loss of the output", least=0.0, most=1.0)
    output_weight: float = option(1.0, "of labels and soft targets", least=0.0)
    hidden_weight: float = option(1.0, "of the states after each layer", least=0.0)
    hidden_loss: Literal["mse", "cosine"] = option("mse", "of the states")
    hidden_layers: tuple[int, ...] | None = option(
        None, "of the teacher's, one for each of the student's (default: spread evenly)", metavar="A,B,..."
    )
    relation_weight: float = option(0.0, "of how tokens relate in the last layer", least=0.0)
    relations: tuple[str, ...] = option(
        ("qq", "kk", "vv"), "of queries, keys and values; qk is the attention", metavar="qq,kk,vv"
    )
    relation_heads: int | None = option(
        None, "into which both sides are cut (default: as many as the teacher has)", least=1
    )
    relation_layer: int | None = option(None, "of the teacher, for the student's last one (default: its last)")
    teacher_precision: Literal["fp32", "bf16"] = option("fp32", "of the teacher's weights and products")

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
    """The settings of distillation on plain text: those of pre-training, where [model] gives the student's sizes, and
    those of the distillation."""

    distillation: DistillationSettings = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.config is not None:
            raise SettingsError("model.config is given; a student is made of its teacher, or is a model.checkpoint")
