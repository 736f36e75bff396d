"""`fastbert serve`: an HTTP server for vectors, classes, tags and scores."""

from __future__ import annotations

import argparse
import os

from fastbert.lazy import missing_extra


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert serve`; returns the exit code."""
    # Before OpenMP is loaded, which reads it then: a thread that waits sleeps, on a core that requests have work for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from fastbert.serve.processes import serve
    except ModuleNotFoundError as error:
        raise missing_extra("fastbert serve", error, "serve") from None
    from fastbert.serve.settings import read_settings

    names = (
        *("host", "port", "dtype", "quantize", "revision", "threads", "cache", "processes", "api_key"),
        *("max_batch_tokens", "max_latency", "max_queue_tokens", "max_concurrent_requests", "max_texts"),
        *("max_body_bytes", "max_body_seconds", "log_level"),
    )
    flags = {name: getattr(args, name) for name in names}
    return serve(read_settings({**flags, "models": args.models or None}, file=args.config))
