"""The measured peak speed of this machine."""

from __future__ import annotations

from fastbert.engine.library import C, available


def peak(kind: str, isa: str, threads: int) -> float:
    """The peak speed of `threads` threads: FLOP/s of a loop over registers only ("fp32", "bf16", "int8"),
    or bytes/s read from main memory ("read").

    Raises:
        RuntimeError: the extension is missing.
        ValueError: an unknown kind, an instruction set that this machine lacks, or no thread.
    """
    if C is None:
        raise RuntimeError(available())
    return C.peak(kind, C.isa_id(isa), threads)
