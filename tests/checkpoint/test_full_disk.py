"""A full disk is an error that names the file; RLIMIT_FSIZE stands for the disk."""

import contextlib
import errno
import resource
import signal
import threading

import numpy as np
import pytest
import torch

import fastbert
from fastbert.checkpoint.files import write_text
from fastbert.inference.output import FileOutput, NpyFormat, Progress
from fastbert.training.logs import Log
from fastbert.training.shards import Counts, Examples, Vocabulary, write_shard
from fastbert.training.training_state import CheckpointError, Checkpoints, TrainingState


@pytest.fixture
def full_disk():
    """No file may grow beyond 8 KiB."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_result_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path, full_disk):
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(OSError) as caught:
        write_text(path, "x" * 10000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_log_that_does_not_fit_is_named(tmp_path, full_disk):
    log = Log(tmp_path, step=0, tensorboard=False)
    with pytest.raises(OSError) as caught:
        for step in range(1000):
            log.write(step, "train", {"loss": 1.0})
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "log.jsonl"))


def test_weights_that_do_not_fit_are_named(tmp_path, full_disk):
    with pytest.raises(OSError) as caught:
        fastbert.checkpoint.load.save({"weight": torch.zeros(10000)}, tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "model.safetensors"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_is_named_and_the_one_before_stays(tmp_path, full_disk):
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = checkpoints.save(TrainingState(1, {}, {}, {}, []), lambda folder: None)
    with pytest.raises(CheckpointError, match=f"step-00000002 cannot be written: File too large; .* is {good}"):
        checkpoints.save(
            TrainingState(2, {}, {}, {}, []),
            lambda folder: fastbert.checkpoint.load.save({"w": torch.zeros(10000)}, folder),
        )
    assert checkpoints.complete() == [good]


def test_event_files_that_do_not_fit_are_named(tmp_path, full_disk, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the writer is a thread; it fails first
    log = Log(tmp_path, step=0, tensorboard=True)
    with pytest.raises(OSError) as caught:
        for step in range(200):
            log.write(step, "train", {"loss": 1.0, "gradient_norm": 1.0})
        log.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "tensorboard"))


def test_a_shard_that_does_not_fit_is_named(tmp_path, full_disk):
    path, n = tmp_path / "train-00000.shard", 1000
    tokens = np.zeros(8 * n, np.int64)
    examples = Examples(tokens, np.arange(0, 8 * n + 1, 8), np.full(n, 8), np.zeros(n, np.int64))
    with pytest.raises(OSError) as caught:
        write_shard(path, examples, Vocabulary(30522, "0" * 64), Counts())
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert not list(tmp_path.iterdir())


def test_vectors_that_do_not_fit_are_named(tmp_path, full_disk):
    output, progress = FileOutput(tmp_path / "vectors.npy", NpyFormat(4000), {}), Progress()
    with pytest.raises(OSError) as caught:
        output.append([], np.zeros((2, 4000), np.float32), progress)
    with contextlib.suppress(OSError):
        output.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "vectors.npy.partial"))
