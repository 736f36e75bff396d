"""`fastbert embed`, interrupted: resumed runs, kills, signals, pipes and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import COMMAND, ENVIRONMENT, drive, make_texts, run, write_texts
from tiny_bert import save_tiny

from fastbert.inference import Embedder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_resume_wants_the_same_run(tiny, folder, capsys):
    texts = make_texts(30)
    write_texts("in.txt", [*texts, ""])  # the last line ends the run in its last window
    args = ["embed", tiny, "in.txt", "-o", "o.npy", "-q", "--window", 8]
    assert run(capsys, *args)[0] == 1
    journal, partial = Path("o.npy.journal.json"), Path("o.npy.partial")
    assert json.loads(journal.read_text())["records"] == 24 and not Path("o.npy").exists()
    kept = journal.read_text()

    for extra, message in (
        ([], "--resume continues it, --restart throws it away"),
        (["--resume", "--pooling", "cls"], "pooling was 'mean' and is 'cls' now"),
        (["--resume", "--prompt", "the "], "prompt was '' and is 'the ' now"),
        (["--resume", "--truncate-dim", 8], "truncate_dim was None and is 8 now"),
        (["--resume", "--max-tokens", 99], "max_tokens was 8192 and is 99 now"),
        (["--resume", "--input-format", "jsonl"], "input format was 'auto' and is 'jsonl' now"),
    ):
        code, _, err = run(capsys, *args, *extra)
        assert code == 1 and message in err, err
        assert journal.read_text() == kept
    write_texts("in.txt", ["another", *texts[1:]])
    code, _, err = run(capsys, *args, "--resume")
    assert code == 1 and "the first 24 records are not those of the interrupted run" in err
    write_texts("in.txt", texts[:20])
    assert "the first 24 records are not those" in run(capsys, *args, "--resume")[2]
    write_texts("in.txt", texts)
    torch.manual_seed(1)
    other = save_tiny(folder / "other")
    assert "model (a hash of its" in run(capsys, "embed", other, *args[2:], "--resume")[2]

    assert run(capsys, *args, "--resume")[0] == 0  # mended after what was done: that is the use of it
    np.testing.assert_allclose(np.load("o.npy"), Embedder.from_pretrained(tiny).embed(texts), rtol=0, atol=1e-6)
    assert not journal.exists() and not partial.exists()


def test_damaged_leftovers_and_restart(tiny, folder, capsys):
    texts = make_texts(20)
    write_texts("in.txt", [*texts, ""])
    args = ["embed", tiny, "in.txt", "-o", "o.npy", "-q", "--window", 8]
    run(capsys, *args)
    journal, partial = Path("o.npy.journal.json"), Path("o.npy.partial")
    kept = journal.read_text()
    partial.write_bytes(partial.read_bytes()[:100])
    assert "has 100 bytes and the journal speaks of" in run(capsys, *args, "--resume")[2]
    partial.unlink()
    assert "has 0 bytes and the journal speaks of" in run(capsys, *args, "--resume")[2]
    for damage in ("{", "[]", "{}", kept.replace("records", "recor"), kept.replace('"version": 3', '"version": 2')):
        journal.write_text(damage)
        code, _, err = run(capsys, *args, "--resume")
        assert code == 1 and "--restart" in err and "Traceback" not in err
    write_texts("in.txt", texts)
    assert run(capsys, *args, "--restart")[0] == 0
    assert np.load("o.npy").shape == (20, 48) and len(os.listdir()) == 2
    Path("o.npy").write_bytes(b"old")
    assert run(capsys, *args, "--resume")[0] == 0  # nothing to continue: from the start
    assert np.load("o.npy").shape == (20, 48)


def test_two_processes_do_not_write_one_output(tiny, folder, capsys):
    import fcntl

    write_texts("in.txt", ["a cat"])
    with open("o.npy.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = run(capsys, "embed", tiny, "in.txt", "-o", "o.npy", "-q")
    assert code == 1 and "another process is writing o.npy.partial" in err


@pytest.mark.parametrize(
    "format", ["npy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jsonl", "parquet"))]
)
def test_a_kill_at_any_step_loses_nothing_that_was_committed(tiny, folder, format):
    """SIGKILL before each fsync, rename and removal of a run in turn, with a torn write on top."""
    write_texts("in.txt", [*make_texts(20), "", "a cat"])
    report = drive("kill", f"o.{format}", tiny, "in.txt")
    assert report["identical"] == report["kills"] >= 12, report
    assert report["kept"] == [8, 16, 22], report  # killed again and again: each run adds its window
    assert report["chain"] and report["left"] == ["in.txt", f"o.{format}"], report


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(folder):
    model = save_tiny(folder / "model", hidden_size=1024, num_hidden_layers=0)
    counts = 12_000, 28_000  # both of several windows, a few of which are in memory at a time
    for count in counts:
        write_texts(f"{count}.txt", ["a cat"] * count)
    peaks = [drive("memory", f"o{n}.npy", model, f"{n}.txt")["peak_mib"] for n in counts]
    assert peaks[1] - peaks[0] < 40, peaks  # the vectors alone are 62 MiB more


# The command line, which halts after its first commit: however fast the machine is, a signal finds it going on.
HALTS = """
import os, sys, time
from fastbert.cli.main import main
fsync = os.fsync
def fsync_or_halt(descriptor):
    while os.path.exists("o.jsonl.journal.json"):
        time.sleep(0.01)
    fsync(descriptor)
os.fsync = fsync_or_halt
sys.exit(main())
"""


def test_ctrl_c_then_resume_gives_the_same_file(tiny, folder):
    write_texts("in.txt", make_texts(1000))
    options = ["embed", str(tiny), "in.txt", "-o", "o.jsonl", "--window", "64"]
    args = [*COMMAND, *options]
    subprocess.run([*args, "-q"], check=True, env=ENVIRONMENT)
    whole = Path("o.jsonl").read_bytes()
    Path("o.jsonl").unlink()
    # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    halts = [sys.executable, "-c", HALTS, *options]
    process = subprocess.Popen(halts, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=heed)
    while not Path("o.jsonl.journal.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert err == "fastbert: o.jsonl is not complete; --resume continues it\nfastbert: interrupted\n"
    assert not Path("o.jsonl").exists()
    done = subprocess.run([*args, "--resume"], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert "of them by the run before" in done.stderr
    assert Path("o.jsonl").read_bytes() == whole


def test_a_reader_that_goes_away_is_no_error(tiny, folder):
    write_texts("in.txt", make_texts(2000))
    process = subprocess.Popen(
        [*COMMAND, "embed", str(tiny), "in.txt", "--window", "16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert json.loads(process.stdout.readline())["line"] == 1
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


def test_a_bar_on_a_terminal(tiny, folder):
    import pty
    import termios

    write_texts("in.txt", make_texts(300))
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    process = subprocess.Popen([*COMMAND, "embed", str(tiny), "in.txt", "-o", "o.npy"], stderr=writer, env=ENVIRONMENT)
    os.close(writer)
    shown = b""
    try:
        while part := os.read(reader, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(reader)
    assert process.wait(60) == 0
    assert b"100%" in shown and b"tokens/s" in shown and b"300 texts to o.npy" in shown
