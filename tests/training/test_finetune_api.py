"""fastbert.finetune: data of every kind, shares, folds, a grid, and what its result answers."""

import json

import numpy as np
import pytest
import torch
from finetune_support import NAMES, PLACES, VERBS, save_model

import fastbert
from fastbert.cli.main import main

QUICK = {"epochs": 1, "batch_size": 8, "lr": 5e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("start"))


def examples(count=40):
    """Texts on a person or a place, which one word tells."""
    kinds = (NAMES, PLACES)
    return [(f"{kinds[i % 2][i % 8]} {VERBS[i % 6]} the", ("person", "place")[i % 2]) for i in range(count)]


def as_dicts(data):
    return [{"text": text, "label": label} for text, label in data]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


KINDS = {
    "dicts": lambda rows: rows,
    "tuples": lambda rows: [tuple(row.values()) for row in rows],
    "pandas": lambda rows: pytest.importorskip("pandas").DataFrame(rows),
    "datasets": lambda rows: pytest.importorskip("datasets").Dataset.from_list(rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_data_in_memory_trains_as_files_do(start, tmp_path, kind):
    data = as_dicts(examples())
    train, dev = KINDS[kind](data[:32]), KINDS[kind](data[32:])
    files = (write(tmp_path / "t.jsonl", data[:32]), str(write(tmp_path / "d.jsonl", data[32:])))
    results = [fastbert.finetune(start, *given, task="classification", **QUICK) for given in ((train, dev), files)]
    assert results[0].scores == results[1].scores
    weights = results[1].model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in results[0].model.state_dict().items())


def test_the_result_is_that_of_the_command(start, tmp_path):
    data = as_dicts(examples())
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", data[:32]), ("dev", data[32:]))}
    found = fastbert.finetune(
        start, files["train"], files["dev"], task="classification", output=tmp_path / "a", **QUICK
    )
    args = ["--epochs", "1", "--batch-size", "8", "--lr", "5e-3", "--device", "cpu", "-o", str(tmp_path / "b")]
    paths = ["--train", str(files["train"]), "--dev", str(files["dev"])]
    assert main(["finetune", "--task", "classification", "--model", str(start), *paths, *args]) == 0
    reports = [json.loads((tmp_path / name / "report/metrics.json").read_text()) for name in "ab"]
    assert reports[0]["dev"] == reports[1]["dev"] == found.scores
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_it_learns_and_predicts(start):
    data = examples(64)
    found = fastbert.finetune(start, data, dev_share=0.25, task="classification", **{**QUICK, "epochs": 15})
    assert found.scores["accuracy"] >= 0.9 and len(found.predictions) == 16
    assert [a["label"] for a in found.predict(["anna saw the", "rome left the"])] == ["person", "place"]
    assert not found.model.training and found.spread == {} and found.tried == []


def test_pairs_words_and_numbers(start):
    pairs = [(f"{a} saw", f"{b} left", str(int(a == b))) for a in NAMES[:5] for b in NAMES[:5]]
    found = fastbert.finetune(start, pairs, dev_share=0.3, task="classification", **QUICK)
    assert found.predict({"text": "anna saw", "text_pair": "anna left"})["label"] in "01"
    tagged = [{"words": [name, "saw", place], "tags": ["B-PER", "O", "B-LOC"]} for name in NAMES for place in PLACES]
    found = fastbert.finetune(start, tagged, dev_share=0.2, task="token-classification", **{**QUICK, "epochs": 4})
    entities = found.predict("hugo saw oslo", aggregation_strategy="first")
    assert [(each["entity_group"], each["word"]) for each in entities] == [("PER", "hugo"), ("LOC", "oslo")]
    numbers = [(f"{name} saw", float(i)) for i, name in enumerate(NAMES)] * 3
    assert "spearman" in fastbert.finetune(start, numbers, dev_share=0.3, task="regression", **QUICK).scores


def test_folds(start):
    """Each example is tested once; mean and spread are of the folds."""
    found = fastbert.finetune(start, examples(30), folds=3, task="classification", **QUICK)
    assert found.scores.keys() == found.spread.keys() and found.spread["loss"] > 0
    assert len(found.predictions) == 10 and found.metrics["data"]["train"]["examples"] == 18
    assert found.metrics["data"]["dev"]["examples"] == 2


def test_a_grid(start, tmp_path):
    data = examples(40)
    grid = {"lr": [0.0, 1e-2], "seed": [1, 2]}
    quick = {**QUICK, "epochs": 6}
    del quick["lr"]
    found = fastbert.finetune(
        start, data, dev_share=0.3, tries=grid, task="classification", output=tmp_path / "out", **quick
    )
    assert [(row["lr"], row["seed"]) for row in found.tried] == [(0.0, 1), (0.0, 2), (1e-2, 1), (1e-2, 2)]
    best = max(found.tried, key=lambda row: row["f1_macro"])
    assert found.scores["f1_macro"] == best["f1_macro"] and best["lr"] == 1e-2
    loaded = fastbert.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in found.model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": 3}, "train is a int; it must be a file, a list, a DataFrame or a Dataset"),
        ({"train": "none.csv"}, "none.csv: no such file"),
        ({"train": ["a"]}, r"train\[0\] is 'a'; it must be a dict, or a tuple"),
        ({"train": [("a", "x"), ("", "y")]}, r"train\[1\]: text is ''; it must be a text, not empty"),
        ({"train": []}, "train holds no example"),
        ({"speed": 3}, "finetune takes no speed; it takes "),
        ({"tries": {"speed": [3]}}, "finetune takes no speed; it takes "),
        ({"task": "translation"}, "task is 'translation'; it must be one of"),
        ({"dev_share": 2}, "dev_share is 2; it must be above 0 and below 1"),
        ({"dev_share": 0.1, "dev": examples(4)}, "dev_share is 0.1, but dev is given"),
        ({"folds": 1}, "folds is 1; it must be 2 to 40"),
        ({"folds": 2, "dev": examples(4)}, "folds is given; neither dev nor tries goes with it"),
    ],
)
def test_bad_input(start, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastbert.finetune(**{"model": start, "train": examples(), "task": "classification", **QUICK, **given})


def test_evaluate_is_the_report(start, tmp_path, capsys):
    """The command's scores are those that finetune reported on the same file."""
    data = as_dicts(examples(60))
    test = write(tmp_path / "test.jsonl", data[40:])
    found = fastbert.finetune(
        start, data[:32], data[32:40], test=test, task="classification", output=tmp_path / "out", **QUICK
    )
    assert main(["evaluate", str(tmp_path / "out"), "--test", str(test), "-o", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report/metrics.json").read_text())
    assert report["test"].keys() == found.scores.keys()
    np.testing.assert_allclose(list(report["test"].values()), list(found.scores.values()), rtol=1e-6)
    assert report["classes"]["test"] == found.metrics["classes"]["test"]
    assert f"accuracy         {found.scores['accuracy']:.4f}" in out
    assert (tmp_path / "report/confusion-matrix-test.png").exists()
    assert len((tmp_path / "report/predictions-test.jsonl").read_text().splitlines()) == 20
    assert main(["evaluate", str(start), "--test", str(test)]) == 1
    assert "the model has no head of a task (BertModel)" in capsys.readouterr().err
    write(test, [{"text": "a", "label": "city"}])
    assert main(["evaluate", str(tmp_path / "out"), "--test", str(test)]) == 1
    assert "label 'city' is none of the" in capsys.readouterr().err
