"""Two processes of torchrun, over gloo, do what one process does with the same batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_support import assert_close_weights, torchrun, write_run

from fastbert.cli.main import main

# Without dropout, whose masks two processes cannot draw as one does.
OPTIONS = ["--set", "training.dropout=0.0", "--set", "training.keep=8"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def one(config) -> Path:
    out = config.parent / "one"
    assert main(["pretrain", str(config), "--device", "cpu", *OPTIONS, "--set", f"output.folder={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def two(config) -> Path:
    out = config.parent / "two"
    stderr = torchrun(config.parent, [str(config), "--device", "cpu", *OPTIONS, "--set", f"output.folder={out}"])
    said = [line for line in stderr.splitlines() if "checkpoint" in line and str(out) in line]
    assert said == [f"fastbert: step 8, checkpoint {out}/checkpoints/step-00000008"]  # one of them speaks
    return out


@pytest.mark.parametrize("step", [2, 8])
def test_two_processes_train_as_one(one, two, step):
    assert_close_weights(one / f"checkpoints/step-{step:08d}", two / f"checkpoints/step-{step:08d}")


def test_two_processes_report_as_one(one, two):
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, two)]
    assert [(x["step"], x["kind"]) for x in logs[0]] == [(x["step"], x["kind"]) for x in logs[1]]
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "gradient_norm"):
            assert (name in a) == (name in b) and a.get(name, 0) == pytest.approx(b.get(name, 0), abs=1e-5), name


def test_gradients_travel_once_a_step(two):
    """Eight steps of two batches each, of a model that fits one bucket."""
    for rank in (0, 1):
        assert json.loads((two.parent / f"travelled-{rank}.json").read_text()) == [{"buckets": [0] * 8, "shards": 0}]


def test_the_group_ends_with_its_threads(two):
    """One that still lets go of a tensor while the interpreter ends aborts the process."""
    for rank in (0, 1):
        left = json.loads((two.parent / f"left-{rank}.json").read_text())
        assert not left["group"] and not [name for name in left["threads"] if "gloo" in name], left


def test_one_process_goes_on_where_two_stopped(config, one, two, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (two / "checkpoints/step-00000004").rename(tmp_path / "checkpoints/step-00000004")
    options = [*OPTIONS, "--set", f"output.folder={tmp_path}"]
    assert main(["pretrain", str(config), "--device", "cpu", "--resume", *options]) == 0
    assert_close_weights(one / "checkpoints/step-00000008", tmp_path / "checkpoints/step-00000008")
