"""A run that goes on is the run that was never interrupted, bit for bit; dropout is on."""

from __future__ import annotations

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from training_support import assert_same_weights, make_run, make_settings, resumed_run, weights

from fastbert.training.pretraining import Pretraining
from fastbert.training.training_state import CheckpointError, seed_step


class Stop(Exception):
    pass


def stop_before(run: Pretraining, step: int) -> None:
    """Makes a run fail when it is about to do step `step`, counted from 0."""
    train = run._train

    def failing(*args):
        if run.step == step:
            raise Stop
        train(*args)

    run._train = failing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer__name": "lamb"},
        {"training__precision": "bf16"},
        {"training__activation_checkpointing": True, "training__accumulate": 3},
        {"training__objective": "mlm"},
        {"training__objective": "nsp"},
    ],
    ids=str,
)
def test_resumed_is_uninterrupted(tmp_path, options):
    options = {"training__log_every": 4, **options}  # a line's mean reaches over what interrupts
    whole = make_run(make_settings(tmp_path / "whole", **options)).run()
    settings = make_settings(tmp_path / "broken", **options)
    for step in (3, 5):  # after the checkpoint at 2, and that at 4
        run = resumed_run(settings)
        stop_before(run, step)
        with pytest.raises(Stop):
            run.run()
    outcome = resumed_run(settings).run()
    assert outcome.step == whole.step == 6
    assert_same_weights(whole.checkpoint, outcome.checkpoint)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    timed = ("tokens_per_second", "seconds")
    logs = [[{k: v for k, v in json.loads(line).items() if k not in timed} for line in log] for log in logs]
    assert logs[0] == logs[1]


def test_dropout_takes_part_in_what_is_compared(tmp_path):
    """Were it not on, or the same at each step, the tests above would say less than they seem to."""
    outcomes = [
        make_run(make_settings(tmp_path / name, training__seed=seed), model=None, dropout=dropout).run()
        for name, seed, dropout in (("a", 3, 0.0), ("b", 3, 0.1))
    ]
    a, b = (weights(outcome.checkpoint) for outcome in outcomes)
    assert not torch.equal(*(w["bert.encoder.layer.1.output.dense.weight"] for w in (a, b)))


def test_each_step_of_each_process_has_random_numbers_of_its_own():
    def drawn(*key):
        seed_step(*key)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    keys = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 10**6, 4095), (2**40, 0, 0)]
    draws = [drawn(*key) for key in keys]
    assert all(len(set(column)) == len(keys) for column in zip(*draws, strict=True))
    assert drawn(*keys[1]) == draws[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, number):
    whole = make_run(make_settings(tmp_path / "whole")).run()
    settings = make_settings(tmp_path / "stopped")
    run = make_run(settings)
    train = run._train

    def signalled(*args):
        train(*args)
        if run.step == 3:
            os.kill(os.getpid(), number)

    run._train = signalled
    before = signal.getsignal(number)
    outcome = run.run()
    assert (outcome.step, outcome.signal, outcome.checkpoint.name) == (3, number, "step-00000003")
    assert signal.getsignal(number) is before
    assert_same_weights(whole.checkpoint, resumed_run(settings).run().checkpoint)


def test_other_settings_do_not_go_on(tmp_path):
    make_run(make_settings(tmp_path)).run()
    changed = make_settings(tmp_path, optimizer__lr=2e-3, training__accumulate=2)
    with pytest.raises(CheckpointError, match=r"other settings: optimizer\.lr was 0\.001 and is 0\.002; .*accumulate"):
        resumed_run(changed)


def test_damaged_checkpoints_are_named(tmp_path):
    settings = make_settings(tmp_path)
    newest = make_run(settings).run().checkpoint
    state = json.loads((newest / "training_state.json").read_text())
    for name, value in (("step", "6"), ("settings", []), ("data", None), ("unlogged", {})):
        (newest / "training_state.json").write_text(json.dumps({**state, name: value}))
        with pytest.raises(CheckpointError, match=rf"step-00000006/training_state\.json is damaged: {name} is"):
            resumed_run(settings)
    (newest / "training_state.json").write_text('{"step": 6}')
    with pytest.raises(CheckpointError, match=r"step-00000006/training_state\.json cannot be read"):
        resumed_run(settings)
