"""Texts, and the command line in this process or one of its own: for the tests of `fastbert COMMAND`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fastbert.cli.main import main

DRIVER = Path(__file__).with_name("cli_driver.py")
COMMAND = [sys.executable, "-m", "fastbert"]
# One thread, as in conftest.py; one arena, so that a peak is what is held and not how threads take turns.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def make_texts(count):
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "red", "."]
    return [" ".join(words[(i * k) % 9] for k in range(1 + i * 7 % 23)) for i in range(count)]


def write_texts(path, texts):
    Path(path).write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def run(capsys, *args):
    """Exit code, stdout and stderr of the command line."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def read_jsonl(text):
    rows = [json.loads(line) for line in text.splitlines()]
    return rows, np.array([row["embedding"] for row in rows], dtype=np.float32)


def drive(*args):
    done = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
