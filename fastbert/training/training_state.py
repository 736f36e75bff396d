"""Checkpoints: folders in transformers' layout that also hold all state needed to resume a run.

    checkpoints/step-00001000/
        config.json, model.safetensors, the vocabulary    loaded by transformers
        optimizer.safetensors                             NAME/exp_avg, NAME/exp_avg_sq and NAME/step; or
        optimizer/                                        the same in shards, by torch.distributed.checkpoint
        training_state.json                               see TrainingState

A folder is written under a temporary name, flushed to disk, and renamed. So a folder with a checkpoint's name is always
complete, even after a kill. The schedule is a function of the step. The random numbers of a step are a function of the
seed, the step and the process (`seed_step`). Neither has state to save.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from fastbert.training.sharding import is_sharded, load_shards, save_shards, shapes_of_shards, shard_like

VERSION = 1
STATE, OPTIMIZER, OPTIMIZER_SHARDS = "training_state.json", "optimizer.safetensors", "optimizer"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".incomplete-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or resumed from; the message gives its path and the reason."""


@dataclass(frozen=True)
class TrainingState:
    """The content of training_state.json."""

    step: int  # steps done
    settings: dict[str, Any]  # the decisive ones, by section.key
    data: dict[str, Any]  # position in the shards
    scaler: dict[str, Any]  # state of fp16's loss scaler, else empty
    unlogged: list[list[float]]  # figures of the steps since the last log line
    heldout_loss: float | list[float] | None = None  # if this step was evaluated; lists compare item by item
    version: int = field(default=VERSION)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds the generators of Python, numpy and torch, on every device, for step `step` of process `rank`."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(4)
    value = int(words[0]) | int(words[1]) << 32
    random.seed(value)
    np.random.seed(words)
    torch.manual_seed(value)


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and with `keep_best` the one with the least held-out loss."""

    def __init__(self, folder: Path, *, keep: int, keep_best: bool = False) -> None:
        self.folder, self._keep, self._keep_best = folder, keep, keep_best

    def tidy(self) -> None:
        """Removes a killed process's leftovers: checkpoints partly written or partly removed."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)
        self._remove_old()

    def complete(self) -> list[Path]:
        """All complete checkpoints, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)

    def newest(self) -> Path | None:
        return self.complete()[-1] if self.complete() else None

    def last_good(self) -> str:
        """The phrase of an error message that names the newest checkpoint."""
        good = self.newest()
        return f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"

    def save(self, state: TrainingState, write: Callable[[Path], None]) -> Path:
        """Makes a checkpoint of `state` and of the files that `write(folder)` writes.

        Raises:
            CheckpointError: the disk is full or fails; earlier checkpoints are unchanged.
        """
        path, temporary = self._path(state.step), self.temporary(state.step)
        if path.exists():
            return path
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            write(temporary)
            (temporary / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
            for file in (*temporary.rglob("*"), temporary):
                _flush(file)
            os.rename(temporary, path)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{path} cannot be written: {_reason(error)}; {self.last_good()}") from error
        self._remove_old()
        return path

    def temporary(self, step: int) -> Path:
        """The temporary folder of `save`; other processes may write files into it while `write` waits for them."""
        return self.folder / f"{_TEMPORARY}{self._path(step).name}"

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _remove_old(self) -> None:
        paths = self.complete()
        kept = set(paths[-self._keep :])
        if self._keep_best:
            losses = {path: loss for path in paths if (loss := read_state(path).heldout_loss) is not None}
            kept |= {min(losses, key=losses.__getitem__)} if losses else set()
        for path in paths:
            if path not in kept:  # renamed first: a partly removed folder must not have a checkpoint's name
                removed = path.with_name(f"{_TEMPORARY}{path.name}")
                os.rename(path, removed)
                shutil.rmtree(removed)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> TrainingState:
    """The training_state.json of a checkpoint."""
    file = path / STATE
    try:
        state = TrainingState(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {_reason(error)}") from error
    if state.version != VERSION:
        raise CheckpointError(f"{file} has version {state.version}; this fastbert reads version {VERSION}")
    kinds = {"step": int, "settings": dict, "data": dict, "scaler": dict, "unlogged": list}
    for name, kind in kinds.items():
        if type(value := getattr(state, name)) is not kind:
            raise CheckpointError(f"{file} is damaged: {name} is {value!r}")
    return state


def save_optimizer(optimizer: Optimizer, model: nn.Module, folder: Path) -> None:
    """Writes the optimizer's tensors under their parameters' names; if they are sharded, each process its shard.

    Raises:
        OSError, SafetensorError: the disk is full or fails.
    """
    tensors = {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    if any(map(is_sharded, model.parameters())):
        save_shards(tensors, folder / OPTIMIZER_SHARDS)
    else:
        save_file(tensors, folder / OPTIMIZER)


def load_optimizer(optimizer: Optimizer, model: nn.Module, folder: Path) -> None:
    """Loads the tensors that `save_optimizer` wrote, possibly in another number of processes.

    Learning rates and other options are unchanged.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    file = folder / (OPTIMIZER_SHARDS if (folder / OPTIMIZER_SHARDS).is_dir() else OPTIMIZER)
    parameters = dict(model.named_parameters())

    def owner(full_name: str, shape: torch.Size) -> torch.Tensor:
        parameter = parameters.get(full_name.rpartition("/")[0])
        if parameter is None or (shape and shape != parameter.shape):
            raise CheckpointError(f"{file}: {full_name} of shape {tuple(shape)} fits no parameter of the model")
        return parameter.detach()

    try:
        if file.is_dir():
            shapes = shapes_of_shards(file)
            tensors = {k: torch.empty_like(owner(k, size)) if size else torch.empty(()) for k, size in shapes.items()}
            load_shards(tensors, file)
        else:
            tensors = {name: shard_like(tensor, owner(name, tensor.shape)) for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {_reason(error)}") from error
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(index[id(parameters[name])], {})[key] = tensor
    if missing := [name for name, p in parameters.items() if p.requires_grad and index[id(p)] not in state]:
        raise CheckpointError(f"{file} holds nothing of {missing[0]}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    """An error's reason on one line. safetensors wraps system errors and gives only their errno."""
    number = re.search(r"\b(?:os error|code:) (\d+)", str(error))
    if number:
        return os.strerror(int(number[1]))
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
