"""The line of progress: on a terminal, or where it is asked for, and nothing elsewhere."""

import io

import pytest

from fastbert import progress
from fastbert.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_bytes_speed_and_time_left(clock, capsys):
    bar = Progress(shown=True)
    bar.begin(4_000_000)
    for seconds, done in ((0.5, 0), (1, 1_000_000), (1.05, 1_500_000), (10, 3_000_000), (10.01, 4_000_000)):
        clock[0] = 1000.0 + seconds
        bar.update(done, done // 100)
    bar.line.say("bad")
    bar.line.close()
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines == [
        "fastbert: 0.0 MB, 0 tokens/s",
        "fastbert: 25% of 4.0 MB, 3 s left, 10,000 tokens/s",  # the second one follows too soon
        "fastbert: 75% of 4.0 MB, 3 s left, 3,000 tokens/s",
        "fastbert: 100% of 4.0 MB, 0 s left, 3,996 tokens/s",
        "fastbert: bad\n",
    ]
    assert bar.spent() == "40,000 tokens in 10.0 s, 3,996 tokens/s"


def test_texts_and_an_unknown_end(clock, capsys):
    bar = Progress(shown=True, texts=True)
    clock[0] += 2
    bar.update(1234, 50)
    bar.line.close()
    assert capsys.readouterr().err == "fastbert: 1,234 texts, 25 tokens/s\n"


@pytest.mark.parametrize("shown", [None, False])
def test_no_line_without_a_terminal_or_for_quiet(monkeypatch, shown, clock):
    stream = io.StringIO()
    stream.isatty = lambda: shown is False
    monkeypatch.setattr("sys.stderr", stream)
    bar = Progress(shown=shown)
    clock[0] += 2
    bar.update(5, 5)
    bar.line.close()
    assert stream.getvalue() == ""
