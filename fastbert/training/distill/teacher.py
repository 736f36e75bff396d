"""The teacher: loads it, and runs it without gradients on the student's batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastbert.model import BertPreTrainedModel


def load_teacher(
    kind: type[BertPreTrainedModel], path: str | Path, *, head: bool = True, revision: str | None = None
) -> BertPreTrainedModel:
    """Loads a teacher in float32, in eval mode; `head`: whether it must have a head for the task.

    Raises:
        ValueError: the checkpoint lacks the head.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if head else "ignore", message="newly initialised")
        try:
            model = kind.from_pretrained(path, dtype=torch.float32, revision=revision)
        except UserWarning as error:
            missing = str(error).rpartition(": ")[2].split(", ")[0]
            raise ValueError(
                f"{path} has no {missing}: a teacher of {kind.__name__} must be trained with its head"
            ) from None
    return model.requires_grad_(False)


def in_precision(teacher: BertPreTrainedModel, name: str) -> BertPreTrainedModel:
    """Converts the teacher's weights to "fp32" or "bf16", in which it then also computes."""
    return teacher.to(torch.bfloat16) if name == "bf16" else teacher


@contextmanager
def teaching(device: torch.device) -> Iterator[None]:
    """A context to run a teacher in: without gradients, in the precision of its weights."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def labels_of(config: Any) -> list[str]:
    """The labels of a config, in the order of their ids."""
    return [config.id2label[i] for i in range(config.num_labels)]
