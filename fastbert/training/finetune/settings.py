"""The settings of a fine-tuning run."""

from __future__ import annotations

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
    check_fields,
    limited,
    option,
)

EXAMPLES, TOKENS = 16, 2048  # default bounds of a batch, if neither is given
VECTOR_EXAMPLES, PART_TOKENS = 64, 16384  # of embedders: examples in a step, and tokens that are computed at a time
# Default epochs. Three of a few hundred examples are too few steps to learn from (Mosbach et al., 2021).
EPOCHS, MOST_EPOCHS, LEAST_STEPS = 3, 20, 150
TEXT_OPTIONS = ("max_length", "stride", "max_question", "n_best", "max_answer", "no_answer", "null_threshold")
VECTOR_OPTIONS = ("loss", "scale", "mini_batch_tokens", "dims", "query_prompt", "document_prompt")
VECTOR_TASKS = ("embedding", "sparse-embedding")
SPARSE_OPTIONS = ("query_weight", "document_weight")
_FREE_TO_CHANGE = ("save_every", "tensorboard")


@dataclass(frozen=True)
class FinetuneSettings:
    """The settings that, with the initial model and the data, determine the weights.

    Raises:
        ValueError: a setting is out of range; names it.
    """

    task: str
    epochs: int | None = option(
        None, "(default: 3; for few examples more, so that there are 150 steps, up to 20)", least=1
    )
    batch_size: int | None = option(None, "examples, at most (default: 16; 64 for embedders)", least=1)
    tokens: int | None = option(None, "in a batch, at most (default: 2048; with --batch-size, any number)", least=1)
    accumulate: int = option(1, "batches in a step", least=1)
    order: Literal["random", "length"] = option("random", "length: like lengths together, shuffled")
    lr: float = option(5e-5, "at the top of the schedule", least=0)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "of the learning rate")
    warmup_share: float = option(0.1, "of all steps", least=0, most=1, metavar="SHARE")
    weight_decay: float = option(0.01, "of all but biases and LayerNorm", least=0)
    eps: float = limited(1e-8, above=0)
    max_grad_norm: float = option(1.0, "0: gradients are not clipped", least=0)
    layer_decay: float = option(1.0, "of the rate, from layer to layer downwards", above=0, most=1, metavar="FACTOR")
    freeze_embeddings: bool = option(False, "leave them as they are")
    freeze_layers: int = option(0, "leave the first N layers as they are", least=0)
    dropout: float | None = option(None, "in place of the model's", least=0, below=1)
    class_weights: Literal["none", "balanced"] = option("none", "balanced: rare classes count as much as frequent ones")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the products")
    seed: int = option(0, "of all that is drawn", least=0, most=MOST_SEED)
    evaluate_every: int | None = option(None, "(default: each epoch)", least=1, metavar="STEPS")
    save_every: int | None = option(None, "checkpoints (default: each evaluation)", least=1, metavar="STEPS")
    tensorboard: bool = option(False, "write event files to DIR/tensorboard")
    best: str | None = option(
        None,
        "score on the dev examples, or loss, by which the best checkpoint is chosen; of equal scores, the lower "
        "loss is better; of scored pairs, spearman (default: f1_macro for classification, f1_micro for multi-label, "
        "spearman for regression, f1 "
        "for token-classification and question-answering, accuracy for multiple-choice, ndcg_at_10 for embedding and "
        "sparse-embedding and rerank)",
        metavar="SCORE",
    )
    patience: int | None = option(None, "end after N evaluations without a better", least=1)
    max_length: int | None = option(None, "tokens (default: as the model takes; 384 for questions)", least=5)
    stride: int = option(128, "tokens that windows of a long text to tag, or of a context, share", least=0)
    max_question: int = option(64, "tokens of a question", least=1)
    n_best: int = option(20, "starts and ends of answers to try", least=1)
    max_answer: int = option(30, "tokens of an answer", least=1)
    no_answer: bool | None = option(
        None, "whether a question may have no answer (default: as in the training data)", spelling="--unanswerable"
    )
    null_threshold: float = option(0.0, "by which no answer must be better than the best")
    loss: str | None = option(
        None,
        "ranking (in-batch negatives), symmetric-ranking, supervised, cosent, angle, cosine, margin-mse or "
        "distillation (default: by the data); of rerank: binary (default), listnet, lambda, mse or margin-mse",
        metavar="NAME",
    )
    scale: float | None = option(None, "of similarities (default: 20; of sparse vectors 1)", above=0)
    mini_batch_tokens: int | None = option(
        None, "computed at a time; a step's gradients do not depend on it (default: 16384)", least=1
    )
    dims: tuple[int, ...] | None = option(None, "Matryoshka: the loss also of vectors cut to these", metavar="N,M,...")
    query_prompt: str | None = option(
        None,
        "before anchors (default: the model's query prompt); before texts with a score or class, "
        "where the default is the model's default prompt",
        metavar="TEXT",
    )
    document_prompt: str | None = option(
        None, "before the other texts (default: the model's document prompt)", metavar="TEXT"
    )
    query_weight: float = option(5e-5, "of the FLOPS of anchors", least=0)
    document_weight: float = option(3e-5, "of the FLOPS of other texts", least=0)
    include_prompt: bool = True  # in the pooling, as the model's folder says

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dims is not None and not self.dims:
            raise ValueError("dims is (); it must hold at least one width")

    @staticmethod
    def default_epochs(steps: int) -> int:
        """3, or as many as needed for 150 steps, up to 20; an epoch has `steps`."""
        return min(max(EPOCHS, -(-LEAST_STEPS // steps)), MOST_EPOCHS)

    @property
    def of_vectors(self) -> bool:
        """True if the loss compares the vectors of a whole step."""
        return self.task in VECTOR_TASKS

    @property
    def batch_bounds(self) -> tuple[int, int | None]:
        """The most examples and the most tokens of a batch (None: any number)."""
        if self.of_vectors:
            return self.batch_size or VECTOR_EXAMPLES, None
        tokens = TOKENS if self.tokens is None and self.batch_size is None else self.tokens
        return self.batch_size or EXAMPLES, tokens

    def decisive(self) -> dict[str, Any]:
        """The settings that determine the weights, as JSON has them; the others may change when a run is resumed."""
        values = {name: value for name, value in asdict(self).items() if name not in _FREE_TO_CHANGE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def of_run(self, steps: int, log_every: int, folder: Path) -> RunSettings:
        """The settings of the loop, for `steps` optimizer steps."""
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
