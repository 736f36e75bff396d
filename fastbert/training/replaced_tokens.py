"""Replaced-token detection, ELECTRA's objective: a small generator fills masks, and the model finds what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.model import BertPreTrainedModel
from fastbert.model.heads import ModelForMaskedLM
from fastbert.training.objective import Counts, MicroBatch, Objective, masked_loss, states_of

FOLDER = "generator"  # in a checkpoint
_LOGIT_ROWS = 1024  # rows of logits at a time


def generator_config(config: BertConfig, share: float) -> BertConfig:
    """The config of a generator: the model's, with a share of its heads, so of its width, and of its inner width."""
    head = config.hidden_size // config.num_attention_heads
    heads = max(1, round(config.num_attention_heads * share))
    sizes = {
        "num_attention_heads": heads,
        "hidden_size": heads * head,
        "intermediate_size": max(1, round(config.intermediate_size * share)),
        "embedding_size": config.embedding_size or config.hidden_size,
    }
    return BertConfig.from_dict({**config.to_dict(), **sizes})


class ReplacedTokens(Objective):
    """The generator's masked-language loss and, by weight, the model's loss at every token; both share embeddings.

    `rtd_loss` is the weighted one, in training and in evaluations.

    Source: Clark et al. (2020), "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators".

    Args:
        model: ElectraForPreTraining.
        generator: an ELECTRA with the masked-language head, of the same embedding size; gets the model's embeddings.
        weight: of the model's loss.
    """

    parts = ("mlm_loss", "rtd_loss")

    def __init__(self, model: BertPreTrainedModel, generator: ModelForMaskedLM, weight: float) -> None:
        super().__init__(model)
        generator.electra.embeddings = model.electra.embeddings
        generator.tie_weights()
        self.generator, self.weight = generator, weight

    @property
    def trained(self) -> nn.Module:
        return self

    @property
    def models(self) -> dict[str, BertPreTrainedModel]:
        return {"": self.model, FOLDER: self.generator}

    @property
    def extra(self) -> Any:
        return self

    def save(self, folder: Path) -> None:
        self.generator.save_pretrained(folder / FOLDER)

    def load(self, folder: Path) -> None:
        self.generator.load_state_dict(ModelForMaskedLM.from_pretrained(folder / FOLDER).state_dict())

    def forward(self, micro_batch: MicroBatch, whole: Counts | None = None) -> Tensor:
        """(2,): this micro-batch's share of both losses of the step; `scores` without a whole."""
        if whole is None:
            return self.scores(micro_batch)
        states = states_of(self.generator, micro_batch).mlm
        assert states is not None, "the generator has the head"
        filled = self._filled(states, micro_batch)
        words = masked_loss(self.generator, states, micro_batch) * (micro_batch.counts.labels / max(1, whole.labels))
        logits, replaced = self._judged(filled, micro_batch)
        found = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="sum") / whole.tokens
        return torch.stack([words.float(), self.weight * found.float()])

    @torch.no_grad()
    def _filled(self, states: Tensor, micro_batch: MicroBatch) -> Tensor:
        """(T,): the tokens with samples of the generator at the labelled ones."""
        batch, labelled = micro_batch.batch, micro_batch.labelled
        tokens = batch.input_ids.clone()
        for rows, places in zip(states.split(_LOGIT_ROWS), labelled.split(_LOGIT_ROWS), strict=True):
            logits = self.generator.predictions(rows).float()
            noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
            tokens[places] = (logits + noise).argmax(dim=1)
        return tokens

    def _judged(self, filled: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(T,) logits, and (T,) whether a token is another than in the text."""
        batch, labelled = micro_batch.batch, micro_batch.labelled
        replaced = torch.zeros(len(filled), dtype=torch.bool, device=filled.device)
        replaced[labelled] = filled[labelled] != batch.labels[labelled]
        output = self.model(
            filled,
            token_type_ids=batch.token_type_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            return_dict=True,
        )
        return output.logits.float(), replaced

    @torch.no_grad()
    def scores(self, micro_batch: MicroBatch) -> Tensor:
        """(4,) float64: sums of the generator's loss and right words, and of the model's weighted one and right tokens.

        What the generator draws is the same each time.
        """
        states = states_of(self.generator, micro_batch).mlm
        assert states is not None, "the generator has the head"
        labels = micro_batch.batch.labels.index_select(0, micro_batch.labelled)
        logits = self.generator.predictions(states).float()
        sums = torch.zeros(4, dtype=torch.float64, device=labels.device)
        sums[0] = F.cross_entropy(logits, labels, reduction="sum")
        sums[1] = (logits.argmax(dim=1) == labels).sum()
        devices = [labels.device] if labels.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            filled = self._filled(states, micro_batch)
        judged, replaced = self._judged(filled, micro_batch)
        sums[2] = self.weight * F.binary_cross_entropy_with_logits(judged, replaced.float(), reduction="sum")
        sums[3] = ((judged > 0) == replaced).sum()
        return sums

    def denominators(self, counts: Counts) -> tuple[float, float]:
        return counts.labels, counts.tokens
