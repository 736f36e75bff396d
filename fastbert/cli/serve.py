"""`fastbert serve`: an HTTP server for vectors, classes, tags and scores."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields

from fastbert.lazy import missing_extra


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert serve`; returns the exit code."""
    # Before OpenMP is loaded, which reads it then: a thread that waits sleeps, on a core that requests have work for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from fastbert.serve.processes import serve
    except ModuleNotFoundError as error:
        raise missing_extra("fastbert serve", error, "serve") from None
    from fastbert.serve.settings import ServeSettings, read_settings

    flags = {field.name: getattr(args, field.name) for field in fields(ServeSettings) if field.name != "models"}
    return serve(read_settings({**flags, "models": args.models or None}, file=args.config))
