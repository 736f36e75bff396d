"""Pre-training: the training loop on packed batches of plain text, in any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.model import BertPreTrainedModel
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.average import WeightAverage
from fastbert.training.batches import PackedBatches, PretrainingBatch
from fastbert.training.distributed import Processes
from fastbert.training.loop import AUTOCAST, Trainer, TrainingError
from fastbert.training.mixture import Mixture
from fastbert.training.objective import Counts, MicroBatch, Objective
from fastbert.training.schedule import ramp
from fastbert.training.settings import Settings
from fastbert.training.sharding import shard


class _Extras:
    """Parts of a run that are saved and loaded with its checkpoints."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts

    def save(self, folder: Path) -> None:
        for part in self._parts:
            part.save(folder)

    def load(self, folder: Path) -> None:
        for part in self._parts:
            part.load(folder)


class Pretraining(Trainer):
    """One run; see Trainer.

    Args:
        model: of the class that the objective needs; to resume, with the checkpoint's weights.
        batches: this process's endless batches, at the start; `resume` moves them.
        heldout: makes the batches of an evaluation, the same each time; None without held-out text.
        device: device to train on; None for the model's. If it is given, a model to be sharded may be on the host.
        objective: the objective of this model; None for the losses of its own heads.
    """

    settings: Settings

    def __init__(
        self,
        settings: Settings,
        model: BertPreTrainedModel,
        tokenizer: Tokenizer,
        batches: PackedBatches | Mixture,
        heldout: Callable[[], Iterable[PretrainingBatch]] | None = None,
        *,
        device: torch.device | None = None,
        processes: Processes | None = None,
        peak_flops: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.batches, self.heldout = batches, heldout
        training, device, processes = settings.training, device or model.device, processes or Processes()
        if training.precision == "fp16" and device.type != "cuda":
            raise ValueError(f"training.precision is 'fp16', which needs a CUDA device; {device} takes 'bf16'")
        if training.keep_best and heldout is None:
            raise ValueError("training.keep_best is true, and there is no held-out text to know the best by")
        sharded = training.sharding == "full" and processes.world_size > 1
        if sharded and objective is not None:
            raise ValueError(
                "training.sharding is 'full', which is for the losses of the model's own heads; use 'none'"
            )
        if training.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self.objective = objective or Objective(model)
        self.parts = self.objective.parts
        self.unreported = {"mlm": "nsp_loss", "nsp": "mlm_loss"}.get(training.objective)  # its head is missing
        self.average = None if training.ema is None else WeightAverage(self.objective.to(device).models, training.ema)
        if sharded:
            shard(self.objective, device, AUTOCAST[training.precision])
        super().__init__(
            settings,
            model,
            tokenizer,
            trained=self.objective.trained,
            extra=_Extras([e for e in (self.objective.extra, self.average) if e is not None]),
            replica=self.objective if sharded else processes.replicate(self.objective.to(device)),
            device=device,
            processes=processes,
            sharded=sharded,
            peak_flops=peak_flops,
        )
        self._stream = iter(batches)

    def next_step(self) -> list[MicroBatch]:
        data, step, steps = self.settings.data, self.step, self.settings.total_steps
        limits: dict[str, Any] = {}
        if data.batch_start is not None:
            tokens = ramp(step, data.batch_start, data.tokens_per_batch, data.batch_warmup_steps)
            limits["tokens"] = int(tokens)
        if data.length_start is not None:
            longest = self.model.config.max_length
            length = ramp(step, data.length_start, longest, data.length_warmup_steps)
            limits["length"] = None if step >= data.length_warmup_steps else int(length)
        if data.mask_probability_end is not None:
            limits["probability"] = ramp(step, data.mask_probability, data.mask_probability_end, steps)
        if data.anneal_weights and step >= (1 - data.anneal_share) * steps:
            limits["weights"] = data.anneal_weights
        if limits:
            self.batches.limit(**limits)
        return [self._micro_batch(next(self._stream)) for _ in range(self.settings.training.accumulate)]

    def _micro_batch(self, batch: PretrainingBatch) -> MicroBatch:
        return MicroBatch.of(batch, self.model.config, self.settings.training.objective, self.device)

    def losses(self, batch: MicroBatch, whole: Counts) -> Tensor:
        return self.replica(batch, whole)

    def evaluate_heldout(self) -> tuple[dict[str, float], list[str]]:
        """The losses and accuracies on held-out text, without dropout."""
        assert self.heldout is not None, "`due` has seen to it"
        self.replica.eval()
        sums, counts = torch.zeros(4, dtype=torch.float64), Counts()
        averaged = nullcontext() if self.average is None else self.average.in_place()
        with torch.no_grad(), self.autocast(), averaged:
            for batch in self.heldout():
                micro_batch = self._micro_batch(batch)  # in the last one, a process may have no sequence
                sums += self.objective(micro_batch).cpu()
                counts += micro_batch.counts
        if self.sharded:
            self.objective.reshard()  # in training, backward does this
        totals = torch.tensor(self.objective.denominators(counts), dtype=torch.float64)
        *parts, labels, others = self.processes.gather(torch.cat([sums, totals])).sum(dim=0).tolist()
        if not others:
            raise TrainingError("the held-out shards hold no batch")
        figures = self.named([parts[0] / max(1, labels), parts[2] / others])
        objective = self.settings.training.objective
        figures |= {"mlm_accuracy": parts[1] / max(1, labels)} if objective != "nsp" else {}
        figures |= {"nsp_accuracy": parts[3] / others} if "nsp" in objective else {}
        figures |= {"rtd_accuracy": parts[3] / others} if objective == "rtd" else {}
        self.heldout_loss = figures["loss"]
        return figures, []

    def after_update(self) -> None:
        if self.average is not None:
            self.average.update(self.step + 1)

    def due(self) -> tuple[bool, bool, bool]:
        report, evaluate, save = super().due()
        return report, evaluate and self.heldout is not None, save

    def decisive(self) -> dict[str, Any]:
        return self.settings.decisive()

    def position(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def move_to(self, position: dict[str, Any]) -> None:
        self.batches.load_state_dict(position)
