"""Runs `fastbert pretrain` in forked children and kills them; prints a JSON report.

    pretrain_driver.py moments FOLDER CONFIG KILLS SEED   kill -9 at random moments, each followed by a run to the end
    pretrain_driver.py steps FOLDER CONFIG EVERY          kill -9 before every so manieth thing done to files
    pretrain_driver.py disk FOLDER CONFIG                 runs in a folder on a disk that is soon full

A fork is cheap where imports are not. Nothing may be computed before it: threads do not survive one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401

import fastbert.cli.pretrain  # noqa: F401
from fastbert.cli.main import main

FILE_STEPS = (
    "fsync",
    "replace",
    "rename",
    "unlink",
    "rmdir",
)  # of os: what else a run does to files


def start(config: str, out: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child that trains into `out`, going on with what is there; returns its process id."""
    child = os.fork()
    if child == 0:
        before()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(["pretrain", config, "--resume", "--device", "cpu", "--set", f"output.folder={out}"])
        out.with_suffix(".stderr").write_text(said.getvalue())
        os._exit(code)
    return child


def ended_well(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def contents(folder: Path) -> dict[str, bytes]:
    """All of a folder's checkpoints, and the log without its times."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("checkpoints/**/*")) if p.is_file()}
    timed = ("tokens_per_second", "seconds", "mfu")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found["log"] = json.dumps([{k: v for k, v in line.items() if k not in timed} for line in lines]).encode()
    return found


def finish(config: str, out: Path, whole: dict[str, bytes]) -> list[str]:
    """Runs to the end; returns what is then not as in an uninterrupted run."""
    assert ended_well(start(config, out))
    got = contents(out)
    return sorted(name for name in {*whole, *got} if whole.get(name) != got.get(name))


def newest(out: Path) -> str:
    return max((p.name for p in out.glob("checkpoints/step-*")), default="")


def moments(folder: Path, config: str, kills: int, seed: int) -> dict:
    began = time.monotonic()
    assert ended_well(start(config, folder / "whole"))
    duration, whole, rng = time.monotonic() - began, contents(folder / "whole"), random.Random(seed)
    report: dict = {"killed": 0, "different": [], "checkpoints": []}
    for number in range(kills):
        out = folder / f"run{number}"
        killed = False
        while not killed:  # a child may be faster than the one that was timed
            shutil.rmtree(out, ignore_errors=True)
            child = start(config, out)
            time.sleep(rng.uniform(0.1, 0.9) * duration)
            os.kill(child, signal.SIGKILL)
            killed = not ended_well(child)
        report["killed"] += 1
        report["checkpoints"].append(newest(out))
        report["different"] += finish(config, out, whole)
        shutil.rmtree(out)
    return report


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

    for name in FILE_STEPS:
        setattr(os, name, counted(getattr(os, name)))


def steps(folder: Path, config: str, every: int) -> dict:
    assert ended_well(start(config, folder / "whole"))
    whole = contents(folder / "whole")
    report: dict = {"killed": 0, "different": [], "lost": [], "left": []}
    step, done, last = 0, False, ""
    while not done:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        done = ended_well(start(config, out, lambda step=step: kill_before(step)))
        report["killed"] += not done
        if newest(out) < last:  # killed later, it has no older checkpoint than one killed earlier
            report["lost"].append(step)
        last = newest(out)
        report["different"] += finish(config, out, whole)
        report["left"] += [p.name for p in (out / "checkpoints").iterdir() if not p.name.startswith("step-")]
        step += every
    return report


def disk(folder: Path, config: str) -> dict:
    """`folder` is on a small disk: what is said when a checkpoint does not fit, and what is left then."""
    out = folder / "run"
    _, status = os.waitpid(start(config, out), 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "said": out.with_suffix(".stderr").read_text(),
        "left": sorted(os.listdir(out / "checkpoints")),
    }


if __name__ == "__main__":
    mode, folder, config, *numbers = sys.argv[1:]
    report = {"moments": moments, "steps": steps, "disk": disk}[mode](Path(folder), config, *map(int, numbers))
    print(json.dumps(report))
