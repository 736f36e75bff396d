"""Converts options that several commands share to load options and models; formats errors."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fastbert.precision import LoadOptions

if TYPE_CHECKING:
    from fastbert.inference.base_embedder import BaseEmbedder


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The values of --dtype, --precision, --quantize, --device and --revision, as torch's classes take them."""
    return LoadOptions.named(**_options(args))


def embedder_of(args: argparse.Namespace, **settings: Any) -> BaseEmbedder:
    """The embedder of --model and its options: see light.choice.load_embedder."""
    from fastbert.light.choice import load_embedder

    return load_embedder(args.model, **_options(args), **settings)


def pipeline_of(args: argparse.Namespace, task: str, **given: Any) -> Any:
    """The pipeline of a task for --model and its options: see light.choice.load_pipeline."""
    from fastbert.light.choice import load_pipeline

    return load_pipeline(task, args.model, **_options(args), **given)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("device", "dtype", "precision", "quantize", "revision")}


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The given arguments that are fields of `kind`; omitted ones keep their defaults."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def one_line(error: BaseException) -> str:
    """An error's message on one line, with its type's name if the message alone is unclear."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    told = type(error) in (
        ValueError,
        TypeError,
        ImportError,
        FileNotFoundError,
        NotADirectoryError,
        OSError,
        PermissionError,
    )
    if told or type(error).__module__.startswith("fastbert"):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (--debug shows where)"
