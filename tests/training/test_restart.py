"""`fastbert pretrain` in processes of its own: killed, stopped and on a full disk, it goes on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_support import write_run

DRIVER = Path(__file__).parents[1] / "pretrain_driver.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def drive(mode: str, folder: Path, config: Path, *numbers: int, prefix=()) -> dict:
    command = [*prefix, sys.executable, str(DRIVER), mode, str(folder), str(config), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(config, tmp_path):
    report = drive("moments", tmp_path, config, 30, 2)
    assert report["killed"] == 30 and not report["different"]
    assert len(set(report["checkpoints"])) >= 3  # early and late


def test_killed_within_checkpoints(config, tmp_path):
    report = drive("steps", tmp_path, config, 31)
    assert report["killed"] >= 2
    assert not report["different"] and not report["lost"] and not report["left"]


@pytest.mark.slow
def test_killed_before_each_thing_done_to_files(config, tmp_path):
    report = drive("steps", tmp_path, config, 1)
    assert report["killed"] > 60
    assert not report["different"] and not report["lost"] and not report["left"]


def test_the_command_says_what_stopped_it(config, tmp_path):
    out = tmp_path / "out"
    options = ["--set", f"output.folder={out}", "--set", "training.steps=100000", "--set", "training.log_every=1"]
    command = [sys.executable, "-m", "fastbert", "pretrain", str(config), "--device", "cpu", *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, said
    last = said.strip().splitlines()[-1]
    step = int(sorted(os.listdir(out / "checkpoints"))[-1].removeprefix("step-"))
    assert last == f"fastbert: stopped by SIGTERM after step {step:,}; --resume goes on"


def test_a_full_disk_is_one_clear_error(config, tmp_path):
    """A disk of its own, with room for one checkpoint and a half; the first of them stays."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("no file system may be mounted here")
    whole = make_config_size(config, tmp_path)
    mount = f'mount -t tmpfs -o size={int(whole * 1.5)} tmpfs "$0" && exec "$@"'
    report = drive("disk", tmp_path, config, prefix=["unshare", "-rm", "sh", "-c", mount, str(tmp_path)])
    assert report["code"] == 1
    assert "Traceback" not in report["said"]
    last = report["said"].strip().splitlines()[-1]
    assert last.startswith("fastbert: error: ") and "step-00000004 cannot be written: No space left on device" in last
    assert last.endswith("the last good checkpoint is " + str(tmp_path / "run/checkpoints/step-00000002"))
    assert report["left"] == ["step-00000002"]


def make_config_size(config: Path, folder: Path) -> int:
    """The bytes of one checkpoint of this run, by a run of one step."""
    from fastbert.cli.main import main

    out = folder / "measured"
    assert (
        main(["pretrain", str(config), "--device", "cpu", "--set", f"output.folder={out}", "--set", "training.steps=2"])
        == 0
    )
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in out.rglob("*") if p.is_file())
    shutil.rmtree(out)
    return size
