"""The logs of a run: log.jsonl, TensorBoard event files and the progress line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import naming, write_text
from fastbert.progress import duration
from fastbert.training.objective import Counts

LOG, EVENTS = "log.jsonl", "tensorboard"


class Log:
    """Writes figures by step. On resume, lines and events of steps after `step` are dropped, as these steps rerun.

    Args:
        folder: folder of the run's output.
        step: number of steps done before.
        tensorboard: whether to write event files as well.

    Raises:
        ValueError: a line of the log is damaged.
        ModuleNotFoundError: tensorboard is set and the package is not installed.
        OSError: the disk is full; names the file or the folder of event files.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self._event_folder = folder / EVENTS
        self._events = None
        if tensorboard:
            with naming(self._event_folder):
                self._events = summary_writer()(str(self._event_folder), purge_step=step + 1 if step else None)
        path = folder / LOG
        kept = [line for line in _lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        """Writes a line of the log, {"step": ..., "kind": "train" or "heldout", ...}, and a scalar for each number."""
        with naming(self._file.name):
            self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
            self._file.flush()
        if self._events is not None:
            with naming(self._event_folder):
                for name, value in figures.items():
                    if value is not None:
                        self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        with naming(self._file.name):
            self._file.close()
        if self._events is not None:
            with naming(self._event_folder):
                self._events.close()


def summary_writer(asked: str = "output.tensorboard is true", off: str = "set output.tensorboard=false") -> type:
    """TensorBoard's SummaryWriter.

    Raises:
        ModuleNotFoundError: it is not installed; names the setting that needs it and how to turn that off.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{asked} and tensorboard is not installed: pip install 'fastbert-engine[train]', or {off}"
        ) from error
    return SummaryWriter


def _lines(path: Path) -> list[dict]:
    """The complete lines of a log; after a kill, the last one may be incomplete."""
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is damaged: {text[:80]!r} is no line of a log") from None
        found.append(line)
    return found


def progress_line(step: int, steps: int, figures: dict[str, Any], seconds_left: float) -> str:
    """Formats a report of the loop as one line."""
    losses = [
        f"{part.upper()} loss {figures[f'{part}_loss']:.4f}" for part in ("mlm", "nsp") if f"{part}_loss" in figures
    ]
    if not losses and "loss" in figures:
        losses = [f"loss {figures['loss']:.4f}"]
    parts = [f"step {step:,}/{steps:,}", *losses, f"lr {figures['learning_rate']:.2e}"]
    parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if figures.get("mfu") is not None:
        parts.append(f"MFU {figures['mfu']:.1%}")
    return ", ".join([*parts, f"{duration(seconds_left)} left"])


class Meter:
    """Measures the speed since the last report, without evaluations and checkpoints."""

    def __init__(self, peak_flops: float | None, devices: int) -> None:
        self._peak = None if peak_flops is None else peak_flops * devices
        self.seconds_per_step = 0.0
        self._clear()

    def add(self, whole: Counts) -> None:
        """Adds the counts of one step."""
        self._whole += whole
        self._steps += 1

    def pause(self) -> None:
        """Excludes the time until `restart`. The device must have finished the work before."""
        self._seconds += time.perf_counter() - self._since

    def restart(self) -> None:
        self._since = time.perf_counter()

    def figures(self) -> dict[str, float | None]:
        """tokens/s, MFU (FLOP/s as a share of the peak) and seconds since the last call."""
        seconds = max(self._seconds + time.perf_counter() - self._since, 1e-9)
        mfu = None if self._peak is None else self._whole.flops / seconds / self._peak
        figures = {"tokens_per_second": self._whole.tokens / seconds, "mfu": mfu, "seconds": seconds}
        self.seconds_per_step = seconds / max(1, self._steps)
        self._clear()
        return figures

    def _clear(self) -> None:
        self._whole, self._steps, self._seconds = Counts(), 0, 0.0
        self._since = time.perf_counter()
