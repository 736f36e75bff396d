"""The command line, in the process; in one of its own where signals, pipes and memory are the matter."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_bert import save_tiny

import fastbert
from fastbert.cli import main
from fastbert.inference import Embedder
from fastbert.inference.job import windows
from fastbert.inference.records import InputError, Reading, Record, Records

DRIVER = Path(__file__).with_name("cli_driver.py")
COMMAND = [sys.executable, "-m", "fastbert.cli"]
# One thread, as in conftest.py; one arena, so that a peak is what is held and not how threads take turns.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny_lm"), fastbert.BertForMaskedLM)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_texts(count):
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "red", "."]
    return [" ".join(words[(i * k) % 9] for k in range(1 + i * 7 % 23)) for i in range(count)]


def write_texts(path, texts):
    Path(path).write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def run(capsys, *args):
    """Exit code, stdout and stderr of the command line."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def read_jsonl(text):
    rows = [json.loads(line) for line in text.splitlines()]
    return rows, np.array([row["embedding"] for row in rows], dtype=np.float32)


def texts_of(inputs, **reading):
    """(line, text) of each record, the problem in place of a text there is not."""
    records = Records([str(name) for name in inputs], Reading(**reading))
    return [(record.line, record.problem or record.text) for record in records]


def test_every_format_holds_the_embedders_vectors_in_order(tiny, folder, capsys):
    import pyarrow.parquet as pq

    texts = make_texts(70)
    write_texts("in.txt", texts)
    expected = Embedder.from_pretrained(tiny).embed(texts)
    for out in ("o.npy", "o.parquet", "o.jsonl"):
        code, _, err = run(capsys, "embed", tiny, "in.txt", "-o", out, "--window", 32, "--max-tokens", 64)
        assert code == 0 and f"70 texts to {out}" in err and "tokens/s" in err
    npy = np.load("o.npy", mmap_mode="r")
    assert npy.dtype == np.float32 and npy.shape == (70, 48)
    np.testing.assert_allclose(npy, expected, rtol=0, atol=2e-6)
    rows, vectors = read_jsonl(Path("o.jsonl").read_text())
    assert [row["line"] for row in rows] == list(range(1, 71)) and set(rows[0]) == {"line", "embedding"}
    np.testing.assert_array_equal(vectors, npy)
    table = pq.read_table("o.parquet")
    assert table.column_names == ["line", "embedding"] and table["line"].to_pylist() == list(range(1, 71))
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), npy)
    assert sorted(os.listdir()) == ["in.txt", "o.jsonl", "o.npy", "o.parquet"]


def test_vector_options(tiny, folder, capsys):
    texts = make_texts(9)
    write_texts("in.txt", texts)
    options = ["--pooling", "cls", "--normalize", "--max-length", 6, "--dtype", "float32", "--device", "cpu"]
    assert run(capsys, "embed", tiny, "in.txt", "-o", "o.npy", "-q", *options) == (0, "", "")
    embedder = Embedder.from_pretrained(tiny, pooling="cls", normalize=True, max_length=6)
    np.testing.assert_allclose(np.load("o.npy"), embedder.embed(texts), rtol=0, atol=1e-6)


def test_stdin_to_stdout(tiny, folder, capsys, monkeypatch):
    texts = make_texts(5)
    for data, options in (
        ("\n".join(texts), []),
        ("\n".join(json.dumps({"t": text}) for text in texts), ["-", "--input-format", "jsonl", "--field", "t"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        stream = io.TextIOWrapper(io.BytesIO())
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main(["embed", str(tiny), *options, "-q"]) == 0
        rows, vectors = read_jsonl(stream.buffer.getvalue().decode())
        assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(vectors, Embedder.from_pretrained(tiny).embed(texts), rtol=0, atol=1e-6)
    assert os.listdir() == []


def test_several_inputs_name_their_file(tiny, folder, capsys):
    import pyarrow.parquet as pq

    write_texts("a.txt", ["a cat", "a dog"])
    Path("b.jsonl").write_text('{"text": "the mat"}\n')
    Path("c.csv").write_text('n,text\n1,"the\nred"\n2,cat\n')
    inputs = ["a.txt", "b.jsonl", "c.csv"]
    assert run(capsys, "embed", tiny, *inputs, "-o", "o.jsonl", "-q")[0] == 0
    rows, vectors = read_jsonl(Path("o.jsonl").read_text())
    where = [("a.txt", 1), ("a.txt", 2), ("b.jsonl", 1), ("c.csv", 2), ("c.csv", 4)]
    assert [(row["file"], row["line"]) for row in rows] == where
    expected = Embedder.from_pretrained(tiny).embed(["a cat", "a dog", "the mat", "the red", "cat"])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)
    assert run(capsys, "embed", tiny, *inputs, "-o", "o.parquet", "-q")[0] == 0
    table = pq.read_table("o.parquet")
    assert list(zip(table["file"].to_pylist(), table["line"].to_pylist(), strict=True)) == where


def test_text_lines(folder):
    Path("in").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x0b\xe2\x80\xa8\rstill\n\n \nbad\xff\nlast")
    assert texts_of(["in"]) == [
        (1, "one"),
        (2, "two\x0b\u2028\rstill"),
        (3, "has an empty text"),
        (4, "has an empty text"),
        (5, "is not UTF-8 (byte 0xff at byte 4)"),
        (6, "last"),
    ]
    assert [text for _, text in texts_of(["in"], allow_empty=True)][2:4] == ["", " "]


def test_jsonl_lines(folder):
    lines = ['{"text": "a", "x": 1}', "{", "", "[1]", '{"x": 1}', '{"text": null}', '{"text": ""}']
    lines += ['{"text": "\\ud800"}', "[" * 100_000, '{"text": "caf\\u00e9"}']
    write_texts("in.jsonl", lines)
    got = texts_of(["in.jsonl"])
    assert got[0] == (1, "a") and got[9] == (10, "café")
    for (_, problem), part in zip(
        got[1:9],
        ["not JSON", "is empty", "a JSON list", "no field 'text'", "NoneType", "empty text", "surrogate", "not JSON"],
        strict=True,
    ):
        assert part in problem, (part, problem)


def test_csv_lines(folder):
    Path("in.csv").write_bytes(
        b'id,text\n1,"one, ""quoted"""\n2,"two\nlines"\n3\n\n4,"x" y\n5,\xff\n6,caf\xc3\xa9\n7,"open\n8,never closed\n'
    )
    got = texts_of(["in.csv"])
    assert [line for line, _ in got] == [2, 3, 5, 6, 7, 8, 9, 10]
    assert got[0][1] == 'one, "quoted"' and got[1][1] == "two\nlines" and got[6 - 0][1] == "café"
    for index, part in {
        2: "has 1 fields; the header line names 2",
        3: "is empty",
        4: "no csv",
        5: "UTF-8",
        7: "no csv",
    }.items():
        assert part in got[index][1], (index, got[index])


def test_a_suffix_that_is_not_known_is_refused(folder):
    Path("in.log").write_text('["a"]\n')
    with pytest.raises(InputError, match=r"in\.log: the suffix '\.log' is none of \.txt, \.md"):
        Records(["in.log"])
    assert texts_of(["in.log"], format="text") == [(1, '["a"]')]


def test_csv_columns(folder):
    Path("in.tsv").write_text('a\t"b\n')
    assert texts_of(["in.tsv"], header=False, column="2", quoted=False) == [(1, '"b')]
    Path("in.csv").write_text("2;text\nx;y\n")
    assert texts_of(["in.csv"], column="2", delimiter=";") == [(2, "x")]  # a name goes before a number
    assert texts_of(["in.csv"], column="1", delimiter=";") == [(2, "x")]
    with pytest.raises(ValueError, match=r"in\.csv:1: no column 'body'; there are '2', 'text'"):
        texts_of(["in.csv"], column="body", delimiter=";")
    with pytest.raises(ValueError, match="without a header line, the column is a number"):
        texts_of(["in.csv"], header=False)
    Path("empty.csv").write_text("")
    assert texts_of(["empty.csv"]) == []


def test_records_of_json_and_parquet(folder):
    Path("in.json").write_text('[\n {"text": "one"},\n {"text": 2},\n {"text": "three"}]')
    assert texts_of(["in.json"]) == [(2, "one"), (3, "has a field 'text' of type int, not a string"), (4, "three")]
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["one", None, "three"]}), "in.parquet", row_group_size=2)
    assert texts_of(["in.parquet"]) == [(1, "one"), (2, "has an empty text"), (3, "three")]
    with pytest.raises(InputError, match=r"in\.parquet: column 'n' is of type int64, not string"):
        Records(["in.parquet"], Reading(column="n"))


def test_quotes_in_tsv_are_characters(folder):
    Path("in.tsv").write_text('id\ttext\n1\t"Alien\n2\tred\n3\t"x" y\n')
    assert texts_of(["in.tsv"]) == [(2, '"Alien'), (3, "red"), (4, '"x" y')]
    Path("in.tsv").write_text("text\n" + "a\n" * 40000 + 'b\tc"\n' + "d\n")  # past the bytes that are looked at
    assert texts_of(["in.tsv"])[-2:] == [
        (40002, "has 2 fields; the header line names 1; if fields stand in quotes, give --quoted"),
        (40003, "d"),
    ]


def test_the_hash_is_of_what_records_came_from(folder):
    write_texts("a.txt", ["one", "two"])
    write_texts("empty.txt", [])
    records = Records(["a.txt", "empty.txt"])
    seen = [records.digest() for _ in records]
    assert len(set(seen)) == 2 and records.digest() == seen[-1]  # an empty file after it adds nothing


def test_a_line_without_end_is_bad_and_not_held(folder, monkeypatch):
    monkeypatch.setattr("fastbert.inference.input_files.MAX_LINE", 1 << 20)
    Path("in").write_bytes(b"one\n" + b"x" * (3 << 20) + b"\n" + b"y" * (1 << 20) + b"\nthree\n")
    got = texts_of(["in"])
    assert got[0] == (1, "one") and got[1] == (2, "is longer than 1 MiB") and got[3] == (4, "three")
    assert len(got[2][1]) == 1 << 20


def test_windows_are_bounded():
    records = [Record(0, i, "x" * (i % 5)) for i in range(20)]
    split = list(windows(records, size=8, chars=10))
    assert [record for window in split for record in window] == records
    assert [len(window) for window in split] == [5, 5, 5, 5]
    assert [len(window) for window in windows(records, size=8)] == [8, 8, 4]


def test_bad_lines_fail_or_are_skipped(tiny, folder, capsys):
    import pyarrow.parquet as pq

    Path("in.txt").write_bytes(b"a cat\n\xff\nthe dog\n\nred\n")
    code, out, err = run(capsys, "embed", tiny, "in.txt", "-o", "o.npy")
    assert (code, out) == (1, "")
    assert err == "fastbert: error: in.txt:2 is not UTF-8 (byte 0xff at byte 1)\n"
    assert os.listdir() == ["in.txt"]

    expected = Embedder.from_pretrained(tiny).embed(["a cat", "the dog", "red"])
    for out in ("o.npy", "o.parquet", "o.jsonl"):
        code, _, err = run(capsys, "embed", tiny, "in.txt", "-o", out, "--bad-lines", "skip", "-q")
        assert code == 0
        assert err.splitlines() == [
            "fastbert: in.txt:2 is not UTF-8 (byte 0xff at byte 1): skipped",
            "fastbert: in.txt:4 has an empty text: skipped",
            "fastbert: 2 of 5 lines skipped",
        ]
    npy = np.load("o.npy")
    assert np.isnan(npy[[1, 3]]).all()
    np.testing.assert_allclose(npy[[0, 2, 4]], expected, rtol=0, atol=1e-6)
    assert [row["line"] for row in read_jsonl(Path("o.jsonl").read_text())[0]] == [1, 3, 5]
    assert pq.read_table("o.parquet")["line"].to_pylist() == [1, 3, 5]


def test_many_bad_lines_are_counted_not_listed(tiny, folder, capsys):
    write_texts("in.txt", ["a"] + [""] * 50)
    code, _, err = run(capsys, "embed", tiny, "in.txt", "-o", "o.npy", "--bad-lines", "skip", "-q")
    assert code == 0 and len(err.splitlines()) == 22 and err.endswith("50 of 51 lines skipped\n")


def test_an_input_without_a_record(tiny, folder, capsys):
    import pyarrow.parquet as pq

    write_texts("in.txt", [])
    for out in ("o.npy", "o.parquet", "o.jsonl"):
        assert run(capsys, "embed", tiny, "in.txt", "-o", out, "-q")[0] == 0
    assert np.load("o.npy").shape == (0, 48)
    assert pq.read_table("o.parquet").num_rows == 0 and Path("o.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["./none", "in.txt"], 1, "no folder './none'"),
        (["MODEL", "none.txt"], 1, "none.txt: no such file"),
        (["MODEL", "."], 1, ".: is a folder"),
        (["MODEL", "in.txt", "-o", "in.txt", "--output-format", "npy"], 1, "in.txt is an input, too"),
        (["MODEL", "in.txt", "--device", "cuda:99"], 1, "--device cuda:99"),
        (["MODEL", "in.txt", "--max-length", "99"], 1, "max_length is 99"),
        (["MODEL", "in.txt", "-o", "out.txt"], 2, "name an --output-format"),
        (["MODEL", "in.txt", "--output-format", "npy"], 2, "cannot be written to stdout"),
        (["MODEL", "in.txt", "--resume"], 2, "need a file"),
        (["MODEL", "-", "-"], 2, "can be read once"),
        (["MODEL", "in.txt", "--max-tokens", "0"], 2, "at least 1"),
        (["MODEL", "in.txt", "--pooling", "max"], 2, "invalid choice"),
        ([], 2, "MODEL"),
    ],
)
def test_errors_are_one_line_with_a_code(tiny, folder, capsys, args, code, message):
    write_texts("in.txt", ["a cat"])
    got, out, err = run(capsys, "embed", *[tiny if arg == "MODEL" else arg for arg in args])
    assert (got, out) == (code, "") and message in err and "Traceback" not in err
    assert code == 2 or len(err.splitlines()) == 1
    assert os.listdir() == ["in.txt"]


def test_debug_shows_the_traceback(tiny, folder):
    with pytest.raises(ValueError, match="no such file"):
        main(["embed", str(tiny), "none.txt", "--debug"])


def test_a_vector_that_is_not_finite_ends_the_run(folder, capsys):
    model = fastbert.BertModel.from_pretrained(save_tiny(folder / "model"))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = torch.inf  # "cat"
    model.save_pretrained("model")
    write_texts("in.txt", ["a dog", "a cat"])
    code, _, err = run(capsys, "embed", "model", "in.txt", "-o", "o.npy")
    assert code == 1 and "in.txt:2: the vector is not finite" in err
    assert not Path("o.npy").exists()


def test_resume_wants_the_same_run(tiny, folder, capsys):
    texts = make_texts(30)
    write_texts("in.txt", [*texts, ""])  # the last line ends the run in its last window
    args = ["embed", tiny, "in.txt", "-o", "o.npy", "-q", "--window", 8]
    assert run(capsys, *args)[0] == 1
    journal, partial = Path("o.npy.journal.json"), Path("o.npy.partial")
    assert json.loads(journal.read_text())["records"] == 24 and not Path("o.npy").exists()
    kept = journal.read_text()

    for extra, message in (
        ([], "--resume goes on with it, --restart throws it away"),
        (["--resume", "--pooling", "cls"], "pooling was 'mean' and is 'cls' now"),
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
    for damage in ("{", "[]", "{}", kept.replace("records", "recor"), kept.replace('"version": 1', '"version": 2')):
        journal.write_text(damage)
        code, _, err = run(capsys, *args, "--resume")
        assert code == 1 and "--restart" in err and "Traceback" not in err
    write_texts("in.txt", texts)
    assert run(capsys, *args, "--restart")[0] == 0
    assert np.load("o.npy").shape == (20, 48) and len(os.listdir()) == 2
    Path("o.npy").write_bytes(b"old")
    assert run(capsys, *args, "--resume")[0] == 0  # nothing to go on with: from the start
    assert np.load("o.npy").shape == (20, 48)


def test_two_processes_do_not_write_one_output(tiny, folder, capsys):
    import fcntl

    write_texts("in.txt", ["a cat"])
    with open("o.npy.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = run(capsys, "embed", tiny, "in.txt", "-o", "o.npy", "-q")
    assert code == 1 and "another process is writing o.npy.partial" in err


@pytest.mark.parametrize("format", ["npy", "jsonl", "parquet"])
def test_a_kill_at_any_step_loses_nothing_that_was_committed(tiny, folder, format):
    """SIGKILL before each fsync, rename and removal of a run in turn, with a torn write on top."""
    write_texts("in.txt", [*make_texts(20), "", "a cat"])
    report = drive("kill", f"o.{format}", tiny, "in.txt")
    assert report["identical"] == report["kills"] >= 12, report
    assert report["kept"] == [8, 16, 22], report  # killed again and again: each run adds its window
    assert report["chain"] and report["left"] == ["in.txt", f"o.{format}"], report


def test_memory_does_not_grow_with_the_input(folder):
    model = save_tiny(folder / "model", hidden_size=1024, num_hidden_layers=0)
    for count in (5_000, 30_000):
        write_texts(f"{count}.txt", ["a cat"] * count)
    peaks = [drive("memory", f"o{n}.npy", model, f"{n}.txt")["peak_mib"] for n in (5_000, 30_000)]
    assert peaks[1] - peaks[0] < 60, peaks  # the vectors alone are 98 MiB more


def drive(*args):
    done = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The command line, which halts after its first commit: however fast the machine is, a signal finds it going on.
HALTS = """
import os, sys, time
from fastbert.cli import main
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
    assert err == "fastbert: o.jsonl is not complete; --resume goes on with it\nfastbert: interrupted\n"
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


def test_fill_mask_prints_a_table_or_json(tiny_lm, folder, capsys):
    from fastbert.inference import FillMask

    texts = ["the [MASK] sat", "[MASK] cat [MASK]"]
    fill = FillMask.from_pretrained(tiny_lm)
    code, out, err = run(capsys, "fill-mask", tiny_lm, *texts, "--top-k", 2, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["text"], row["mask"]) for row in rows] == [(texts[0], 1), (texts[1], 1), (texts[1], 2)]
    expected = [candidates for text in texts for candidates in fill(text, top_k=2)]
    assert [[c["token"] for c in row["candidates"]] for row in rows] == [[c.token for c in e] for e in expected]
    code, out, _ = run(capsys, "fill-mask", tiny_lm, texts[0], "--top-k", 2)
    best = fill(texts[0], top_k=1)[0][0]
    assert code == 0 and len(out.splitlines()) == 3
    assert f"{best.probability:.1%}  {best.token}" in out and best.sequence in out


def test_fill_mask_errors(tiny, tiny_lm, folder, capsys):
    assert "no masked-language-model head" in run(capsys, "fill-mask", tiny, "a [MASK]")[2]
    code, _, err = run(capsys, "fill-mask", tiny_lm, "a cat")
    assert code == 1 and err == "fastbert: error: the text has no [MASK]: 'a cat'\n"


def test_doctor_names_versions_backends_and_reasons(capsys, monkeypatch):
    from fastbert import native
    from fastbert.native import extension

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for part in (fastbert.__version__, metadata.version("torch"), "transformers", "threads", "gpu", "  yes"):
        assert part in out, part
    assert (native.isa() in out) if native.available() is None else ("not built" in out)
    monkeypatch.setenv("FASTBERT_ISA", "sse9")
    extension.chosen_isa.cache_clear()
    assert "FASTBERT_ISA" in run(capsys, "doctor")[1]
    extension.chosen_isa.cache_clear()


def test_help_and_version(capsys):
    assert run(capsys, "--version") == (0, f"fastbert {fastbert.__version__}\n", "")
    for command in ([], ["embed"], ["fill-mask"], ["doctor"]):
        code, out, _ = run(capsys, *command, "--help")
        assert code == 0 and "example" in out and "fastbert " + " ".join(command) in out
    assert run(capsys)[0] == 2


def test_help_imports_nothing_that_takes_time():
    code = (
        "import sys, torch; before = set(sys.modules); import fastbert.cli\n"
        "try: fastbert.cli.main(['embed', '--help'])\nexcept SystemExit: pass\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'pyarrow', 'tqdm', 'tokenizers', 'transformers', 'huggingface_hub'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
