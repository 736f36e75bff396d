"""The training loop behind pre-training, fine-tuning and distillation, read top to bottom."""

from __future__ import annotations

import math
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.model import BertPreTrainedModel
from fastbert.progress import StatusLine, say
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.distributed import Processes
from fastbert.training.logs import Log, Meter, progress_line
from fastbert.training.objective import Counts
from fastbert.training.optimizer import clip_gradients, make_optimizer
from fastbert.training.schedule import make_schedule
from fastbert.training.settings import RunSettings
from fastbert.training.sharding import gather_state
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
_NAMES = {"mlm_loss": "MLM loss", "nsp_loss": "next-sentence loss"}  # of losses, in messages


class TrainingError(RuntimeError):
    """Training cannot continue; the message gives the reason and the last good checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, newest checkpoint, and the signal that stopped it, if any."""

    step: int
    checkpoint: Path | None  # None in a process that does not write
    signal: int | None = None

    def exit_code(self) -> int:
        """The command's exit code, which names the signal that stopped the run, if any."""
        if self.signal is None:
            return 0
        say(f"stopped by {signal.Signals(self.signal).name} after step {self.step:,}; --resume goes on")
        return 128 + self.signal


class Trainer(ABC):
    """One run in one of its processes: steps, log, evaluations, checkpoints, signals, resuming.

    A subclass defines data and losses by the methods up to `read`.

    Args:
        settings: settings of the run; checkpoints and logs go to the output's folder.
        model: in float32; saved with the tokenizer in each checkpoint.
        trained: the module whose parameters are trained: the model, or one that holds it.
        groups: parameter groups of the optimizer, by default `decay_groups`. A group's learning rate is the schedule's
            times its `rate`, if it has one.
        extra: its `save(folder)` and `load(folder)` handle the part of `trained` that is not in the model.
        replica: the module that `losses` runs, if it is not the model, for example DDP's wrapper.
        sharded: whether the parameters are sharded over the processes.
        peak_flops: peak FLOP/s of one device, for MFU; None leaves MFU out.
    """

    parts: tuple[str, ...] = ("loss",)  # names of what `losses` returns; their sum is minimised
    unreported: str | None = None  # the part that the log leaves out
    evaluation = ("heldout", "held-out text", "loss on held-out text")  # kind in the log, name, name of its loss

    def __init__(
        self,
        settings: RunSettings,
        model: BertPreTrainedModel,
        tokenizer: Tokenizer,
        *,
        trained: nn.Module,
        groups: list[dict] | None = None,
        extra: Any = None,
        replica: nn.Module | None = None,
        device: torch.device | None = None,
        processes: Processes | None = None,
        sharded: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        training, self.folder = settings.training, Path(settings.output.folder)
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.trained, self.extra, self.sharded = trained, extra, sharded
        self.replica = model if replica is None else replica
        self.device, self.processes, self.peak_flops = device or model.device, processes or Processes(), peak_flops
        self.optimizer = make_optimizer(trained, settings.optimizer, groups)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.precision == "fp16")
        shape = settings.schedule
        self.schedule = make_schedule(
            shape.shape,
            settings.optimizer.lr,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.total_steps,
            decay=shape.decay,
            decay_share=shape.decay_share,
        )
        self.checkpoints = open_checkpoints(self.folder, keep=training.keep, keep_best=training.keep_best)
        self.step, self._saved = 0, -1  # steps done; step of the newest checkpoint
        self.heldout_loss: float | list[float] | None = None  # of the current weights; see TrainingState
        self._unlogged: list[Any] = []  # (losses, gradient norm) of each step since the last log line

    @abstractmethod
    def next_step(self) -> Sequence[Any]:
        """The micro-batches of this process's next step, in order, each with its `counts`."""

    @abstractmethod
    def losses(self, batch: Any, whole: Counts) -> Tensor:
        """(len(parts),): a micro-batch's contribution to the parts of the step's loss; `whole` counts the step."""

    @abstractmethod
    def evaluate_heldout(self) -> tuple[dict[str, float], list[str]]:
        """The figures of an evaluation, including "loss", and remarks to print. Sets `heldout_loss`."""

    @abstractmethod
    def decisive(self) -> dict[str, Any]:
        """The settings, by name, that determine the weights. A run is resumed only with equal ones."""

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """The data position of the next step, for `move_to`; must be JSON."""

    @abstractmethod
    def move_to(self, position: dict[str, Any]) -> None: ...

    def read(self, folder: Path) -> None:
        """Reads the rest of a checkpoint besides optimizer and state; weights only if the model has others."""
        if self.extra is not None:
            self.extra.load(folder)

    def is_finished(self) -> bool:
        return self.step >= self.settings.training.steps

    def due(self) -> tuple[bool, bool, bool]:
        """Flags to log, to evaluate and to save after the step just done."""
        training = self.settings.training
        every = (training.log_every, training.evaluate_every, training.save_every)
        report, evaluate, save = (self.step % n == 0 or self.step == training.steps for n in every)
        return report, evaluate, save

    def run(self) -> Outcome:
        """Trains to the end, or to the end of the step in which SIGTERM or SIGINT arrives, and saves.

        Raises:
            TrainingError: a training loss, held-out loss or gradient is not finite.
            CheckpointError: a checkpoint cannot be written.
        """
        first = self.processes.first
        if first:
            self.checkpoints.tidy()
        tensorboard = self.settings.output.tensorboard
        self._log = Log(self.folder, step=self.step, tensorboard=tensorboard) if first else None
        self._progress, self._meter = StatusLine(), Meter(self.peak_flops, self.processes.world_size)
        try:
            with signals() as received:
                while not self.is_finished():
                    position = self.position()
                    batches = self.next_step()
                    whole, stop = self._agree(batches, received())
                    if stop:
                        return Outcome(self.step, self._save(position), stop)
                    self._train(batches, whole)
                    self._meter.add(whole)
                    report, evaluate, save = self.due()
                    if report:
                        self._report()
                    if evaluate:
                        self._evaluate()
                    if save:
                        self._save(self.position())
            return Outcome(self.step, self.checkpoints.newest())
        finally:
            self._progress.close()
            if self._log is not None:
                self._log.close()

    def _agree(self, batches: Sequence[Any], stop: int) -> tuple[Counts, int]:
        """Agrees over all processes: the step's total counts, and the signal (0: none) on which all stop before it."""
        whole = sum((batch.counts for batch in batches), Counts())
        table = self.processes.gather(torch.tensor([*astuple(whole), stop], dtype=torch.float64))
        return Counts(*table[:, :-1].sum(dim=0).tolist()), int(table[:, -1].max())

    def _train(self, batches: Sequence[Any], whole: Counts) -> None:
        """One optimizer step on the micro-batches of all processes."""
        seed_step(self.settings.training.seed, self.step, self.processes.rank)
        self.replica.train()
        losses = self.backward(batches, whole)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.trained.parameters(), self.settings.optimizer.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step) * group.get("rate", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()
        self._unlogged.append(torch.stack([*losses, norm]))  # on the device, so as not to wait for it
        self.step += 1
        self.heldout_loss = None

    def backward(self, batches: Sequence[Any], whole: Counts) -> Tensor:
        """Adds the gradients of a step over all processes; returns this process's share of the loss, (len(parts),)."""
        losses = torch.zeros(len(self.parts), device=self.device)
        for batch in batches:
            with self.processes.backward(self.replica, last=batch is batches[-1]):
                with self.autocast():
                    parts = self.losses(batch, whole)
                # DDP averages over the processes; the step's loss is a sum.
                self.scaler.scale(parts.sum() * self.processes.world_size).backward()
            losses += parts.detach()
        return losses

    def after_update(self) -> None:  # noqa: B027  (it may do nothing)
        """Is called with the new weights of each step."""

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.settings.training.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _report(self) -> None:
        """Logs the mean losses since the last report, speed, and remaining time."""
        rows = [row for row in self._figures() if all(map(math.isfinite, row))]
        skipped, self._unlogged = len(self._unlogged) - len(rows), []
        *losses, norm = torch.tensor(rows or [[0.0]], dtype=torch.float64).mean(dim=0).tolist()
        figures: dict[str, Any] = self.named(losses) if rows else {}
        figures |= {"learning_rate": self.schedule(self.step - 1), "gradient_norm": norm}
        if self.scaler.is_enabled():
            figures |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": skipped}
        figures |= self._meter.figures()
        if self._log is not None:
            self._log.write(self.step, "train", figures)
            steps = self.settings.training.steps
            left = (steps - self.step) * self._meter.seconds_per_step
            self._progress.show(progress_line(self.step, steps, figures, left))

    def _figures(self) -> list[list[float]]:
        """The unlogged figures of each step, summed over the processes, as numbers.

        Raises:
            TrainingError: one is not finite. (fp16 skips a step whose gradients overflow.)
        """
        fresh = [row for row in self._unlogged if isinstance(row, Tensor)]
        if fresh:
            table = self.processes.gather(torch.stack(fresh).cpu().double())
            rows = torch.cat([table[:, :, :-1].sum(dim=0), table[0, :, -1:]], dim=1)  # the norm is already global
            self._unlogged[-len(fresh) :] = rows.tolist()
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0:
            return self._unlogged
        names = [*(_NAMES.get(name, name.replace("_", " ")) for name in self.parts), "norm of the gradients"]
        for step, row in enumerate(self._unlogged, start=self.step - len(self._unlogged) + 1):
            bad = [f"{name} is {value}" for name, value in zip(names, row, strict=True) if not math.isfinite(value)]
            if bad:
                raise TrainingError(f"step {step}: the {' and the '.join(bad)}; {self.checkpoints.last_good()}")
        return self._unlogged

    def named(self, values: Sequence[float]) -> dict[str, float]:
        """The reported parts of a loss by name, and their sum as "loss"."""
        named = {n: value for n, value in zip(self.parts, values, strict=False) if n != self.unreported}
        return {"loss": sum(named.values()), **named}

    def _evaluate(self) -> None:
        self._figures()  # raises if a loss is not finite: then an evaluation is meaningless
        self._meter.pause()
        kind, name, loss = self.evaluation
        figures, remarks = self.evaluate_heldout()
        if not math.isfinite(figures["loss"]):
            raise TrainingError(f"step {self.step}: the {loss} is {figures['loss']}; {self.checkpoints.last_good()}")
        if self._log is not None:
            self._log.write(self.step, kind, figures)
            words = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())
            for message in (f"step {self.step:,}, {name}: {words}", *remarks):
                self._progress.say(message)
        self._meter.restart()

    def _save(self, position: dict[str, Any]) -> Path | None:
        """Saves a checkpoint with data position `position`; returns its folder in the process that writes."""
        unlogged, first = self._figures(), self.processes.first  # raises, before saving, if a loss is not finite
        if self._saved == self.step or not (first or self.sharded):
            return self.checkpoints.newest() if first else None
        self._meter.pause()
        self._saved = self.step
        weights = gather_state(self.model, keep=first) if self.sharded else None

        def write(folder: Path) -> None:
            if self.sharded:
                self.processes.wait()  # until the folder exists
            save_optimizer(self.optimizer, self.trained, folder)
            if first:
                self.model.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save_pretrained(folder)
                if self.extra is not None:
                    self.extra.save(folder)

        path = None
        if first:
            scaler, settings = self.scaler.state_dict(), self.decisive()
            state = TrainingState(self.step, settings, position, scaler, unlogged, self.heldout_loss)
            path = self.checkpoints.save(state, write)
        else:
            write(self.checkpoints.temporary(self.step))
        self._meter.restart()
        return path

    def resume(self, checkpoint: Path) -> None:
        """Restores the state of a checkpoint.

        Raises:
            CheckpointError: it cannot be read, or was made with other settings or data.
        """
        state = read_state(checkpoint)
        self._check_settings(state, checkpoint)
        self.read(checkpoint)
        load_optimizer(self.optimizer, self.trained, checkpoint)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        self.move_to(state.data)
        self.step, self._unlogged, self.heldout_loss = state.step, list(state.unlogged), state.heldout_loss
        self._saved = self.step

    def _check_settings(self, state: TrainingState, checkpoint: Path) -> None:
        """Checks that the settings that determine the weights are those that the run started with.

        The number of processes may change: batches are global, and each process takes its part. The length of a
        schedule that has ended may change as well: a longer one prolongs the run.
        """
        then, now = state.settings, self.decisive()
        length = then.get("schedule.total_steps", math.inf)
        ended = state.step >= length and now["schedule.total_steps"] > length
        free = ("schedule.total_steps", "schedule.warmup_steps") if ended else ()
        changed = [
            f"{key} was {then.get(key)!r} and is {value!r}"
            for key, value in now.items()
            if then.get(key) != value and key not in free
        ]
        if changed:
            raise CheckpointError(f"{checkpoint} was made under other settings: {'; '.join(changed)}")


def open_checkpoints(output: str | Path, *, keep: int = 1, keep_best: bool = True) -> Checkpoints:
    """The checkpoints of an output folder."""
    return Checkpoints(Path(output) / "checkpoints", keep=keep, keep_best=keep_best)


def newest_checkpoint(output: Path, name: str, *, resume: bool) -> Path | None:
    """The newest checkpoint in an output folder, to resume from; None to start again. `name` is the folder's setting.

    Raises:
        ValueError: the folder is a file, or holds a checkpoint and `resume` is false.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{name} {output} is a file; it must be a folder")
    newest = open_checkpoints(output).newest()
    if newest is not None and not resume:
        raise ValueError(f"{newest} is there already: --resume continues it; a new run takes another {name}")
    return newest


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Holds back SIGTERM and SIGINT; yields a function that returns the one received (0: none).

    A second signal has its usual effect.
    """
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
