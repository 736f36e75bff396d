"""`fastbert embed`: prompts, truncated vectors, several poolings; what it says of unknown and of cut texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_support import make_texts, run, write_texts
from tiny_bert import save_tiny

from fastbert.inference import Embedder
from fastbert.inference.base_embedder import TokenCounts
from fastbert.inference.output import FileOutput

PROMPTS = {"prompts": {"query": "the cat ", "passage": "red "}, "default_prompt_name": "passage"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with prompts, whose pooling leaves them out."""
    torch.manual_seed(0)
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    (folder / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vectors_of(capsys, model, *options):
    assert run(capsys, "embed", model, "in.txt", "-o", "o.npy", "-q", *options) == (0, "", "")
    return np.load("o.npy")


def test_prompts_and_truncated_vectors(model, folder, capsys):
    texts = make_texts(9)
    write_texts("in.txt", texts)
    embedder = Embedder.from_pretrained(model)
    for options, call in (
        ([], {}),
        (["--prompt-name", "query"], {"prompt_name": "query"}),
        (["--prompt", "a dog. "], {"prompt": "a dog. "}),
        (["--prompt", ""], {"prompt": ""}),
    ):
        expected = embedder.embed(texts, **call)
        np.testing.assert_allclose(vectors_of(capsys, model, *options), expected, rtol=0, atol=1e-6)
        short = vectors_of(capsys, model, *options, "--truncate-dim", 5)
        np.testing.assert_allclose(short, expected[:, :5], rtol=0, atol=1e-6)
    expected = Embedder.from_pretrained(model, pooling=["cls", "max"]).embed(texts)
    np.testing.assert_allclose(vectors_of(capsys, model, "--pooling", "cls,max"), expected, rtol=0, atol=1e-6)


def test_a_prompt_of_a_resumed_run(model, folder, capsys):
    """By its name or by its text, but the same."""
    write_texts("in.txt", [*make_texts(20), ""])
    args = ["embed", model, "in.txt", "-o", "o.npy", "-q", "--window", 8]
    assert run(capsys, *args, "--prompt-name", "query")[0] == 1
    for option in ([], ["--prompt-name", "passage"], ["--prompt", "the cat"]):
        code, _, err = run(capsys, *args, "--resume", *option)
        assert code == 1 and "prompt was 'the cat ' and is" in err
    write_texts("in.txt", make_texts(20))
    assert run(capsys, *args, "--resume", "--prompt", "the cat ")[0] == 0
    expected = Embedder.from_pretrained(model).embed(make_texts(20), prompt_name="query")
    np.testing.assert_allclose(np.load("o.npy"), expected, rtol=0, atol=1e-6)


def test_parquet_in_and_out_with_ids_and_a_prompt(model, folder, capsys):
    texts = make_texts(7)
    pq.write_table(pa.table({"key": [f"k{i}" for i in range(7)], "body": texts}), "in.parquet")
    options = ["--column", "body", "--id-column", "key", "--prompt-name", "query", "-q"]
    assert run(capsys, "embed", model, "in.parquet", "-o", "o.parquet", *options) == (0, "", "")
    table = pq.read_table("o.parquet")
    assert table["id"].to_pylist() == [f"k{i}" for i in range(7)]
    expected = Embedder.from_pretrained(model).embed(texts, prompt_name="query")
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, rtol=0, atol=1e-6)


def test_counts_leave_out_special_tokens_and_the_prompt(model):
    embedder, counts = Embedder.from_pretrained(model, max_length=8), TokenCounts()
    ids = embedder.tokenize(["a cat", "", "zebra cat xyz", "a " * 5, "a " * 4], prompt="the dog ", counts=counts)
    assert [len(text) for text in ids] == [6, 4, 7, 8, 8]
    assert counts == TokenCounts(tokens=2 + 0 + 3 + 4 + 4, unknown=2, cut=1)
    embedder.tokenize(["a " * 7, "zebra " * 6], prompt="", counts=counts)
    assert counts == TokenCounts(tokens=13 + 6 + 6, unknown=8, cut=2)


def test_the_run_says_how_many_texts_were_cut(model, folder, capsys):
    write_texts("in.txt", ["a cat", "the " * 39, "the " * 37, "a " * 60])
    _, _, err = run(capsys, "embed", model, "in.txt", "-o", "o.npy", "--prompt", "")
    assert err.splitlines()[1:] == ["fastbert: 2 of 4 texts are cut to 40 tokens"]
    assert run(capsys, "embed", model, "in.txt", "-o", "o.npy", "-q")[2] == ""
    write_texts("in.txt", ["a cat", "the " * 38])
    assert "cut" not in run(capsys, "embed", model, "in.txt", "-o", "o.npy", "--prompt", "")[2]
    assert "1 of 2 texts are cut" in run(capsys, "embed", model, "in.txt", "-o", "o.npy", "--prompt", "a ")[2]


def test_nearly_all_tokens_unknown(model, folder, capsys):
    write_texts("in.txt", ["привет мир", "как дела the", "the cat"])
    write_texts("b.txt", ["добрый день сегодня"])
    warning = "70% of the tokens are [UNK]; the model's vocabulary does not fit this language or script"
    long = ["--prompt", "the cat sat on the mat "]  # counts for nothing
    for options in ([], long):
        _, out, err = run(capsys, "embed", model, "in.txt", "b.txt", "-o", "o.jsonl", "-q", *options)
        assert err == f"fastbert: warning: in.txt, b.txt: {warning}\n" and not out
    write_texts("in.txt", ["привет the", "a cat"])
    assert run(capsys, "embed", model, "in.txt", "-o", "o.npy", "-q")[2] == ""


def test_a_resumed_run_counts_all(model, folder, capsys, monkeypatch):
    write_texts("in.txt", ["мир " * 50] * 20 + ["a cat"] * 4)
    args = ["embed", model, "in.txt", "-o", "o.npy", "--window", 8, "--prompt", ""]
    append, windows = FileOutput.append, []

    def fail_on_the_third(self, *given):
        windows.append(given)
        if len(windows) == 3:
            raise OSError("no more")
        append(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FileOutput, "append", fail_on_the_third)
        assert run(capsys, *args)[0] == 1
    progress = json.loads(Path("o.npy.journal.json").read_text())
    assert (progress["cut"], progress["unknown"], progress["words"]) == (16, 16 * 38, 16 * 38)
    _, _, err = run(capsys, *args, "--resume")
    assert "24 texts to o.npy, 16 of them by the run before" in err
    assert "20 of 24 texts are cut to 40 tokens" in err and "99% of the tokens are [UNK]" in err
