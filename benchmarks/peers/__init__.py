"""The public runtimes that fastbert is compared with, each over the same weights and the same batch.

A module a runtime; each has `providers(source)`, the harness Providers of every precision it has. Nothing is
imported before a provider is prepared, so a runtime that is not installed costs nothing and is a row with the reason.
"""

from __future__ import annotations

from harness import Provider

from . import ctranslate2_runtime, onnx_runtime, openvino_runtime, torch_runtime
from .common import Source

RUNTIMES = (torch_runtime, onnx_runtime, openvino_runtime, ctranslate2_runtime)


def providers(source: Source) -> list[Provider]:
    return [provider for runtime in RUNTIMES for provider in runtime.providers(source)]
