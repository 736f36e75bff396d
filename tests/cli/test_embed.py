"""`fastbert embed`, in the process: formats, options, bad lines, errors."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_support import make_texts, read_jsonl, run, write_texts
from tiny_bert import save_tiny

import fastbert
from fastbert.cli import main as cli
from fastbert.cli.main import main
from fastbert.inference import Embedder, pooling


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_names_the_poolings_that_there_are():
    assert cli.POOLINGS == pooling.POOLINGS  # a copy, so that --help need not import torch


def test_every_format_holds_the_embedders_vectors_in_order(tiny, folder, capsys):

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


def test_bad_lines_fail_or_are_skipped(tiny, folder, capsys):

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
        (["MODEL", "in.txt", "--device", "cuda:99"], 1, "device is 'cuda:99'"),
        (["MODEL", "in.txt", "--max-length", "99"], 1, "max_length is 99"),
        (["MODEL", "in.txt", "-o", "out.txt"], 2, "name an --output-format"),
        (["MODEL", "in.txt", "--output-format", "npy"], 2, "cannot be written to stdout"),
        (["MODEL", "in.txt", "--resume"], 2, "need a file"),
        (["MODEL", "-", "-"], 2, "can be read once"),
        (["MODEL", "in.txt", "--max-tokens", "0"], 2, "at least 1"),
        (["MODEL", "in.txt", "--pooling", "cls,median"], 2, "'median' is none of cls, max, mean"),
        (["MODEL", "in.txt", "--prompt", "a", "--prompt-name", "query"], 2, "not allowed with argument"),
        (["MODEL", "in.txt", "--prompt-name", "q"], 1, "prompt_name is 'q'; it must be one of 'query', 'document'"),
        (["MODEL", "in.txt", "--truncate-dim", "49"], 1, "truncate_dim is 49; it must be 1 to 48"),
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
