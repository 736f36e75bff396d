"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastbert.model import BertPreTrainedModel

FOLDER = "ema"  # in a checkpoint


class WeightAverage:
    """The average over steps, of each parameter: a = decay a + (1 - decay) p, with less decay at first.

    Step t has a decay of at most (1 + t) / (10 + t). In a checkpoint it is a model of its own, in the folder `ema`.
    """

    def __init__(self, model: BertPreTrainedModel, decay: float) -> None:
        self.model, self.decay = model, decay
        self._names = [name for name, _ in model.named_parameters()]
        self._averages = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, list(self.model.parameters()), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._averages, self.model.parameters(), strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    def save(self, folder: Path) -> None:
        state: dict[str, Tensor] = self.model.state_dict()
        averages = dict(zip(self._names, self._averages, strict=True))
        self.model.save_pretrained(folder / FOLDER, state_dict={**state, **averages})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = type(self.model).from_pretrained(folder / FOLDER).state_dict()
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])
