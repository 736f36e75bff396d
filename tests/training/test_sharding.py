"""Full sharding: two processes with half of the parameters each, over gloo, do what one does with all of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_support import (
    assert_close_weights,
    assert_same_weights,
    make_run,
    make_settings,
    resumed_run,
    torchrun,
    weights,
    write_run,
)

from fastbert.cli.main import main
from fastbert.model import BertForPreTraining
from fastbert.training.batches import PackedBatches
from fastbert.training.distributed import Processes
from fastbert.training.objective import Objective
from fastbert.training.sharding import gather_state, load_shards, local, save_shards, shard
from fastbert.training.shards import Shards
from fastbert.training.training_state import OPTIMIZER_SHARDS, CheckpointError

FULL = {"training.sharding": "full"}
# The last held-out batch has one sequence, so that one of two processes has none.
HARD = {"data.tokens_per_batch": 176, "optimizer.name": "lamb", "training.activation_checkpointing": "true"}
HARD |= {"training.steps": 4}
HALF = {"training.precision": "bf16", "optimizer.max_grad_norm": 0, "training.steps": 4}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def arguments(config: Path, out: Path, options: dict, resume: bool = False) -> list[str]:
    """Of the command line; without dropout, whose masks two processes cannot draw as one does."""
    options = {"training.dropout": 0.0, "training.keep": 8, "output.folder": out, **options}
    sets = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    return [str(config), "--device", "cpu", *sets, *(["--resume"] if resume else [])]


def test_the_hard_run_has_a_process_without_a_sequence(config):
    shards = Shards(config.parent / "shards", "held_out")
    options = {"tokens_per_batch": HARD["data.tokens_per_batch"], "seed": 0, "epochs": 1, "world_size": 2}
    lasts = [list(PackedBatches(shards, rank=rank, **options))[-1] for rank in (0, 1)]
    assert sorted(len(batch.cu_seqlens) - 1 for batch in lasts) == [0, 1]


@pytest.fixture(scope="module")
def one(config) -> dict[str, Path]:
    """Runs of this process alone."""
    runs = {"plain": {}, "hard": HARD, "half": HALF}
    folders = {name: config.parent / "one" / name for name in runs}
    for name, options in runs.items():
        assert main(["pretrain", *arguments(config, folders[name], options)]) == 0
    return folders


@pytest.fixture(scope="module")
def two(config, one) -> dict[str, Path]:
    """Runs of two processes, sharded; the last two go on from the middle of one's and of their own."""
    runs = {"plain": {}, "hard": HARD, "half": HALF, "from_one": {}, "again": {}}
    folders = {name: config.parent / "two" / name for name in runs}
    command = []
    for name, options in runs.items():
        command += ["--", *arguments(config, folders[name], {**options, **FULL}, name in ("from_one", "again"))]
    at_four(one["plain"], folders["from_one"])
    at_two = command.index("--", 1)  # `again` stops at step 4 first
    command[at_two:at_two] = ["--", *arguments(config, folders["again"], {**FULL, "training.steps": 4, **SCHEDULE})]
    torchrun(config.parent, command[1:])
    return folders


SCHEDULE = {"schedule.total_steps": 8}


def at_four(run: Path, out: Path) -> None:
    """A run's folder with its checkpoint of step 4 alone."""
    shutil.copytree(run / "checkpoints/step-00000004", out / "checkpoints/step-00000004")


@pytest.mark.parametrize(("name", "step", "atol"), [("plain", 2, 1e-6), ("plain", 8, 1e-6), ("hard", 4, 1e-6)])
def test_two_sharded_processes_train_as_one(one, two, name, step, atol):
    assert_close_weights(*(runs[name] / f"checkpoints/step-{step:08d}" for runs in (one, two)), atol)


def test_bf16_is_that_of_one_process_up_to_its_rounding(one, two):
    """Norms are rounded, too, before they travel."""
    first, *lasts = (
        torch.cat([t.flatten() for _, t in sorted(weights(run / f"checkpoints/step-{step:08d}").items())])
        for run, step in ((one["half"], 2), (one["half"], 4), (two["half"], 4))
    )
    assert 0 < (lasts[0] - lasts[1]).norm() < 0.1 * (lasts[0] - first).norm()


@pytest.mark.parametrize("name", ["plain", "hard", "half"])
def test_two_sharded_processes_report_as_one(one, two, name):
    logs = [[json.loads(line) for line in (runs[name] / "log.jsonl").read_text().splitlines()] for runs in (one, two)]
    assert [(x["step"], x["kind"]) for x in logs[0]] == [(x["step"], x["kind"]) for x in logs[1]]
    for a, b in zip(*logs, strict=True):
        for figure in ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "gradient_norm"):
            close = pytest.approx(b.get(figure, 0), abs=2e-2 if name == "half" else 1e-5)
            assert (figure in a) == (figure in b) and a.get(figure, 0) == close, figure


def test_gradients_travel_once_a_step(two):
    """Eight steps of two batches each, of two layers and the rest."""
    for rank in (0, 1):
        travelled = json.loads((two["plain"].parents[1] / f"travelled-{rank}.json").read_text())
        assert travelled[0] == {"buckets": [], "shards": 8 * 3}


def test_the_group_of_all_ends(two):
    """Torch's caches keep the mesh's own group alone."""
    for rank in (0, 1):
        assert not json.loads((two["plain"].parents[1] / f"left-{rank}.json").read_text())["group"]


def test_a_checkpoint_is_one_of_transformers_and_its_moments_are_in_halves(one, two):
    ours, theirs = (runs["plain"] / "checkpoints/step-00000008" for runs in (two, one))
    names = [sorted(p.name for p in folder.iterdir()) for folder in (ours, theirs)]
    assert set(names[0]) ^ set(names[1]) == {"optimizer", "optimizer.safetensors"}
    assert BertForPreTraining.from_pretrained(ours).config == BertForPreTraining.from_pretrained(theirs).config
    sizes = [(ours / "optimizer" / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.8 * max(sizes)


def test_two_processes_go_on_where_one_stopped(one, two):
    assert_close_weights(*(runs / "checkpoints/step-00000008" for runs in (one["plain"], two["from_one"])))


def test_two_processes_go_on_where_two_stopped_bit_for_bit(two):
    assert_same_weights(*(two[name] / "checkpoints/step-00000008" for name in ("plain", "again")))


def test_one_process_goes_on_where_two_stopped(config, one, two, tmp_path, capsys):
    at_four(two["plain"], tmp_path)
    assert main(["pretrain", *arguments(config, tmp_path, {}, resume=True)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert_close_weights(*(run / "checkpoints/step-00000008" for run in (one["plain"], tmp_path)))


@pytest.mark.parametrize("damaged", ["__1_0.distcp", ".metadata"])
def test_damaged_shards_are_one_clear_error(config, two, tmp_path, capsys, damaged):
    at_four(two["plain"], tmp_path)
    file = tmp_path / "checkpoints/step-00000004/optimizer" / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main(["pretrain", *arguments(config, tmp_path, {}, resume=True)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastbert: error: ") and "step-00000004/optimizer cannot be read: " in last


@pytest.fixture
def alone():
    """A group of one process: FSDP shards into one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Processes()
    dist.destroy_process_group()


@pytest.mark.parametrize("where", ["attention.self.query", "output.dense"])
def test_a_gathered_weight_that_has_changed_is_seen(tmp_path, alone, where):
    """By its values, and by its version counter, by which a backend knows the form it keeps of it for stale."""
    trainer = make_run(make_settings(tmp_path), dropout=0.0)
    objective, micro_batch = trainer.objective, trainer._micro_batch(next(iter(trainer.batches)))
    shard(objective, torch.device("cpu"), None)
    layer = objective.model.bert.encoder.layer[1]
    linear, losses, versions = layer.get_submodule(where), [], []
    layer.register_forward_pre_hook(lambda *args: versions.append(linear.weight._version))
    for _ in range(3):
        with torch.no_grad():
            losses.append(objective(micro_batch).sum().item())
            objective.reshard()
            local(linear.weight).mul_(1.5)
    assert len(set(losses)) == 3 and versions == sorted(set(versions))


def test_between_steps_every_parameter_is_sharded(tmp_path, alone):
    trainer = make_run(make_settings(tmp_path, training__steps=2, training__precision="bf16"))
    shard(trainer.objective, torch.device("cpu"), torch.bfloat16)
    trainer.sharded, trainer.replica = True, trainer.objective
    seen = []
    report, evaluate = trainer._train, trainer._evaluate

    def looked_after(function):
        def wrapper(*args):
            function(*args)
            seen.extend(hasattr(p, "to_local") and p.dtype == torch.float32 for p in trainer.model.parameters())

        return wrapper

    trainer._train, trainer._evaluate = looked_after(report), looked_after(evaluate)
    trainer.optimizer = type(trainer.optimizer)(trainer.model.parameters(), lr=1e-3)
    trainer.run()
    assert len(seen) == 3 * len(list(trainer.model.parameters())) and all(seen)


def test_shards_hold_what_was_saved_and_a_failing_disk_is_an_os_error(tmp_path, alone):
    objective = Objective(make_run(make_settings(tmp_path)).model)
    before = {name: t.clone() for name, t in objective.model.state_dict().items()}
    shard(objective, torch.device("cpu"), None)
    whole = gather_state(objective.model, keep=True)
    assert whole.keys() == before.keys() and all(torch.equal(whole[name], before[name]) for name in before)
    assert gather_state(objective.model, keep=False) == {}
    tensors = dict(objective.model.named_parameters())
    save_shards({name: t.detach() for name, t in tensors.items()}, tmp_path / "shards")
    like = {name: torch.full(t.shape, math.nan) for name, t in tensors.items()}
    load_shards(like, tmp_path / "shards")
    assert all(torch.equal(like[name], before[name]) for name in like)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        save_shards({"x": torch.ones(3)}, tmp_path / "file" / OPTIMIZER_SHARDS)
    with pytest.raises(OSError, match="nothing"):
        load_shards({"nothing": torch.ones(3)}, tmp_path / "shards")


def test_without_processes_to_share_with_nothing_is_sharded(tmp_path):
    settings = make_settings(tmp_path, training__sharding="full", training__steps=2)
    outcome = make_run(settings).run()
    assert (outcome.checkpoint / "optimizer.safetensors").is_file()
    (outcome.checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        resumed_run(settings)
