"""The tutorials run as they are written: on a tiny model and made data here, on the real ones where it is slow."""

import csv
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from finetune_support import NAMES, PLACES, VERBS

import fastbert
from fastbert.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.M | re.S)
HUB = "sentence-transformers/all-MiniLM-L6-v2"
MAKES_DATA = "python benchmarks/finetune_data.py"

_spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs/mkdocs/notebooks.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)


@pytest.fixture(scope="module")
def tiny(minilm, tmp_path_factory):
    """A folder as MiniLM's, of four small layers."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = fastbert.BertConfig.from_pretrained(minilm, **sizes)
    fastbert.BertModel(config).save_pretrained(folder)
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling | {"word_embedding_dimension": 32}))
    return folder


def sentence(i):
    return f"{(NAMES, PLACES)[i % 2][i % 8]} {VERBS[i % 6]} the {NAMES[i % 7]} ."


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_data(name, folder):
    """Small files of the names and columns that finetune_data makes."""
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("dev", 20), ("test", 20)):
        texts = [sentence(i) for i in range(count)]
        if name == "rotten-tomatoes":
            write_rows(folder / f"{split}.csv", [{"text": t, "label": i % 2} for i, t in enumerate(texts)])
        elif name == "entailment":
            labels = ("entailment", "contradiction")
            rows = [{"text": t, "hypothesis": sentence(i + 1), "label": labels[i % 2]} for i, t in enumerate(texts)]
            write_rows(folder / f"{split}.csv", rows)
        elif name == "conll2003":
            tagged = [[f"{w} B-PER" if w in NAMES else f"{w} O" for w in text.split()] for text in texts]
            (folder / f"{split}.conll").write_text("\n\n".join("\n".join(lines) for lines in tagged) + "\n")
        elif name == "titles":
            write_rows(folder / f"{split}.csv", [{"text": t, "title": t.split()[0]} for t in texts])
        elif name == "squad":
            paragraphs = [
                {
                    "context": text * (20 if split == "test" else 1),  # the document is longer than a window
                    "qas": [{"id": f"{i}", "question": "who ?", "answers": [{"text": text[:3], "answer_start": 0}]}],
                }
                for i, text in enumerate(texts * 2)
            ]
            (folder / f"{split}.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    if name == "wiki-leads":
        (folder / "leads.txt").write_text("".join(sentence(i) + "\n" for i in range(50)))


def run_page(path, model, *, real):
    """Runs the blocks of a page in this folder; returns the names that its Python leaves."""
    names = {}
    for kind, code in BLOCK.findall(path.read_text(encoding="utf-8")):
        code = code.replace(HUB, str(model))
        if kind == "python":
            exec(compile(code, path.name, "exec"), names)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if line.startswith(MAKES_DATA):
                name, folder = words[2:]
                if real:
                    subprocess.run([sys.executable, ROOT / words[1], name, folder], check=True)
                else:
                    make_data(name, Path(folder) / name)
            elif words[0] == "fastbert":
                assert main(words[1:]) == 0, line
            else:
                subprocess.run(["bash", "-euc", line], check=True)
    return names


def expect(page, names):
    """What a page says of real models and data."""
    if page == "sentiment":
        assert json.loads(Path("out/tested/metrics.json").read_text())["test"]["accuracy"] > 0.78
        assert names["result"].scores["accuracy"] > 0.65
        rows = list(csv.DictReader(Path("predicted.csv").read_text(encoding="utf-8").splitlines()))
        assert len(rows) == 1000 and {"text", "label", "prediction", "prediction_score"} <= rows[0].keys()
    elif page == "entities":
        found = {(e["entity_group"], names["text"][e["start"] : e["end"]]) for e in names["tag"](names["text"])}
        assert {("PER", "Ada Lovelace"), ("PER", "Charles Babbage"), ("LOC", "London")} <= found
    elif page == "answers":
        assert names["found"]["windows"] > 20 and names["page"] == 21
    elif page == "search":
        assert len(names["texts"]) > 10_000
        hits = fastbert.search(names["embedder"].embed(names["queries"]), "leads.npy", top_k=3)
        assert "bird" in " ".join(names["texts"][hit["corpus_id"]].lower() for hit in hits[0])
    elif page == "zero-shot":
        answers = names["label"](names["texts"], candidate_labels=["sport", "business", "film"])
        assert [answer["labels"][0] for answer in answers] == ["sport", "business"]
    elif page == "explain":
        assert names["found"].completeness_error < 0.01
    elif page == "titles":
        overlaps = [
            len(set(title.lower().split()) & set(row["text"].lower().split())) / max(len(title.split()), 1)
            for row, title in zip(names["tests"], names["titles"], strict=True)
        ]
        assert sum(overlaps) / len(overlaps) > 0.4  # most words of a title are of its text
    elif page == "smaller":
        answers = names["answers"]
        same = [a["label"] == b["label"] for a, b in zip(*list(answers.values())[1:], strict=True)]
        assert sum(same) > 0.97 * len(same)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path.stem == "answers":
        pytest.importorskip("pypdf")
    assert run_page(path, tiny, real=False)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_tutorial_says_what_is_so(path, minilm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect(path.stem, run_page(path, minilm, real=True))


@pytest.mark.parametrize("name", notebooks.TUTORIALS)
def test_a_notebook_is_its_tutorial(name):
    made = (ROOT / "docs/notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert made == notebooks.notebook(name), "run python docs/mkdocs/notebooks.py"


@pytest.mark.parametrize(
    "name", [name if name == "search" else pytest.param(name, marks=pytest.mark.slow) for name in notebooks.TUTORIALS]
)
def test_a_notebook_runs(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{Path('/usr/bin')}:{Path('/bin')}")
    book = nbformat.read(ROOT / "docs/notebooks" / f"{name}.ipynb", as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace(HUB, str(tiny))
        if MAKES_DATA in cell.source:
            data, folder = cell.source.split()[-2:]
            make_data(data, tmp_path / folder / data)
            cell.source = ""
    file = tmp_path / "book.ipynb"
    nbformat.write(book, file)
    # In a process of its own: it has an event loop, and handlers of signals.
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", "--timeout=120", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    book = nbformat.read(file, as_version=4)
    ran = [cell for cell in book.cells if cell.cell_type == "code" and cell.source]
    assert ran and all(cell.execution_count for cell in ran)


def test_the_pages_are_the_tutorials_of_the_site():
    site = (ROOT / "docs/mkdocs/mkdocs.yml").read_text(encoding="utf-8")
    assert {f"tutorials/{path.name}" for path in PAGES} == set(re.findall(r"(tutorials/\S+\.md)$", site, re.M))
    assert len(PAGES) == 8 and len(notebooks.TUTORIALS) == 3
