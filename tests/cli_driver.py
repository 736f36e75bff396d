"""Runs the command line in forked children, to kill them and to measure them; prints a JSON report.

    cli_driver.py kill OUT MODEL INPUT [COMMAND]      kills runs before each of their steps, and continues them
    cli_driver.py memory OUT MODEL INPUT [COMMAND]    the peak memory of a run

COMMAND is embed, or predict.

A fork is cheap where imports are not. Nothing may be computed before it: threads do not survive one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pyarrow.parquet  # noqa: F401
import safetensors  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401

import fastbert.cli.embed
import fastbert.cli.predict  # noqa: F401
from fastbert.cli.main import main

WINDOW = 8
STEPS = ("fsync", "replace", "unlink")  # of os: what a run does to files in addition to writing them


def in_child(args: list[str], kill_at: int | None = None) -> tuple[bool, int]:
    """Whether a run ended well and its peak memory in KiB; it is killed before step `kill_at`."""
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_before(kill_at)
        os._exit(main(args))
    _, status, usage = os.wait4(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0, usage.ru_maxrss


def kill_before(step: int) -> None:
    left = step

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def kill(out: Path, model: str, source: str, command: str) -> dict:
    args = [command, model, source, "-o", str(out), "-q", "--window", str(WINDOW), "--bad-lines", "skip"]
    partial, journal = out.with_name(out.name + ".partial"), out.with_name(out.name + ".journal.json")
    args.append("--resume")
    assert in_child(args)[0]
    whole = out.read_bytes()

    def tear() -> None:  # as a write does that a kill cuts short
        if partial.exists():
            with open(partial, "ab") as file:
                file.write(b"torn")

    kills = identical = 0
    done = False
    while not done:
        out.unlink()
        done, _ = in_child(args, kill_at=kills)
        tear()
        if not done:
            kills += 1
            assert in_child(args)[0]
            identical += out.read_bytes() == whole

    out.unlink()
    kept = []  # records in the journal, each time that a run is killed after its first commit
    for _ in range(3):
        in_child(args, kill_at=4)
        tear()
        kept.append(json.loads(journal.read_text())["records"])
    assert in_child(args)[0]
    identical_chain = out.read_bytes() == whole
    left = sorted(os.listdir(out.absolute().parent))
    return {"kills": kills, "identical": identical, "kept": kept, "chain": identical_chain, "left": left}


def memory(out: Path, model: str, source: str, command: str) -> dict:
    done, peak = in_child([command, model, source, "-o", str(out), "-q"])
    assert done
    return {"peak_mib": peak / 1024}


if __name__ == "__main__":
    mode, out, model, source, *command = sys.argv[1:]
    print(json.dumps({"kill": kill, "memory": memory}[mode](Path(out), model, source, *(command or ["embed"]))))
