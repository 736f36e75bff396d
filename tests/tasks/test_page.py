"""The examples of docs/tasks.md and of the commands' --help run as they stand, on tiny models."""

import re
import shlex
from pathlib import Path

import pytest
from cli_support import run, write_texts
from finetune_support import save_model
from tasks_support import labels, make_texts, save

from fastbert.cli import finetune_arguments, task_arguments

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLES = [
    line.strip()
    for module in (task_arguments, finetune_arguments)
    for name, text in vars(module).items()
    if name.endswith("_EXAMPLES") and "FINETUNE" not in name
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip().startswith(("fastbert ", "zcat", "echo"))
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    topics = labels("positive", "negative", "neutral")
    inference = labels("contradiction", "neutral", "entailment")
    return {
        "path/or/hub-id": save(home / "a", "bert", "ForSequenceClassification", num_labels=3, **topics),
        "path/to/nli-model": save(home / "b", "bert", "ForSequenceClassification", num_labels=3, **inference),
        "path/to/cross-encoder": save(home / "c", "bert", "ForSequenceClassification", num_labels=1),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the examples name."""
    monkeypatch.chdir(tmp_path)
    texts = [text for text in make_texts(30)[9:]]
    for name in ("mail.txt", "texts.txt", "queries.txt", "documents.txt", "article.txt", "a.txt", "b.txt"):
        write_texts(name, texts)
    Path("messages.jsonl").write_text('{"text": "the fox"}\n')
    Path("reviews.csv").write_text("review\nthe fox\n")
    Path("pairs.jsonl").write_text('{"anchor": "the fox", "positive": "a dog"}\n')
    Path("pairs.csv").write_text("anchor,positive\nthe fox,a dog\n")
    Path("test.csv").write_text(
        "text,first,second,label\nthe fox,the fox,a dog,positive\na dog,a dog,the fox,negative\n"
    )
    return tmp_path


def test_the_python_of_the_page(models, folder):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block.replace("path/or/hub-id", models["path/or/hub-id"]), names)
    assert names["hits"][0][0].keys() == {"corpus_id", "score"} and names["answer"].keys() == {"label", "score"}


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_of_the_commands(models, folder, capsys, line):
    if line.startswith(("zcat", "echo")):
        line = line.partition("| ")[2].partition(" |")[0].replace(" - ", " mail.txt ")
    where = {**models, "path/to/model": models["path/or/hub-id"]}
    words = shlex.split(line)
    assert words[0] == "fastbert"
    args = [where.get(word, word) for word in words[1:]]
    if "evaluate" in args:
        args[1] = where["path/to/model"]
    if "texts.npy" in args and args[0] == "search":
        assert run(capsys, "embed", where["path/to/model"], "texts.txt", "-o", "texts.npy", "-q")[0] == 0
    if "--prompt-name" in args:  # the tiny model names none
        args = [word for word in args if word not in ("--prompt-name", "query")]
    code, out, err = run(capsys, *args)
    assert code == 0, err
    assert out or "-o" in args


def test_finetune_from_python(tmp_path, monkeypatch):
    """The example of docs/recipes.md."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(block.replace("path/or/hub-id", str(save_model(tmp_path / "model"))), {})
    assert (tmp_path / "out" / "config.json").exists()
