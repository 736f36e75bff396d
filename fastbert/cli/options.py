"""Converts options that several commands share to load options and devices; formats errors."""

from __future__ import annotations

import argparse

from fastbert.precision import LoadOptions


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The values of --dtype, --precision, --quantize, --device and --revision."""
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return LoadOptions(dtype, args.precision, args.quantize, device_of(args.device), args.revision)


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
        FileNotFoundError,
        NotADirectoryError,
        OSError,
        PermissionError,
    )
    if told or type(error).__module__.startswith("fastbert"):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (--debug shows where)"
