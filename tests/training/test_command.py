"""`fastbert pretrain` in the process: what it starts from, what it refuses, what its messages say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_bert import VOCAB
from training_support import write_run

import fastbert
from fastbert.cli.main import main
from fastbert.cli.pretrain import GPU_PEAKS, peak_flops
from fastbert.training.settings import load_settings


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pretrain(config, tmp_path, capsys):
    """Runs two steps into tmp_path/out, with more settings; gives the exit code, stderr and the newest checkpoint."""

    def run(*overrides: str, resume: bool = False):
        arguments = ["pretrain", str(config), "--device", "cpu", *(["--resume"] if resume else [])]
        for override in (f"output.folder={tmp_path / 'out'}", "training.steps=2", *overrides):
            arguments += ["--set", override]
        code = main(arguments)
        checkpoints = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
        return code, capsys.readouterr().err, checkpoints[-1] if checkpoints else None

    return run


def test_sizes_make_a_fresh_model(pretrain):
    code, said, checkpoint = pretrain("model.num_hidden_layers=3", "training.dropout=0.25")
    assert code == 0 and said.splitlines()[-1] == f"fastbert: step 2, checkpoint {checkpoint}"
    config = fastbert.BertConfig.from_pretrained(checkpoint)
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (len(VOCAB), 3, 48)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)
    assert config.extra["architectures"] == ["BertForPreTraining"]
    tokenizer = fastbert.BertTokenizer.from_pretrained(checkpoint)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCAB)}


def test_the_same_seed_makes_the_same_weights_and_another_others(pretrain, tmp_path):
    states = []
    for seed in (1, 1, 2):
        _, _, checkpoint = pretrain(f"training.seed={seed}")
        states.append((checkpoint / "model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "out")
    assert states[0] == states[1] != states[2]


def test_a_config_json_or_its_folder(pretrain, tmp_path):
    (tmp_path / "sizes").mkdir()
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "vocab_size": len(VOCAB), "max_position_embeddings": 64}
    (tmp_path / "sizes" / "config.json").write_text(json.dumps(sizes))
    for path in ("sizes", "sizes/config.json"):
        code, _, checkpoint = pretrain(f"model.config={tmp_path / path}")
        config = fastbert.BertConfig.from_pretrained(checkpoint)
        assert code == 0 and config.max_position_embeddings == 40  # the file's sections win over it
        assert config.hidden_size == 48
        shutil.rmtree(tmp_path / "out")
    code, said, _ = pretrain(f"model.config={tmp_path / 'nothing'}")
    assert code == 1 and "nothing" in said


def test_a_checkpoint_is_trained_on(pretrain, tmp_path):
    _, _, first = pretrain()
    start = first.rename(tmp_path / "start")
    shutil.rmtree(tmp_path / "out")
    code, _, checkpoint = pretrain(f"model.checkpoint={start}", "optimizer.lr=0.0", "training.seed=9")
    assert code == 0
    states = [fastbert.BertForPreTraining.from_pretrained(path).state_dict() for path in (start, checkpoint)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    shutil.rmtree(tmp_path / "out")
    # Another objective takes what it needs.
    code, said, checkpoint = pretrain(f"model.checkpoint={start}", "training.objective=mlm")
    assert code == 0 and "newly initialised" not in said
    assert fastbert.BertConfig.from_pretrained(checkpoint).extra["architectures"] == ["BertForMaskedLM"]


def test_a_run_that_is_there_already_is_gone_on_with_or_left_alone(pretrain):
    pretrain()
    code, said, _ = pretrain()
    assert code == 1 and "step-00000002 is there already: --resume continues it" in said
    code, said, checkpoint = pretrain("schedule.total_steps=2", "training.steps=4", resume=True)
    assert code == 0 and "resuming from" in said and checkpoint.name == "step-00000004"
    code, said, _ = pretrain("schedule.total_steps=2", "training.steps=4", resume=True)
    how = "--resume --set training.steps=8 --set schedule.total_steps=8"
    assert code == 0 and f"the run is finished; more steps prolong it, as in {how}" in said
    code, said, checkpoint = pretrain("training.steps=8", "schedule.total_steps=8", resume=True)
    assert code == 0 and checkpoint.name == "step-00000008"
    lines = [json.loads(line) for line in (checkpoint.parents[1] / "log.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if line["kind"] == "train"}
    assert rates[4] == 0 < rates[8]  # the schedule that had ended goes on
    code, said, _ = pretrain("optimizer.lr=3.0", "schedule.total_steps=8", resume=True)
    assert code == 1 and "made under other settings: optimizer.lr was 0.001 and is 3.0" in said
    code, said, _ = pretrain("schedule.total_steps=2", "training.steps=8", resume=True)
    assert code == 1 and "schedule.total_steps was 8 and is 2" in said  # longer, not shorter


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "unknown key training.stepz; there are steps, "),
        ("model.vocab_size=19", "vocab_size of the model is 19; "),
        ("model.max_position_embeddings=39", "max_position_embeddings of the model is 39; "),
        ("model.num_attention_heads=5", "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ("data.shards=/nowhere", "/nowhere"),
        ("data.heldout=/nowhere", "/nowhere"),
        ("data.tokens_per_batch=39", "tokens_per_batch is 39"),
        ("training.precision=fp16", "training.precision is 'fp16', which needs a CUDA device"),
    ],
)
def test_errors_are_one_line(pretrain, override, message):
    code, said, checkpoint = pretrain(override)
    assert code == 1 and checkpoint is None
    assert said.startswith("fastbert: error: ") and message in said and len(said.splitlines()) == 1


def test_an_output_that_is_a_file_is_left_alone(pretrain, tmp_path):
    (tmp_path / "notes").write_text("mine")
    code, said, _ = pretrain(f"output.folder={tmp_path / 'notes'}")
    assert code == 1 and said == f"fastbert: error: output.folder {tmp_path / 'notes'} is a file; it must be a folder\n"
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_vocabulary_of_another_order_is_refused(pretrain, tmp_path):
    from tiny_bert import TINY

    start = tmp_path / "start"
    fastbert.BertForPreTraining(fastbert.BertConfig(**{**TINY, "vocab_size": len(VOCAB)})).save_pretrained(start)
    fastbert.BertTokenizer([*VOCAB[:5], *reversed(VOCAB[5:])]).save_pretrained(start)
    code, said, _ = pretrain(f"model.checkpoint={start}", "model.num_hidden_layers=3")
    assert code == 1 and "the model's tokenizer has another vocabulary" in said


def test_without_held_out_text_nothing_is_evaluated(pretrain, tmp_path):
    assert pretrain("data.heldout_batches=0")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train"}
    shutil.rmtree(tmp_path / "out")
    code, said, _ = pretrain("data.heldout_batches=0", "training.keep_best=true", "training.evaluate_every=2")
    assert code == 1 and "there is no held-out text to know the best by" in said


def test_the_example_has_every_key():
    """What is commented out there is the default: with it in, the settings are the same."""
    example = Path(__file__).resolve().parents[2] / "docs" / "pretrain.toml"
    settings = load_settings(example)
    text = example.read_text()
    for section, keys in settings.to_dict().items():
        part = text.split(f"[{section}]")[1].split("\n[")[0]
        for key in keys:
            assert key in part, f"{section}.{key}"
    assert load_settings(example, ["optimizer.betas=[0.9, 0.999]", "training.keep=2", "training.seed=0"]) == settings


def test_peaks(config):
    settings = load_settings(config)
    assert peak_flops(settings, torch.device("cpu")) == 1e12  # as the settings say
    fp32 = load_settings(config, ["training.peak_tflops=0.5"])
    assert peak_flops(fp32, torch.device("cpu")) == 5e11
    names = list(GPU_PEAKS)
    for i, name in enumerate(names):  # a longer name comes before what is part of it
        assert not any(earlier in name for earlier in names[:i]), name
