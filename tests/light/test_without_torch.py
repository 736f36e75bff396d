"""What runs where torch is not installed, and what says that it needs it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from support import require_native
from tasks_support import labels, make_texts, save
from tiny_bert import save_tiny

import fastbert
from fastbert.light import choice

# For an import system, None is a module that is not there.
BLOCKED = "import sys; sys.modules['torch'] = None; from fastbert.cli.main import main; sys.exit(main(sys.argv[1:]))"
TEXTS = [text for text in make_texts(30) if "\n" not in text and text]


@pytest.fixture(autouse=True)
def _native():
    require_native()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models for each command, and a file of texts."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_tiny(folder / "vectors")
    save(folder / "classes", "bert", "ForSequenceClassification", **labels("bad", "good"))
    save(folder / "tags", "bert", "ForTokenClassification", **labels("O", "B-PER", "I-PER"))
    save(folder / "answers", "bert", "ForQuestionAnswering")
    save(folder / "ranks", "bert", "ForSequenceClassification", num_labels=1)
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return folder


def fastbert_command(*arguments, code=0, stdin=""):
    """Runs a command without torch; its output, or its error's last line where it fails."""
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, input=stdin)
    assert done.returncode == code, done.stderr
    return done.stderr.splitlines()[-1] if code else done.stdout


def test_embed(folder, tmp_path):
    for options, quantize in (((), None), (("--quantize", "int8"), "int8")):
        out = tmp_path / "vectors.npy"
        fastbert_command("embed", folder / "vectors", folder / "texts.txt", "-o", out, *options)
        expected = fastbert.Embedder.from_pretrained(folder / "vectors", quantize=quantize).embed(TEXTS)
        assert np.array_equal(np.load(out), expected)


@pytest.mark.parametrize("name", ["classes", "tags"])
def test_predict(folder, name):
    rows = fastbert_command("predict", folder / name, folder / "texts.txt").splitlines()
    task = {"classes": "text-classification", "tags": "token-classification"}[name]
    options = {} if name == "classes" else {"aggregation_strategy": "first"}
    expected = fastbert.pipeline(task, folder / name, **options)(TEXTS)
    for row, answer in zip(map(json.loads, rows), expected, strict=True):
        if name == "classes":
            assert (row["prediction"], row["prediction_score"]) == (answer["label"], answer["score"])
        else:
            assert [(e["word"], e["start"], e["end"]) for e in row["prediction"]] == [
                (e["word"], e["start"], e["end"]) for e in answer
            ]


def test_predict_answers(folder, tmp_path):
    rows = [{"question": "who jumps?", "context": text} for text in TEXTS[5:9]]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = fastbert_command("predict", folder / "answers", tmp_path / "q.jsonl").splitlines()
    expected = fastbert.pipeline("question-answering", folder / "answers")(
        question=[row["question"] for row in rows], context=[row["context"] for row in rows]
    )
    for row, answer in zip(map(json.loads, found), expected, strict=True):
        assert (row["prediction"], row["prediction_score"]) == (answer["answer"], answer["score"])


def test_search_and_rerank(folder, tmp_path):
    embedder = fastbert.Embedder.from_pretrained(folder / "vectors")
    np.save(tmp_path / "corpus.npy", embedder.embed(TEXTS))
    found = json.loads(fastbert_command("search", folder / "vectors", "a cat", "--corpus", tmp_path / "corpus.npy"))
    expected = fastbert.search(embedder.embed(["a cat"]), str(tmp_path / "corpus.npy"), top_k=10)[0]
    assert [hit["corpus_id"] for hit in found["hits"]] == [hit["corpus_id"] for hit in expected]
    rows = fastbert_command("rerank", folder / "ranks", "a fox", folder / "texts.txt", "--top-k", "3").splitlines()
    assert [json.loads(row)["corpus_id"] for row in rows] == [
        row["corpus_id"] for row in fastbert.rerank("a fox", TEXTS, model=folder / "ranks", top_k=3)
    ]


def test_doctor(folder):
    report = fastbert_command("doctor")
    assert "not installed: fastbert.light and the commands that run by it work without" in report
    assert "instruction set" in report and "one core's products" in report


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("embed", "vectors", "texts.txt", "--precision", "high"), "precision high needs torch"),
        (("embed", "vectors", "texts.txt", "--dtype", "float16"), "dtype float16 needs torch"),
        (("embed", "vectors", "texts.txt", "--device", "cuda"), "device cuda needs torch"),
        (("fill-mask", "vectors", "a [MASK]"), "fastbert fill-mask needs torch"),
        (
            ("finetune", "--task", "classification", "--model", "vectors", "--train", "x", "-o", "y"),
            "finetune needs torch",
        ),
        (("explain-text", "classes", "a"), "fastbert explain-text needs torch"),
    ],
    ids=lambda x: " ".join(x[:1]) if isinstance(x, tuple) else "",
)
def test_what_needs_torch_says_so(folder, arguments, reason):
    given = [folder / a if (folder / a).exists() else a for a in arguments]
    line = fastbert_command(*given, code=1)
    assert reason in line and "pip install 'fastbert-engine[torch]'" in line


def test_weights_in_half_precision(folder, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for file in (folder / "vectors").iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    state = safetensors.torch.load_file(half / "model.safetensors")
    safetensors.torch.save_file({k: v.half() for k, v in state.items()}, half / "model.safetensors")
    line = fastbert_command("embed", half, folder / "texts.txt", code=1)
    assert "weights stored as F16, unless dtype is float32 or bfloat16, needs torch" in line
    out = tmp_path / "v.npy"
    fastbert_command("embed", half, folder / "texts.txt", "-o", out, "--dtype", "float32")
    expected = fastbert.Embedder.from_pretrained(half, dtype=torch.float32).embed(TEXTS)
    assert np.array_equal(np.load(out), expected)


def test_names_that_need_torch():
    code = "import sys; sys.modules['torch'] = None; import fastbert; fastbert.{}"
    for name in ("Embedder", "accelerate", "pipeline"):
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True)
        assert f"fastbert.{name} needs torch, which is not installed" in done.stderr.splitlines()[-1]


def test_a_driver_of_a_gpu_without_torch_is_no_reason(folder, monkeypatch):
    monkeypatch.setattr(choice, "_GPU", folder / "texts.txt")
    assert choice.reason_for_torch(folder / "vectors") == "a GPU"
    assert choice.reason_for_torch(folder / "vectors", device="cpu") is None
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert choice.reason_for_torch(folder / "vectors") is None
