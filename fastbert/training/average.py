"""The exponential moving average of the weights of one or more models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastbert.model import BertPreTrainedModel

FOLDER = "ema"  # in a checkpoint


class WeightAverage:
    """The average over steps, of each parameter: a = decay a + (1 - decay) p, with less decay at first.

    Step t has a decay of at most (1 + t) / (10 + t). In a checkpoint they are models of their own.

    Args:
        models: by the folder in `ema` of a checkpoint; that of the trained model is "". They may share parameters.
        decay: 0 to 1.
    """

    def __init__(self, models: Mapping[str, BertPreTrainedModel], decay: float) -> None:
        self.models, self.decay = models, decay
        self._parameters: list[Tensor] = list(dict.fromkeys(p for model in models.values() for p in model.parameters()))
        self._averages = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the models have the averages as their weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    def save(self, folder: Path) -> None:
        for name, model in self.models.items():
            model.save_pretrained(folder / FOLDER / name, state_dict={**model.state_dict(), **self._named(model)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        for name, model in self.models.items():
            state = type(model).from_pretrained(folder / FOLDER / name).state_dict()
            for of, average in self._named(model).items():
                average.copy_(state[of])

    def _named(self, model: BertPreTrainedModel) -> dict[str, Tensor]:
        averages = dict(zip(self._parameters, self._averages, strict=True))
        return {name: averages[p] for name, p in model.named_parameters(remove_duplicate=False)}
