"""Kills runs of `prepare` before each of their steps, in forked children, and continues them; prints a JSON report.

prepare_driver.py FOLDER     with text.txt and vocab.txt

A fork is cheap where imports are not. Nothing may be computed before it: threads do not survive one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import tokenizers  # noqa: F401
from cli_driver import kill_before

from fastbert.training.prepare import PrepareSettings, prepare

SETTINGS = PrepareSettings(max_length=48, shard_bytes=4000, held_out=0.2)


def in_child(folder: Path, out: Path, kill_at: int | None = None) -> bool:
    """Whether a run ended well; it is killed before step `kill_at`."""
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_before(kill_at)
        prepare([folder / "text.txt"], out, SETTINGS, learn_vocab=90, resume=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def main(folder: Path) -> dict:
    out = folder / "out"
    assert in_child(folder, out)
    whole = content(out)
    kills, identical, kept, done = 0, 0, 0, False
    while not done:
        shutil.rmtree(out)
        done = in_child(folder, out, kill_at=kills)
        if not done:
            kills += 1
            before = {path: path.stat().st_ino for path in out.glob("*.shard")}
            assert in_child(folder, out)
            identical += content(out) == whole
            kept += all(path.stat().st_ino == inode for path, inode in before.items())
    return {"kills": kills, "identical": identical, "kept": kept, "files": list(whole)}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(json.dumps(main(Path(sys.argv[1]))))
