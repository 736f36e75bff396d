"""Converts options that several commands share to load options and devices; formats errors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastbert.precision import LoadOptions

if TYPE_CHECKING:
    from fastbert.inference.base_embedder import BaseEmbedder


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The values of --dtype, --precision, --quantize, --device and --revision."""
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return LoadOptions(dtype, args.precision, args.quantize, device_of(args.device), args.revision)


def embedder_of(args: argparse.Namespace, **settings: Any) -> BaseEmbedder:
    """The embedder of --model and its options: the light one or, where torch is needed, torch's.

    Raises:
        ImportError: torch is needed, and not installed.
    """
    if _is_light(args):
        from fastbert.light.embedder import TextEmbedder

        return TextEmbedder.from_pretrained(args.model, **_light_options(args), **settings)
    from fastbert.inference.embed import Embedder

    return Embedder.from_pretrained(args.model, **vars(load_options(args)), **settings)


def pipeline_of(args: argparse.Namespace, task: str, **given: Any) -> Any:
    """The pipeline of a task for --model and its options: the light one or, where torch is needed, torch's.

    Raises:
        ImportError: torch is needed, and not installed.
    """
    if _is_light(args, task):
        from fastbert.light.classifiers import pipeline

        return pipeline(task, args.model, **_light_options(args), **given)
    from fastbert.tasks import pipelines

    return pipelines.pipeline(task, args.model, **vars(load_options(args)), **given)


def _is_light(args: argparse.Namespace, task: str | None = None) -> bool:
    from fastbert.light.choice import light_or_torch

    names = ("device", "dtype", "precision", "revision")
    return light_or_torch(args.model, task=task, **{name: getattr(args, name) for name in names})


def _light_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("dtype", "quantize", "revision")}


def device_of(name: str | None) -> str:
    """The device of that name; without a name a GPU, if there is one.

    Raises:
        ValueError: the device does not exist.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {one_line(error)}") from error
    return device


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
