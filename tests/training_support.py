"""What the tests of training share: a tiny model's settings, and batches made up on the spot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from support import TINY
from tiny_bert import VOCAB

import fastbert
from fastbert.training.batches import PretrainingBatch
from fastbert.training.objective import MODELS
from fastbert.training.pretraining import Pretraining
from fastbert.training.settings import Settings, read_settings

SIZES = {**TINY, "vocab_size": len(VOCAB), "num_hidden_layers": 2, "initializer_range": 0.05}


class MadeUpBatches:
    """Batches that depend on (seed, position) alone, of lengths and labels that differ from one to the next."""

    def __init__(self, seed: int = 0, *, rank: int = 0, world_size: int = 1, sequences: int = 4, pairs: bool = True):
        self.seed, self.rank, self.world_size, self.sequences, self.pairs = seed, rank, world_size, sequences, pairs
        self.position = 0

    def __iter__(self) -> Iterator[PretrainingBatch]:
        while True:
            self.position += 1
            yield self.batch((self.position - 1) * self.world_size + self.rank)

    def batch(self, index: int) -> PretrainingBatch:
        random = np.random.default_rng((self.seed, index))
        lengths = random.integers(4, 33, self.sequences + index % 3)
        total = int(lengths.sum())
        words = SIZES["vocab_size"] - 5
        ids = torch.from_numpy(5 + (words * random.random(total) ** 4).astype(np.int64))  # some far more often
        asked = torch.from_numpy(random.random(total) < 0.1 + 0.1 * (index % 2))
        asked[0] = True
        next_sentence = torch.from_numpy(random.integers(0, 2, len(lengths))) if self.pairs else None
        return PretrainingBatch(
            input_ids=ids.masked_fill(asked, 4),
            token_type_ids=torch.from_numpy(random.integers(0, 2, total)),
            cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths])).to(torch.int32),
            max_seqlen=int(lengths.max()),
            labels=torch.where(asked, ids, -100),
            next_sentence_label=next_sentence,
        )

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def make_settings(folder: Path | str, **overrides) -> Settings:
    """Settings of a short run; `overrides` are section__key=value."""
    values: dict[str, dict] = {
        "data": {"shards": "unused"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "training": {"steps": 6, "log_every": 2, "save_every": 2, "evaluate_every": 2, "seed": 3},
        "output": {"folder": str(folder), "tensorboard": False},
        "model": {},
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        values[section][key] = value
    return read_settings(values)


def make_run(settings: Settings, batches=None, *, heldout: bool = True, model=None, dropout=0.1, **options):
    """A run from the same fresh weights each time, over batches made up; resumed where there is a checkpoint."""
    kind = MODELS[settings.training.objective]
    config = fastbert.BertConfig(**SIZES)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(settings.training.seed)
    model = kind(config) if model is None else model
    evaluation = (lambda: [MadeUpBatches(99).batch(i) for i in range(2)]) if heldout else None
    return Pretraining(
        settings, model, fastbert.BertTokenizer(VOCAB), batches or MadeUpBatches(), evaluation, **options
    )


def resumed_run(settings: Settings, **options) -> Pretraining:
    """A run as the command line with --resume makes it: from the newest checkpoint, or from the start."""
    run = make_run(settings, **options)
    newest = run.checkpoints.newest()
    if newest is None:
        return run
    kind = MODELS[settings.training.objective]
    run = make_run(settings, model=kind.from_pretrained(newest), **options)
    run.resume(newest)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def assert_close_weights(first: Path, second: Path, atol: float = 1e-6) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def torchrun(folder: Path, arguments: list[str]) -> str:
    """Runs distributed_driver.py in two processes; returns what they said."""
    driver = Path(__file__).with_name("distributed_driver.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(driver), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


WORDS = VOCAB[5:16]
CONFIG = """\
[data]
shards = "{shards}"
tokens_per_batch = 160

[optimizer]
lr = 1e-3

[schedule]
warmup_steps = 2

[training]
steps = 8
accumulate = 2
save_every = 2
evaluate_every = 4
log_every = 3
seed = 5
peak_tflops = 1

[output]
folder = "{out}"
tensorboard = false

[model]
hidden_size = 48
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 96
max_position_embeddings = 40
"""


def write_run(folder: Path) -> Path:
    """Prepares a little text in `folder`; returns the configuration of a short run on it."""
    from fastbert.cli.main import main

    random = np.random.default_rng(0)
    sentence = lambda: " ".join(random.choice(WORDS, random.integers(3, 9))) + " ."  # noqa: E731
    documents = ["\n".join(sentence() for _ in range(random.integers(2, 8))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    shards = folder / "shards"
    options = ["--vocab", str(folder / "vocab.txt"), "--held-out", "0.2", "--max-length", "40", "-q"]
    assert main(["prepare", str(folder / "text.txt"), "-o", str(shards), *options]) == 0
    config = folder / "config.toml"
    config.write_text(CONFIG.format(shards=shards, out=folder / "out"))
    return config
