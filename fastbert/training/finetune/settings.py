"""The settings of a fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastbert.training.settings import (
    MOST_SEED,
    OptimizerSettings,
    OutputSettings,
    RunSettings,
    ScheduleSettings,
    TrainingSettings,
)

CLASS_WEIGHTS = ("none", "balanced")
EXAMPLES, TOKENS = 16, 2048  # the bounds of a batch where neither is given
# Epochs where none are given. Three of a few hundred examples are too few steps to learn from (Mosbach et al., 2021).
EPOCHS, MOST_EPOCHS, LEAST_STEPS = 3, 20, 150
_FREE_TO_CHANGE = ("save_every", "tensorboard")


@dataclass(frozen=True)
class FinetuneSettings:
    """All that the weights follow from, beside the model it starts from and the data.

    Raises:
        ValueError: a setting out of range, by name.
    """

    task: str
    seed: int = 0
    epochs: int | None = None  # None: as `default_epochs`
    batch_size: int | None = None  # examples; None: up to 16 within `tokens`
    tokens: int | None = None  # in a batch, at most; None: no bound where batch_size is given, else 2048
    accumulate: int = 1  # batches that make one step
    order: Literal["random", "length"] = "random"
    precision: Literal["fp32", "bf16"] = "fp32"
    lr: float = 5e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = 0.1  # of all steps
    weight_decay: float = 0.01
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    layer_decay: float = 1.0  # of the learning rate, from each layer to the one below it
    freeze_embeddings: bool = False
    freeze_layers: int = 0  # the first so many
    dropout: float | None = None  # in place of the config's
    class_weights: str = "none"  # "balanced": each class counts alike, however many examples it has
    evaluate_every: int | None = None  # steps; None: at the end of each epoch
    patience: int | None = None  # evaluations without a better score after which the run ends
    best: str | None = None  # the score that the best checkpoint is chosen by; None: the task's first
    save_every: int | None = None  # steps; None: a checkpoint at each evaluation only
    tensorboard: bool = False  # event files next to the log
    max_length: int | None = None  # tokens of an example, or of a window of a question's context
    stride: int = 128  # tokens that a window shares with the one before
    max_question: int = 64  # tokens
    n_best: int = 20  # starts and ends of answers that are tried
    max_answer: int = 30  # tokens
    no_answer: bool | None = None  # whether a question may have none; None: as in the training data
    null_threshold: float = 0.0  # how much better no answer must be than the best one

    def __post_init__(self) -> None:
        least = {
            "epochs": 1,
            "batch_size": 1,
            "tokens": 1,
            "accumulate": 1,
            "evaluate_every": 1,
            "patience": 1,
            "save_every": 1,
        }
        least |= {"lr": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup_share": 0, "freeze_layers": 0, "seed": 0}
        least |= {"stride": 0, "max_question": 1, "n_best": 1, "max_answer": 1, "max_length": 5}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and not value >= limit:  # nan is nowhere
                raise ValueError(f"{name} is {value}; it must be at least {limit}")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be finite")
        if self.seed > MOST_SEED:
            raise ValueError(f"seed is {self.seed}; it must be at most {MOST_SEED}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        if self.warmup_share > 1:
            raise ValueError(f"warmup_share is {self.warmup_share}; it must be at most 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.class_weights not in CLASS_WEIGHTS:
            raise ValueError(f"class_weights is {self.class_weights!r}; it must be one of {', '.join(CLASS_WEIGHTS)}")

    @staticmethod
    def default_epochs(steps: int) -> int:
        """3, or as many as make 150 steps, up to 20, for training data of which an epoch takes `steps`."""
        return min(max(EPOCHS, -(-LEAST_STEPS // steps)), MOST_EPOCHS)

    @property
    def batch_bounds(self) -> tuple[int, int | None]:
        """The most examples and the most tokens of a batch (None: any number)."""
        tokens = TOKENS if self.tokens is None and self.batch_size is None else self.tokens
        return self.batch_size or EXAMPLES, tokens

    def decisive(self) -> dict[str, Any]:
        """The settings that the weights follow from; the others may change when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE_TO_CHANGE}

    def of_run(self, steps: int, log_every: int, folder: Path) -> RunSettings:
        """The settings of the loop, for so many steps of the optimizer."""
        return RunSettings(
            OptimizerSettings(
                lr=self.lr, eps=self.eps, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm
            ),
            ScheduleSettings(self.schedule, warmup_share=self.warmup_share),
            TrainingSettings(
                steps, precision=self.precision, seed=self.seed, log_every=log_every, keep=1, keep_best=True
            ),
            OutputSettings(str(folder), self.tensorboard),
        )
