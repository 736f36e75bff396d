"""The settings that follow from a model's folder and from the training data: prompts, length, loss, score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fastbert.checkpoint.hub import resolve_file, resolve_folder
from fastbert.checkpoint.json_files import read_json
from fastbert.inference.sentence_settings import prompt_named, read_settings
from fastbert.training.finetune.examples import DataError
from fastbert.training.finetune.pair_examples import VectorExample
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.vectors.losses import LOSSES, USUAL
from fastbert.training.vectors.model import SETTINGS, TRANSFORMER

_KINDS = {
    "pairs": "pairs or triplets without a label",
    "classes": "texts with a class",
    "scored": "pairs with a score",
    "margins": "triplets with a teacher's margins",
    "scores": "triplets with a teacher's scores",
}
_SYMMETRIC = ("classes", "scored")  # kinds in which no text is a query, and none a document


@dataclass(frozen=True)
class TextSettings:
    """A model's folder and its sentence-transformers settings of texts; None and empty without such files."""

    folder: str | Path  # of the encoder
    revision: str | None = None
    max_length: int | None = None
    lower_case: bool = False
    include_prompt: bool = True
    prompt: str = ""  # the default one
    prompts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path, revision: str | None, settings: FinetuneSettings) -> Self:
        """The settings of a folder or hub id, as the task of a run uses them."""
        if not settings.of_vectors:
            return cls(path, revision)
        if settings.task == "sparse-embedding":
            found = {name: _optional(path, name, revision) for name in (TRANSFORMER, SETTINGS)}
            prompts = found[SETTINGS].get("prompts") or {}
            longest, named = found[TRANSFORMER].get("max_seq_length"), found[SETTINGS].get("default_prompt_name")
            return cls(path, revision, longest, prompt=prompts.get(named) or "", prompts=prompts)
        return cls._of_sentences(path, revision)

    @classmethod
    def _of_sentences(cls, path: str | Path, revision: str | None) -> Self:
        found = read_settings(path, None, None, revision)
        folder: str | Path = path
        if found.transformer and found.modules_file is not None:
            folder = resolve_folder(path, found.transformer, revision=revision, named_by=found.modules_file)
            revision = None
        how = (found.max_length, found.lower_case, found.include_prompt, found.prompt, found.prompts)
        return cls(folder, revision, *how)


def _optional(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON object of a model's folder, empty where there is none."""
    file = resolve_file(path, name, revision=revision, required=False)
    return {} if file is None else read_json(file)


def with_loss(settings: FinetuneSettings, examples: Sequence, start: TextSettings) -> FinetuneSettings:
    """The settings with those that follow from the training examples and the model: the loss, the score, the prompts.

    Raises:
        ValueError: a setting does not fit the loss or the kind of the examples.
    """
    if not isinstance(examples[0], VectorExample):
        return replace(settings, loss=settings.loss or "binary")
    kind, texts = examples[0].kind, len(examples[0].texts)
    loss = settings.loss or USUAL.get(kind, "distillation")
    if settings.scale is not None and not LOSSES[loss].scaled:
        raise ValueError(f"scale is {settings.scale:g}; loss {loss!r} has none")
    if settings.batch_size == 1 and LOSSES[loss].across_rows and (texts < 3 or loss != "ranking"):
        raise ValueError(f"batch_size is 1; loss {loss!r} compares the examples of a batch, so it must be at least 2")
    if kind in _SYMMETRIC and settings.document_prompt is not None:
        raise ValueError(
            f"document_prompt is {settings.document_prompt!r}; {_KINDS[kind]} have no documents: query_prompt goes "
            "before each text"
        )
    changes: dict[str, Any] = {"loss": loss, "include_prompt": start.include_prompt}
    if settings.best is None and kind == "scored":
        changes["best"] = "spearman"
    if settings.query_prompt is None:
        named = prompt_named(start.prompts, start.prompt, "query")
        changes["query_prompt"] = start.prompt if kind in _SYMMETRIC else named
    if settings.document_prompt is None and kind not in _SYMMETRIC:
        changes["document_prompt"] = prompt_named(start.prompts, start.prompt, "document", "passage")
    return replace(settings, **changes)


def check_loss(settings: FinetuneSettings, losses: Sequence[str], examples: Sequence) -> None:
    """Checks that the loss learns from these examples, and that they have the score that selects the best checkpoint.

    Args:
        losses: of the task.

    Raises:
        DataError: the examples are of another kind.
        ValueError: they lack the score.
    """
    if not isinstance(examples[0], VectorExample):
        return
    kind, where, loss = examples[0].kind, examples[0].where, str(settings.loss)
    if kind not in LOSSES[loss].learns_from:
        known = " or ".join(_KINDS[name] for name in LOSSES[loss].learns_from)
        raise DataError(f"{where}: the examples are {_KINDS[kind]}; loss {loss!r} learns from {known}")
    if loss not in losses:
        raise DataError(
            f"{where}: the examples are {_KINDS[kind]}, from which {settings.task} does not learn; its losses are "
            f"{', '.join(losses)}"
        )
    of_scored = settings.best in ("spearman", "pearson")
    if settings.best not in (None, "loss") and of_scored != (kind == "scored"):
        raise ValueError(f"best is {settings.best!r}, which {_KINDS[kind]} do not have")
