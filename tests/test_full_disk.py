"""A full disk is an error that names the file; RLIMIT_FSIZE stands for the disk."""

import errno
import resource
import signal

import pytest

from fastbert.files import write_text
from fastbert.training.logs import Log


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
