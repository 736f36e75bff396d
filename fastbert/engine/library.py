"""The extension, the instruction set in use, and the numbers that C++ has for names."""

from __future__ import annotations

import functools
import os
from typing import Any


def _load() -> tuple[Any, str | None]:
    try:
        import fastbert._C as extension
    except ModuleNotFoundError as error:
        if error.name != "fastbert._C":
            raise
        return None, "native: not built (no working C++ compiler when fastbert was installed)"
    except ImportError as error:  # built on another machine, say, with a library that this one lacks
        return None, f"native: does not load ({error})"
    return extension, None


C, _reason = _load()
_ACTIVATIONS = {None: "none", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS |= {name: name for name in ("gelu", "relu", "silu", "tanh")}
ACTIVATIONS = {} if C is None else {name: getattr(C, f"ACTIVATION_{code}") for name, code in _ACTIVATIONS.items()}
# Names as in ops.linear; None: the operands as they are.
_PRECISIONS = (None, "int8", "high", "highest")
PRECISIONS = {} if C is None else {name: getattr(C, f"PRECISION_{name or 'full'}") for name in _PRECISIONS}


def available() -> str | None:
    """None if the extension is built and loads, else the reason why not."""
    return _reason


def has_cuda() -> bool:
    """True if the extension is available and contains CUDA kernels."""
    return C is not None and C.has_cuda


def cpu_features() -> list[str]:
    """The features of this processor that determine the choice of an instruction set."""
    return [] if C is None else C.cpu_features()


def isas() -> list[str]:
    """The instruction sets that can run here, best first; emulated ones, for tests, come last."""
    return [] if C is None else C.isas()


def real_isas() -> list[str]:
    """The instruction sets that this machine's processor has, best first."""
    return [isa for isa in isas() if not isa.endswith("_emulated")]


def isa() -> str:
    """The instruction set in use; "none" without the extension.

    Raises:
        ValueError: FASTBERT_ISA is not an instruction set, or this machine lacks it.
    """
    return chosen_isa()[0]


@functools.cache
def chosen_isa() -> tuple[str, int]:
    if C is None:
        return "none", -1
    name = os.environ.get("FASTBERT_ISA", "") or C.isas()[0]
    try:
        return name, C.isa_id(name)
    except ValueError as error:
        raise ValueError(f"FASTBERT_ISA={name}: {error}") from None
