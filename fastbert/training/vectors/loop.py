"""The training of embedders: one loss over the vectors of a whole step, on however many processes, in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert import ops
from fastbert.training.finetune.features import Feature, packed_sequences
from fastbert.training.finetune.loop import Finetuning
from fastbert.training.finetune.pair_features import labels_of
from fastbert.training.finetune.recipe import Dataset, Evaluation, Recipe
from fastbert.training.finetune.settings import PART_TOKENS, FinetuneSettings
from fastbert.training.objective import Counts
from fastbert.training.vectors.gradients import backward_in_parts
from fastbert.training.vectors.losses import LOSSES, Loss, dots, matryoshka, sparse

COSINE_SCALE, DOT_SCALE = 20.0, 1.0
_REGULARISED = 3  # the share of the steps, one in so many, in which the weight of FLOPS rises


@dataclass(frozen=True)
class Step:
    """The examples of a step, over all processes, and the range of them that is this process's.

    `counts` are of the own ones.
    """

    features: list[Feature]
    own: slice
    counts: Counts


@dataclass(frozen=True)
class Part:
    """Texts that are computed together, and the number of tokens before them in the whole step."""

    arguments: dict[str, Any]
    first: int


class VectorTraining(Finetuning):
    """One run; see Finetuning. A step's loss compares all its vectors; its gradients do not depend on its parts."""

    def __init__(self, recipe: Recipe, model: Any, folder: Path, **options: Any) -> None:
        for width in recipe.settings.dims or ():
            if not 1 <= width <= model.width:
                raise ValueError(f"dims holds {width}; the model's vectors have {model.width} numbers")
        super().__init__(recipe, model, folder, **options)

    def next_step(self) -> list[Step]:  # type: ignore[override]  # `backward` takes them
        (places,) = self.plan[self.step]
        features = [self.recipe.train.features[i] for i in places]
        bounds = np.linspace(0, len(features), self.processes.world_size + 1).astype(int).tolist()
        own = slice(bounds[self.processes.rank], bounds[self.processes.rank + 1])
        tokens = sum(feature.length for feature in features[own])
        return [Step(features, own, Counts(len(features[own]), tokens=tokens))]

    def backward(self, batches: Sequence[Step], whole: Counts) -> Tensor:
        (step,) = batches
        parts = self._parts(step)
        seed = int(np.random.SeedSequence((self.recipe.settings.seed, self.step)).generate_state(1)[0])
        labels = labels_of(step.features).to(self.device)
        criterion = criterion_of(self.recipe.settings, progress=self.step / max(1, len(self.plan)))
        columns = len(step.features[0].sequences)

        def forward(part: Part) -> Tensor:
            torch.manual_seed(seed + part.first)  # what torch itself drops
            with ops.mask_rows(seed, part.first), self.autocast():
                return self.model(**part.arguments).float()

        def loss(vectors: Tensor) -> Tensor:
            gathered = self.processes.concatenate(vectors.detach())
            gathered[self.processes.rank] = vectors
            every = torch.cat(gathered).unflatten(0, (-1, columns))
            return criterion(every.unbind(1), labels)

        if parts:
            value = backward_in_parts(parts, forward, loss)
        else:  # the step has fewer examples than there are processes
            value = loss(torch.zeros(0, self.model.width, device=self.device))
        self.processes.sum_gradients(self.trained)
        return value.reshape(1) / self.processes.world_size

    def _parts(self, step: Step) -> list[Part]:
        """The texts of the own examples, in order, in parts of at most `mini_batch_tokens`."""
        most = self.recipe.settings.mini_batch_tokens or PART_TOKENS
        first = sum(feature.length for feature in step.features[: step.own.start])
        parts: list[Part] = []
        held: list[tuple[Any, int]] = []  # sequences and the tokens that their pooling leaves out
        count = 0

        def close() -> None:
            nonlocal first, held, count
            arguments = packed_sequences([sequence for sequence, _ in held])
            if any(skip for _, skip in held):
                arguments["skip"] = torch.tensor([skip for _, skip in held])
            parts.append(Part({name: self._there(value) for name, value in arguments.items()}, first))
            first, held, count = first + count, [], 0

        for feature in step.features[step.own]:
            for place, sequence in enumerate(feature.sequences):
                length = len(sequence[0])
                if held and count + length > most:
                    close()
                held.append((sequence, feature.skip[place]))
                count += length
        if held:
            close()
        return parts

    def _there(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def evaluate(self, data: Dataset) -> Evaluation:
        """Loss, scores and predictions of the current model; the loss is a mean over batches."""
        self.model.eval()
        criterion = criterion_of(self.recipe.settings)

        def run(features: list[Feature]) -> tuple[float, float, Any]:
            arguments = {name: self._there(value) for name, value in self.task.collate(features).items()}
            with self.autocast():
                vectors = self.model(**arguments).float()
            columns = vectors.unflatten(0, (-1, len(features[0].sequences))).unbind(1)
            return float(criterion(columns, labels_of(features).to(self.device))), len(features), vectors

        return self.recipe.evaluate(data, run)


def criterion_of(settings: FinetuneSettings, progress: float = 1.0) -> Loss:
    """The loss of the settings.

    Args:
        progress: the share of the steps that are done; the weight of FLOPS rises with its square, over the first third.
    """
    kind = LOSSES[str(settings.loss)]
    is_sparse = settings.task == "sparse-embedding"
    options: dict[str, Any] = {}
    if kind.scaled:
        options["scale"] = settings.scale or (DOT_SCALE if is_sparse else COSINE_SCALE)
    if is_sparse and kind.compares:
        options["similarity"] = dots
    loss = kind.make(**options)
    if settings.dims:
        loss = matryoshka(loss, settings.dims)
    if is_sparse:
        risen = min(1.0, progress * _REGULARISED) ** 2
        loss = sparse(loss, settings.query_weight * risen, settings.document_weight * risen)
    return loss
