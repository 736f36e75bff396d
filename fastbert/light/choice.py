"""A model for inference by the light engine or, where that does not do what was asked for, by torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.checkpoint.hub import resolve_file, resolve_folder
from fastbert.checkpoint.stored_tensors import SAFETENSORS, SAFETENSORS_INDEX, StoredTensors
from fastbert.config import BertConfig, family_of
from fastbert.engine.library import available
from fastbert.inference.sentence_settings import FUSED, read_settings
from fastbert.lazy import NeedsTorchError, needs_torch
from fastbert.light.classifiers import TASKS, Runner, pipeline
from fastbert.light.embedder import TextEmbedder
from fastbert.light.heads import needs_torch_for
from fastbert.light.weights import DTYPES, STORED, Weights
from fastbert.precision import LoadOptions

if TYPE_CHECKING:
    from fastbert.inference.base_embedder import BaseEmbedder
    from fastbert.tasks.base_runner import BaseRunner

_GPU = Path("/proc/driver/nvidia/version")  # of the driver; to ask torch takes its import


def load_embedder(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
    cache: str | Path | bool = False,
    **settings: Any,
) -> BaseEmbedder:
    """The embedder of a folder or hub id: light.TextEmbedder, or Embedder where torch is needed.

    Args:
        device: "cpu" or a torch device; None for a GPU, if there is one.
        dtype: "float32", "bfloat16" or "float16"; None for the stored one.
        precision, quantize, revision: as for Embedder.from_pretrained.
        threads, cache: as for TextEmbedder.from_pretrained; torch has its own threads, and keeps nothing.
        settings: of both classes' from_pretrained: pooling, say.

    Raises:
        ImportError: torch is needed, and not installed.
        ValueError: there is no such device; and as from_pretrained.
    """
    asked = {"device": device, "dtype": dtype, "precision": precision, "revision": revision}
    if light_or_torch(path, **asked):
        options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "revision": revision}
        return TextEmbedder.from_pretrained(path, **options, threads=threads, cache=cache, **settings)
    from fastbert.inference.embed import Embedder

    return Embedder.from_pretrained(path, **vars(LoadOptions.named(**asked, quantize=quantize)), **settings)


def load_pipeline(
    task: str,
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
    cache: str | Path | bool = False,
    **given: Any,
) -> Any:
    """The pipeline of a task: light.pipeline or, where torch is needed, fastbert.pipeline; see `load_embedder`.

    Args:
        given: of both: defaults of the task's arguments, say.
    """
    asked = {"device": device, "dtype": dtype, "precision": precision, "revision": revision}
    if light_or_torch(path, task=task, **asked):
        options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "revision": revision}
        return pipeline(task, path, **options, threads=threads, cache=cache, **given)
    from fastbert.tasks import pipelines

    return pipelines.pipeline(task, path, **vars(LoadOptions.named(**asked, quantize=quantize)), **given)


def embedder_of(runner: BaseRunner) -> BaseEmbedder:
    """The mean of the states of a pipeline's encoder, which both hold."""
    if isinstance(runner, Runner):
        return TextEmbedder(runner.model.encoder, runner.tokenizer)
    from fastbert.inference.embed import Embedder

    return Embedder(runner.model.base_model, runner.tokenizer)


def has_masked_lm(path: str | Path, config: BertConfig, revision: str | None = None) -> bool:
    """True if the weights of a folder or hub id have the masked-language-model head's."""
    family = family_of(config.model_type)
    try:
        stored: StoredTensors = Weights(path, revision, family, DTYPES[0])
    except NeedsTorchError:
        from fastbert.checkpoint.load import Checkpoint

        stored = Checkpoint(path, revision, family)
    return stored.missing_masked_lm(config.tie_word_embeddings) is None


def reason_for_torch(
    path: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    revision: str | None = None,
) -> str | None:
    """The option, or part of a model, that needs torch; None if there is none.

    Args:
        task: of a pipeline; None for vectors.
    """
    if (reason := available()) is not None:
        return reason
    if device not in (None, "cpu"):
        return f"device {device}"
    if device is None and _GPU.exists() and importlib.util.find_spec("torch") is not None:
        return "a GPU"
    if precision is not None:
        return f"precision {precision}"
    if dtype not in (None, *DTYPES):
        return f"dtype {dtype}"
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
        found = needs_torch_for(config, None if task is None else TASKS[task].parts(config))
    if found is None and not any(
        resolve_file(folder, name, revision=revision, required=False) for name in (SAFETENSORS, SAFETENSORS_INDEX)
    ):
        found = "a pickled checkpoint"
    if found is None and dtype is None:
        stored = Weights(folder, revision, family_of(config.model_type), tied=config.tie_word_embeddings).stored
        if STORED[stored] != {"F32": "float32", "BF16": "bfloat16"}.get(stored):
            found = f"weights stored as {stored}, unless dtype is float32 or bfloat16,"
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
