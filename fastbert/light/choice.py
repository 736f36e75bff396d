"""Whether the light engine does what a command was asked for, or torch is needed, and why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastbert.checkpoint.hub import resolve_file, resolve_folder
from fastbert.checkpoint.stored_tensors import SAFETENSORS, SAFETENSORS_INDEX
from fastbert.config import BertConfig, family_of
from fastbert.engine.library import available
from fastbert.inference.sentence_settings import FUSED, read_settings
from fastbert.lazy import needs_torch
from fastbert.light.classifiers import TASKS
from fastbert.light.heads import needs_torch_for
from fastbert.light.weights import DTYPES, STORED, Weights

_GPU = Path("/proc/driver/nvidia/version")  # of the driver; to ask torch takes its import


def reason_for_torch(
    path: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    revision: str | None = None,
) -> str | None:
    """What of a command's options, or of a model, needs torch; None if nothing does.

    Args:
        task: of a pipeline; None for vectors.
    """
    if (reason := available()) is not None:
        return reason
    if device not in (None, "cpu"):
        return f"--device {device}"
    if device is None and _GPU.exists() and importlib.util.find_spec("torch") is not None:
        return "a GPU"
    if precision is not None:
        return f"--precision {precision}"
    if dtype not in (None, *DTYPES):
        return f"--dtype {dtype}"
    if task is not None and task not in TASKS:
        return task
    folder, found = path, None
    if task is None:
        settings = read_settings(path, None, None, revision)
        if settings.transformer and settings.modules_file is not None:
            folder = resolve_folder(path, settings.transformer, revision=revision, named_by=settings.modules_file)
            revision = None
        for module in (*settings.token_modules, *settings.modules):
            if module.kind == "Dense" and module.activation not in FUSED:
                found = f"the activation {module.activation}"
    config = BertConfig.from_pretrained(folder, revision=revision)
    if found is None:
        family = family_of(config.model_type)
        found = needs_torch_for(config, None if task is None else getattr(family, TASKS[task].head))
    if found is None and not any(
        resolve_file(folder, name, revision=revision, required=False) for name in (SAFETENSORS, SAFETENSORS_INDEX)
    ):
        found = "a pickled checkpoint"
    if found is None and dtype is None:
        stored = Weights(folder, revision, family_of(config.model_type)).stored
        if STORED[stored] != {"F32": "float32", "BF16": "bfloat16"}.get(stored):
            found = f"weights stored as {stored}, unless --dtype says float32 or bfloat16,"
    return found


def light_or_torch(path: str | Path, **asked: Any) -> bool:
    """True if the light engine runs what is asked, see `reason_for_torch`; False if torch does.

    Raises:
        ImportError: torch is needed, and not installed.
    """
    reason = reason_for_torch(path, **asked)
    if reason is not None and importlib.util.find_spec("torch") is None:
        raise needs_torch(reason)
    return reason is None
