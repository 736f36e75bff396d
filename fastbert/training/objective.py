"""The objective of pre-training: the losses of masked words and of next sentences, each alone or their sum.

A step's loss is that of its whole batch: the mean over all its labelled tokens, plus the mean over all its sequences.
It does not depend on the number of micro-batches (`accumulate`, in each process): a micro-batch is weighted by its
share of the tokens and sequences, so the loss is not a mean of means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import BertConfig, family_of
from fastbert.model import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertPreTrainedModel,
    ElectraForPreTraining,
)
from fastbert.model.auto import AutoModelForMaskedLM
from fastbert.model.bert import first_tokens, pool, run_bert
from fastbert.model.heads import IGNORE, ModelForMaskedLM
from fastbert.model.plan import project
from fastbert.training.batches import PretrainingBatch

# BERT's model of each objective.
MODELS = {"mlm_nsp": BertForPreTraining, "mlm": BertForMaskedLM, "nsp": BertForNextSentencePrediction}
_LOGIT_ROWS = 1024  # rows of logits at a time in an evaluation


@dataclass(frozen=True)
class Counts:
    """Sizes of a batch, or of all batches of a step."""

    labels: float = 0
    sequences: float = 0
    tokens: float = 0
    flops: float = 0  # of forward and backward

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its device, with sizes that the host computed beforehand, so as not to wait for the device."""

    batch: PretrainingBatch
    labelled: Tensor  # (n,) indices of the tokens with a label
    counts: Counts

    @classmethod
    def of(cls, batch: PretrainingBatch, config: BertConfig, objective: str, device: torch.device | str) -> MicroBatch:
        if objective not in ("mlm", "rtd") and batch.next_sentence_label is None:
            raise ValueError(f"training.objective is {objective!r}, and the shards hold no next-sentence pairs")
        labelled = (batch.labels != IGNORE).nonzero().squeeze(1)
        lengths = batch.cu_seqlens.diff().to(torch.float64)
        labels, tokens = len(labelled), len(batch.input_ids)
        flops = training_flops(config, objective, tokens, len(lengths), labels, lengths.square().sum().item())
        counts = Counts(labels, len(lengths), tokens, flops)
        return cls(batch.to(device, non_blocking=True), labelled.to(device, non_blocking=True), counts)


@dataclass(frozen=True)
class States:
    """The inputs of the losses; one is None if the model does not have its head."""

    mlm: Tensor | None  # last states of the labelled tokens (n, E)
    nsp: Tensor | None  # next-sentence logits (B, 2)
    hidden: tuple[Tensor, ...] | None = None  # L + 1 states (T, E), if requested


def model_class(objective: str, config: BertConfig) -> Any:
    """The class of the model that an objective trains.

    Raises:
        ValueError: the model's family has no such head.
    """
    if objective == "rtd":
        if config.model_type != "electra":
            raise ValueError(
                f"training.objective is 'rtd', and the model a {config.model_type!r}; it trains an 'electra'"
            )
        return ElectraForPreTraining
    if objective != "mlm" and config.model_type != "bert":
        raise ValueError(
            f"training.objective is {objective!r}, and the model a {config.model_type!r}; only a 'bert' has the head "
            "for next sentences: 'mlm' trains the others"
        )
    return AutoModelForMaskedLM.of(config) if objective == "mlm" else MODELS[objective]


def states_of(model: BertPreTrainedModel, micro_batch: MicroBatch, *, output_hidden_states: bool = False) -> States:
    """Runs a model of one of MODELS on a micro-batch."""
    batch, labelled = micro_batch.batch, micro_batch.labelled
    firsts = first_tokens(batch.cu_seqlens, len(batch.input_ids))
    with_words = not isinstance(model, BertForNextSentencePrediction)
    with_sentences = not isinstance(model, ModelForMaskedLM)
    rows = (labelled[: len(labelled) * with_words], firsts[: len(firsts) * with_sentences])
    inputs, encoded = run_bert(
        model.base_model,
        model.config,
        batch.input_ids,
        token_type_ids=batch.token_type_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        output_hidden_states=output_hidden_states,
        precision=model.matmul_precision,
        picked=torch.cat(rows),
    )
    words, sentences = encoded.last_hidden_state.split([*map(len, rows)])
    nsp = None
    if with_sentences:
        nsp = project(model.cls.seq_relationship, pool(inputs, replace(encoded, last_hidden_state=sentences)))
    return States(words if with_words else None, nsp, encoded.hidden_states)


class Objective(nn.Module):
    """The model with its losses; a module, so that DDP can wrap it.

    An objective with parameters of its own overrides `trained`, the module that the optimizer trains, and `extra`,
    whose `save` and `load` handle the parameters that are not in the model.
    """

    extra: Any = None
    parts: tuple[str, ...] = ("mlm_loss", "nsp_loss")  # what `forward` returns; their sum is minimised

    def __init__(self, model: BertPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def trained(self) -> nn.Module:
        return self.model

    @property
    def models(self) -> dict[str, BertPreTrainedModel]:
        """The models that are trained, by their folders in that of an average; the one of interest is ""."""
        return {"": self.model}

    def forward(self, micro_batch: MicroBatch, whole: Counts | None = None) -> Tensor:
        """(2,): this micro-batch's contributions to the step's MLM and NSP losses; `whole` counts the step.

        Without `whole`, returns `scores`, so that a wrapper of the module also runs these.
        """
        if whole is None:
            return self.scores(micro_batch)
        states = states_of(self.model, micro_batch)
        mlm, nsp = states.mlm, states.nsp
        zero = micro_batch.labelled.new_zeros((), dtype=torch.float32)
        parts = [zero, zero]
        if mlm is not None:
            parts[0] = masked_loss(self.model, mlm, micro_batch) * (micro_batch.counts.labels / max(1, whole.labels))
        if nsp is not None:
            labels = micro_batch.batch.sentence_labels()
            parts[1] = F.cross_entropy(nsp.float(), labels, reduction="sum") / whole.sequences
        return torch.stack([part.float() for part in parts])

    @torch.no_grad()
    def scores(self, micro_batch: MicroBatch) -> Tensor:
        """(4,) float64: sums over the micro-batch of MLM loss, correct words, NSP loss, correct sentences."""
        states = states_of(self.model, micro_batch)
        mlm, nsp = states.mlm, states.nsp
        sums = torch.zeros(4, dtype=torch.float64, device=micro_batch.labelled.device)
        if mlm is not None:
            labels = micro_batch.batch.labels.index_select(0, micro_batch.labelled)
            for rows, targets in zip(mlm.split(_LOGIT_ROWS), labels.split(_LOGIT_ROWS), strict=True):
                sums[:2] += _scores(self.model.predictions(rows), targets)
        if nsp is not None:
            sums[2:] += _scores(nsp, micro_batch.batch.sentence_labels())
        return sums

    def denominators(self, counts: Counts) -> tuple[float, float]:
        """The counts over which the two losses of `scores` are sums."""
        return counts.labels, counts.sequences


def masked_loss(model: BertPreTrainedModel, states: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The mean at the labelled tokens. Without any, a 0 with a gradient for every parameter, as DDP expects."""
    head = model.predictions
    if not len(states):
        return head(states).sum()
    return head.loss(states, micro_batch.batch.labels.index_select(0, micro_batch.labelled))


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """(2,) float64: the sum of the cross entropies, and the number of correct argmaxes."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return torch.stack([loss.double(), (logits.argmax(dim=1) == labels).sum().double()])


def training_flops(
    config: BertConfig, objective: str, tokens: int, sequences: int, labels: int, squares: float
) -> float:
    """FLOPs of a step's matrix products: forward, and twice that for backward. Recomputed activations do not count.

    Forward: 2 per layer weight and token, but for the last layer past its attention per token that a head reads (where
    nothing shows the others: a hook, or the distillation of hidden states); 4 L E per pair of tokens that attend
    to each other (`squares`, the sum of the squared lengths, as if no layer had a window); the MLM head per label;
    pooler and NSP head per sequence; RTD's head per token, without its generator.
    """
    E, F_, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    products = 3 if family_of(config.model_type).gated else 2
    keys = 2 * config.key_heads / config.num_attention_heads
    read = labels * (objective != "nsp") + sequences * (objective != "mlm")
    read = tokens if objective == "rtd" else read
    past = E * E + products * E * F_  # the weights past attention
    forward = 2.0 * (L * (1 + keys) * E * E * tokens + past * ((L - 1) * tokens + read)) + 4.0 * L * E * squares
    if objective == "rtd":
        return 3.0 * (forward + 2.0 * (E * E + E) * tokens)
    if objective != "nsp":
        forward += 2.0 * (E * E + E * V) * labels
    if objective != "mlm":
        forward += 2.0 * (E * E + 2 * E) * sequences
    return 3.0 * forward
