"""What this machine can reach at most, measured."""

from __future__ import annotations

from fastbert.native.extension import C, available


def peak(kind: str, isa: str, threads: int) -> float:
    """What `threads` threads reach at most here: FLOP/s of a loop over registers only ("fp32", "bf16", "int8"),
    or bytes/s read from main memory ("read").

    Raises:
        RuntimeError: the extension is not there.
        ValueError: no such kind, an instruction set that this machine has not, or no thread.
    """
    if C is None:
        raise RuntimeError(available())
    return C.peak(kind, C.isa_id(isa), threads)
