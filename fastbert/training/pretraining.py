"""Pre-training: the training loop on packed batches of plain text, in any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.model import BertPreTrainedModel
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.batches import PackedBatches, PretrainingBatch
from fastbert.training.distributed import Processes
from fastbert.training.loop import AUTOCAST, Trainer, TrainingError
from fastbert.training.objective import Counts, MicroBatch, Objective
from fastbert.training.settings import Settings
from fastbert.training.sharding import shard


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
        batches: PackedBatches,
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
        if sharded:
            shard(self.objective, device, AUTOCAST[training.precision])
        super().__init__(
            settings,
            model,
            tokenizer,
            trained=self.objective.trained,
            extra=self.objective.extra,
            replica=self.objective if sharded else processes.replicate(self.objective.to(device)),
            device=device,
            processes=processes,
            sharded=sharded,
            peak_flops=peak_flops,
        )
        self._stream = iter(batches)

    def next_step(self) -> list[MicroBatch]:
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
        with torch.no_grad(), self.autocast():
            for batch in self.heldout():
                micro_batch = self._micro_batch(batch)  # in the last one, a process may have no sequence
                sums += self.objective(micro_batch).cpu()
                counts += micro_batch.counts
        if self.sharded:
            self.objective.reshard()  # in training, backward does this
        totals = torch.tensor([counts.labels, counts.sequences], dtype=torch.float64)
        *parts, labels, sequences = self.processes.gather(torch.cat([sums, totals])).sum(dim=0).tolist()
        if not sequences:
            raise TrainingError("the held-out shards hold no batch")
        figures = self.named([parts[0] / max(1, labels), parts[2] / sequences])
        objective = self.settings.training.objective
        figures |= {"mlm_accuracy": parts[1] / max(1, labels)} if "mlm" in objective else {}
        figures |= {"nsp_accuracy": parts[3] / sequences} if "nsp" in objective else {}
        self.heldout_loss = figures["loss"]
        return figures, []

    def due(self) -> tuple[bool, bool, bool]:
        report, evaluate, save = super().due()
        return report, evaluate and self.heldout is not None, save

    def decisive(self) -> dict[str, Any]:
        return self.settings.decisive()

    def position(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def move_to(self, position: dict[str, Any]) -> None:
        self.batches.load_state_dict(position)
