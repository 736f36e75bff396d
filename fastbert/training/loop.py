"""The pre-training loop, read top to bottom."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbert.model import BertPreTrainedModel
from fastbert.tokenization import BertTokenizer
from fastbert.training.batches import PretrainingBatch
from fastbert.training.distributed import Processes
from fastbert.training.logs import Log, Meter, ProgressLine
from fastbert.training.objective import Counts, MicroBatch, Objective
from fastbert.training.optimizer import clip_gradients, make_optimizer
from fastbert.training.schedule import make_schedule
from fastbert.training.settings import Settings
from fastbert.training.sharding import gather_state, shard
from fastbert.training.training_state import (
    CheckpointError,
    Checkpoints,
    TrainingState,
    load_optimizer,
    read_state,
    save_optimizer,
    seed_step,
)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


class Batches(Protocol):
    """Training batches without end, the same at the same position."""

    def __iter__(self) -> Iterator[PretrainingBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the steps done, the newest checkpoint, the signal that stopped it if one did."""

    step: int
    checkpoint: Path | None  # None in a process that does not write
    signal: int | None = None


class Pretraining:
    """One run, in one process of those that share it.

    Args:
        settings: all of them; the output's folder is where checkpoints and logs go.
        model: of the class that the objective asks for, in float32.
        tokenizer: saved with each checkpoint.
        batches: of this process, at the start; `resume` moves them.
        heldout: makes the batches of an evaluation, the same each time; None where there is no held-out text.
        device: where to train; None where the model is. One that is to be sharded may then stay on the host.
        processes: which one this is.
        peak_flops: of one device, for MFU; None leaves MFU out.
        objective: of this model; None: the losses of the model's own heads.
    """

    def __init__(
        self,
        settings: Settings,
        model: BertPreTrainedModel,
        tokenizer: BertTokenizer,
        batches: Batches,
        heldout: Callable[[], Iterable[PretrainingBatch]] | None = None,
        *,
        device: torch.device | None = None,
        processes: Processes | None = None,
        peak_flops: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.batches, self.heldout, self.peak_flops = batches, heldout, peak_flops
        self.processes = processes or Processes()
        self.device = device or model.device
        training = settings.training
        if training.precision == "fp16" and self.device.type != "cuda":
            raise ValueError(f"training.precision is 'fp16', which needs a CUDA device; {self.device} takes 'bf16'")
        if training.keep_best and heldout is None:
            raise ValueError("training.keep_best is true, and there is no held-out text to know the best by")
        if training.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self.objective = objective or Objective(model)
        self.sharded = training.sharding == "full" and self.processes.world_size > 1
        if self.sharded and objective is not None:
            raise ValueError(
                "training.sharding is 'full', which is for the losses of the model's own heads; use 'none'"
            )
        self.replica: nn.Module = self.objective
        if self.sharded:
            shard(self.objective, self.device, AUTOCAST[training.precision])
        else:
            self.replica = self.processes.replicate(self.objective.to(self.device))
        self.optimizer = make_optimizer(self.objective, settings.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.precision == "fp16")
        self.schedule = make_schedule(
            settings.schedule.shape,
            settings.optimizer.lr,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.total_steps,
        )
        self.checkpoints = open_checkpoints(settings)
        self.step, self._saved = 0, -1  # steps done; at the newest checkpoint
        self._unlogged: list[Any] = []  # (the losses, gradient norm) of each step since the last log line
        self._heldout_loss: Any = None  # of the weights as they are now

    def run(self) -> Outcome:
        """Trains to the last step, or to the end of the step in which SIGTERM or SIGINT arrives, and saves.

        Raises:
            TrainingError: a loss, in training or on held-out text, or a gradient that is not finite.
            CheckpointError: a checkpoint cannot be written.
        """
        training, first = self.settings.training, self.processes.first
        folder = Path(self.settings.output.folder)
        if first:
            self.checkpoints.tidy()
        self._log = Log(folder, step=self.step, tensorboard=self.settings.output.tensorboard) if first else None
        self._progress = ProgressLine(training.steps)
        self._meter = Meter(self.peak_flops, self.processes.world_size)
        batches = iter(self.batches)
        try:
            with signals() as received:
                while self.step < training.steps:
                    position = self.batches.state_dict()
                    micro_batches = [self._micro_batch(next(batches)) for _ in range(training.accumulate)]
                    whole, stop = self._agree(micro_batches, received())
                    if stop:
                        return Outcome(self.step, self._save(position), stop)
                    self._train(micro_batches, whole)
                    self._meter.add(whole)
                    if self._due(training.log_every):
                        self._report()
                    if self.heldout is not None and self._due(training.evaluate_every):
                        self._evaluate(self.heldout)
                    if self._due(training.save_every):
                        self._save(self.batches.state_dict())
            return Outcome(self.step, self.checkpoints.newest())
        finally:
            self._progress.close()
            if self._log is not None:
                self._log.close()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.training.steps

    def _micro_batch(self, batch: PretrainingBatch) -> MicroBatch:
        return MicroBatch.of(batch, self.model.config, self.settings.training.objective, self.device)

    def _agree(self, micro_batches: list[MicroBatch], stop: int) -> tuple[Counts, int]:
        """What all micro-batches of the step come to, and the signal on which all processes stop after it."""
        whole = sum((micro_batch.counts for micro_batch in micro_batches), Counts())
        table = self.processes.gather(torch.tensor([*astuple(whole), stop], dtype=torch.float64))
        return Counts(*table[:, :-1].sum(dim=0).tolist()), int(table[:, -1].max())

    def _train(self, micro_batches: list[MicroBatch], whole: Counts) -> None:
        """One step of the optimizer on the micro-batches of all processes."""
        seed_step(self.settings.training.seed, self.step, self.processes.rank)
        self.replica.train()
        losses = torch.zeros(len(self.objective.parts), device=self.device)
        for micro_batch in micro_batches:
            with self.processes.backward(self.replica, last=micro_batch is micro_batches[-1]):
                with self._autocast():
                    parts = self.replica(micro_batch, whole)
                # DDP takes the mean over the processes, and this is a sum.
                self.scaler.scale(parts.sum() * self.processes.world_size).backward()
            losses += parts.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.objective.parameters(), self.settings.optimizer.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._unlogged.append(torch.stack([*losses, norm]))  # stays on the device: nobody waits for it
        self.step += 1
        self._heldout_loss = None

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.settings.training.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _report(self) -> None:
        """The mean of the losses since the last report, with speed and time left."""
        rows = [row for row in self._figures() if all(map(math.isfinite, row))]
        skipped, self._unlogged = len(self._unlogged) - len(rows), []
        *losses, norm = torch.tensor(rows or [[0.0]], dtype=torch.float64).mean(dim=0).tolist()
        figures: dict[str, Any] = self._losses(losses) if rows else {}
        figures |= {"learning_rate": self.schedule(self.step - 1), "gradient_norm": norm}
        if self.scaler.is_enabled():
            figures |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": skipped}
        figures |= self._meter.figures()
        if self._log is not None:
            self._log.write(self.step, "train", figures)
            left = (self.settings.training.steps - self.step) * self._meter.seconds_per_step
            self._progress.show(self.step, figures, left)

    def _figures(self) -> list[list[float]]:
        """The unlogged figures of each step, summed over the processes, as numbers.

        Raises:
            TrainingError: one is not finite. (fp16 leaves out a step whose gradients overflow.)
        """
        fresh = [row for row in self._unlogged if isinstance(row, Tensor)]
        if fresh:
            table = self.processes.gather(torch.stack(fresh).cpu().double())
            rows = torch.cat([table[:, :, :-1].sum(dim=0), table[0, :, -1:]], dim=1)  # the norm is of the whole already
            self._unlogged[-len(fresh) :] = rows.tolist()
        first = self.step - len(self._unlogged)
        for step, row in enumerate(self._unlogged, start=first + 1):
            self._check_finite(step, row)
        return self._unlogged

    def _check_finite(self, step: int, row: list[float]) -> None:
        told = {"mlm_loss": "MLM loss", "nsp_loss": "next-sentence loss"}
        names = [*(told.get(name, name.replace("_", " ")) for name in self.objective.parts), "norm of the gradients"]
        bad = [f"{name} is {value}" for name, value in zip(names, row, strict=True) if not math.isfinite(value)]
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0:
            return
        if bad:
            raise TrainingError(f"step {step}: the {' and the '.join(bad)}; {self._kept()}")

    def _kept(self) -> str:
        good = self.checkpoints.newest()
        return f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"

    def _losses(self, values: Sequence[float]) -> dict[str, float]:
        """The first parts by name, without that of a head which the model has not, and their sum."""
        missing = {"mlm": "nsp_loss", "nsp": "mlm_loss"}.get(self.settings.training.objective)
        named = {n: value for n, value in zip(self.objective.parts, values, strict=False) if n != missing}
        return {"loss": sum(named.values()), **named}

    def _evaluate(self, heldout: Callable[[], Iterable[PretrainingBatch]]) -> None:
        """The losses and accuracies on held-out text, without dropout."""
        self._figures()  # an evaluation of what is not finite says nothing
        self._meter.pause()
        self.replica.eval()
        sums, counts = torch.zeros(4, dtype=torch.float64), Counts()
        with torch.no_grad(), self._autocast():
            for batch in heldout():
                micro_batch = self._micro_batch(batch)  # the last one may leave a process without a sequence
                sums += self.objective(micro_batch).cpu()
                counts += micro_batch.counts
        if self.sharded:
            self.objective.reshard()  # which a backward does otherwise
        totals = torch.tensor([counts.labels, counts.sequences], dtype=torch.float64)
        *parts, labels, sequences = self.processes.gather(torch.cat([sums, totals])).sum(dim=0).tolist()
        if not sequences:
            raise TrainingError("the held-out shards hold no batch")
        figures = self._losses([parts[0] / max(1, labels), parts[2] / sequences])
        objective = self.settings.training.objective
        figures |= {"mlm_accuracy": parts[1] / max(1, labels)} if "mlm" in objective else {}
        figures |= {"nsp_accuracy": parts[3] / sequences} if "nsp" in objective else {}
        self._heldout_loss = figures["loss"]
        if not math.isfinite(self._heldout_loss):
            raise TrainingError(f"step {self.step}: the loss on held-out text is {self._heldout_loss}; {self._kept()}")
        if self._log is not None:
            self._log.write(self.step, "heldout", figures)
            words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
            self._progress.say(f"step {self.step:,}, held-out text: {words}")
        self._meter.restart()

    def _save(self, position: dict[str, Any]) -> Path | None:
        """A checkpoint of this moment, at `position` of the data: its folder, in the process that writes."""
        unlogged, first = self._figures(), self.processes.first  # weights after a loss that is not finite are not saved
        if self._saved == self.step or not (first or self.sharded):
            return self.checkpoints.newest() if first else None
        self._meter.pause()
        self._saved = self.step
        weights = gather_state(self.model, keep=first) if self.sharded else None

        def write(folder: Path) -> None:
            if self.sharded:
                self.processes.wait()  # the folder is there
            save_optimizer(self.optimizer, self.objective.trained, folder)
            if first:
                self.model.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save_pretrained(folder)
                self.objective.save(folder)

        if not first:
            write(self.checkpoints.temporary(self.step))
            self._meter.restart()
            return None
        state = TrainingState(
            step=self.step,
            settings=self.settings.decisive(),
            data=position,
            scaler=self.scaler.state_dict(),
            unlogged=unlogged,
            heldout_loss=self._heldout_loss,
        )
        path = self.checkpoints.save(state, write)
        self._meter.restart()
        return path

    def resume(self, checkpoint: Path) -> None:
        """Goes back to the moment of a checkpoint, whose weights the model has already.

        Raises:
            CheckpointError: it cannot be read, or was made under other settings.
        """
        state = read_state(checkpoint)
        check_resumable(state, self.settings, checkpoint)
        self.objective.load(checkpoint)
        load_optimizer(self.optimizer, self.objective.trained, checkpoint)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        self.batches.load_state_dict(state.data)
        self.step, self._unlogged, self._heldout_loss = state.step, list(state.unlogged), state.heldout_loss
        self._saved = self.step


def open_checkpoints(settings: Settings) -> Checkpoints:
    """Those of the output's folder."""
    training = settings.training
    folder = Path(settings.output.folder) / "checkpoints"
    return Checkpoints(folder, keep=training.keep, keep_best=training.keep_best)


def check_resumable(state: TrainingState, settings: Any, checkpoint: Path) -> None:
    """That the run goes on under the settings it began with, as far as its weights follow from them.

    The number of processes is none of them: batches are cut for all together, and each takes its part. Nor is the
    length of a schedule that has come to its end: a longer one prolongs the run.
    """
    then = state.settings
    now, length = settings.decisive(), then.get("schedule.total_steps", math.inf)
    ended = state.step >= length and now["schedule.total_steps"] > length
    free = ("schedule.total_steps", "schedule.warmup_steps") if ended else ()
    changed = [
        f"{key} was {then.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if then.get(key) != value and key not in free
    ]
    if changed:
        raise CheckpointError(f"{checkpoint} was made under other settings: {'; '.join(changed)}")


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Keeps SIGTERM and SIGINT until somebody asks which came (0: none); a second one acts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received, kinds = [], (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def note(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield lambda: received[0] if received else 0
    finally:
        restore()
