"""Settings of a run: from TOML to dataclasses, each error naming its key; and the schedule they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbert.training.schedule import make_schedule
from fastbert.training.settings import SettingsError, load_settings

FILE = """
[data]
shards = "data"
tokens_per_batch = 4096

[optimizer]
lr = 1
betas = [0.9, 0.98]

[schedule]
warmup_share = 0.1

[training]
steps = 50

[output]
folder = "out"
tensorboard = false

[model]
hidden_size = 64
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    return path


def test_a_file_and_what_wins_over_it(file):
    settings = load_settings(file)
    assert settings.data.tokens_per_batch == 4096 and settings.optimizer.betas == (0.9, 0.98)
    assert settings.optimizer.lr == 1.0 and type(settings.optimizer.lr) is float
    assert (settings.total_steps, settings.warmup_steps) == (50, 5)
    assert settings.model.sizes() == {"hidden_size": 64}
    settings = load_settings(file, ["training.steps=100", "data.shards=other/folder", "output.tensorboard=true"])
    assert settings.training.steps == 100 and settings.total_steps == 100
    assert settings.data.shards == "other/folder" and settings.output.tensorboard is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", r"unknown key training\.step; there are steps, "),
        ("trainings.steps=3", r"unknown section trainings; there are optimizer, schedule, "),
        ("training.steps=0", r"training\.steps is 0; it must be at least 1"),
        ("training.steps=1.5", r"training\.steps is 1\.5; it must be a whole number"),
        ("training.steps=true", r"training\.steps is True; it must be a whole number"),
        ("training.precision=fp8", r"training\.precision is 'fp8'; it must be one of fp32, bf16, fp16"),
        ("optimizer.lr=nan", r"optimizer\.lr is nan; it must be at least 0"),
        ("optimizer.lr='fast'", r"optimizer\.lr is 'fast'; it must be a number"),
        ("optimizer.eps=0", r"optimizer\.eps is 0\.0; it must be above 0"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas is \[0\.9\]; it must be a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas is \[0\.9, 1\.0\]; each must be"),
        ("data.shards=3", r"data\.shards is 3; it must be a string"),
        ("schedule.warmup_steps=5", r"schedule\.warmup_steps and schedule\.warmup_share are both given"),
        ("output=3", r"--set 'output=3' is not SECTION\.KEY=VALUE"),
        ("optimizer=3", r"--set 'optimizer=3' is not"),
        ("schedule.total_steps=0", r"schedule\.total_steps is 0; it must be at least 1"),
        ("optimizer.lr=inf", r"optimizer\.lr is inf; it must be finite"),
        ("optimizer.betas=[inf, 0.9]", r"optimizer\.betas\[0\] is inf; it must be finite"),
        (f"training.seed={2**63}", rf"training\.seed is {2**63}; it must be at least 0 and at most {2**63 - 1}"),
    ],
)
def test_errors_name_the_key(file, override, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(file, [override])


def test_errors_of_the_file(file, tmp_path):
    file.write_text(FILE.replace("steps = 50", ""))
    with pytest.raises(SettingsError, match=rf"{file}: training\.steps is missing"):
        load_settings(file)
    file.write_text(FILE + "[[[")
    with pytest.raises(SettingsError, match="is not a TOML file"):
        load_settings(file)
    file.write_text("training = 3\n" + FILE.replace("[training]", "").replace("steps = 50", ""))
    with pytest.raises(SettingsError, match=r"training is 3; it must be a section, \[training\]"):
        load_settings(file)
    file.write_text(FILE.replace("steps = 50", "steps = 50\nkeep_best = true\nsave_every = 30\nevaluate_every = 20"))
    with pytest.raises(SettingsError, match=r"training\.save_every \(30\) must be a multiple of .* \(20\)"):
        load_settings(file)
    file.write_text(FILE.replace("warmup_share = 0.1", "warmup_steps = 51"))
    with pytest.raises(SettingsError, match=r"schedule\.warmup_steps is 51, more than the 50 steps"):
        load_settings(file)
    with pytest.raises(FileNotFoundError):
        load_settings(tmp_path / "nothing.toml")


def test_what_a_run_is_held_to_when_it_goes_on(file):
    one = load_settings(file).decisive()
    free = [
        "training.log_every=3",
        "training.keep=7",
        "output.folder=elsewhere",
        "data.heldout_batches=1",
        "data.shards=moved",
    ]
    assert load_settings(file, free).decisive() == one
    for override in ("optimizer.lr=2", "data.tokens_per_batch=1", "training.steps=60", "training.seed=1"):
        assert load_settings(file, [override]).decisive() != one, override
    # A longer run is the same run as long as its schedule is.
    fixed = ["schedule.total_steps=50"]
    assert load_settings(file, [*fixed, "training.steps=60"]).decisive() == load_settings(file, fixed).decisive()


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_transformers(shape):
    from transformers import get_scheduler

    names = {"constant": "constant_with_warmup"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(names.get(shape, shape), optimizer, num_warmup_steps=7, num_training_steps=40)
    ours = make_schedule(shape, 0.5, warmup_steps=7, total_steps=40)
    for step in range(45):
        if step <= 40 or shape != "cosine":  # beyond its end a cosine would rise again
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()
    assert ours(45) == (0.5 if shape == "constant" else 0.0)
