"""fastbert.finetune: data of every kind, shares, folds, a grid, and what its result answers."""

import json

import numpy as np
import pytest
import torch
from finetune_support import NAMES, PLACES, VERBS, save_model

import fastbert
from fastbert.cli.main import main
from fastbert.training.finetune import trials
from fastbert.training.finetune.examples import Reading, Table
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.splits import Labelled

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


def test_each_example_is_in_the_test_of_one_fold_and_questions_stay_with_their_context():
    settings = FinetuneSettings(task="classification")
    data = as_dicts(examples(30))
    parts = [part["test"] for part in Labelled.read(Table("train", data), settings, Reading()).folds(3, 0.1, 0)]
    assert sorted(row["text"] for part in parts for row in part.rows) == sorted(row["text"] for row in data)
    assert all(sum(row["label"] == "place" for row in part.rows) == 5 for part in parts)
    assert {place for part in parts for place in part.where} == {f"train[{i}]" for i in range(30)}
    questions = [
        {"question": f"q{i}", "context": f"context {i // 3}", "id": str(i), "answers": {"text": [], "answer_start": []}}
        for i in range(30)
    ]
    labelled = Labelled.read(Table("train", questions), FinetuneSettings(task="question-answering"), Reading())
    for split in (labelled.split(0.3, 0), *labelled.folds(3, 0.3, 0)):
        contexts = [{row["context"] for row in part.rows} for part in split.values()]
        assert not set.intersection(*contexts[:2]) and not set.intersection(contexts[0], contexts[-1])


def test_a_grid(start, tmp_path):
    data = examples(40)
    grid = {"lr": [0.0, 1e-2], "seed": [1, 2]}
    quick = {**QUICK, "epochs": 6}
    del quick["lr"]
    found = fastbert.finetune(
        start, data, dev_share=0.3, tries=grid, task="classification", output=tmp_path / "out", **quick
    )
    report = json.loads((tmp_path / "out/report/trials.json").read_text())
    assert [run["dev"]["f1_macro"] for run in report["runs"]] == [row["f1_macro"] for row in found.tried]
    assert not (tmp_path / "out/runs").exists() and (tmp_path / "out/README.md").read_text().count("# out\n") == 1
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
        ({"folds": 1}, "folds is 1; it must be at least 2"),
        ({"folds": 41}, "folds is 41; train holds 40 examples, and it takes 41"),
        ({"folds": 2, "dev": examples(4)}, "folds is 2, but dev is given"),
        ({"folds": 2, "test": examples(4)}, "folds is 2, but test is given"),
        ({"folds": 2, "tries": {"seed": [1]}}, "folds is 2, but tries is given"),
        ({"train": examples(1)}, "all labels are 'person'; classification needs two or more"),
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


def command(start, train, out, *more):
    quick = ["--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    files = ["--train", str(train), "-o", str(out)]
    return main(["finetune", "--task", "classification", "--model", str(start), *files, *quick, *more])


def test_the_command_takes_one_file(start, tmp_path):
    """Without --dev, a share of the file chooses the checkpoint; lines are those of the file."""
    data = as_dicts(examples(40))
    train = write(tmp_path / "all.jsonl", data)
    assert command(start, train, tmp_path / "out", "--dev-share", "0.25", "--lr", "5e-3") == 0
    rows = [json.loads(line) for line in (tmp_path / "out/report/predictions-dev.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all(data[row["line"] - 1]["text"] == row["text"] for row in rows)
    found = fastbert.finetune(start, train, dev_share=0.25, task="classification", **QUICK)
    assert found.metrics["dev"] == json.loads((tmp_path / "out/report/metrics.json").read_text())["dev"]


def test_the_command_tries_settings_and_goes_on(start, tmp_path, capsys, monkeypatch):
    """A run that ended is not made again; the table has each, and the best is kept."""
    train = write(tmp_path / "all.jsonl", as_dicts(examples(40)))
    tries = ["--try", "lr=0,1e-2", "seed=1,2", "--dev-share", "0.3"]
    made = []
    done = trials.save_and_report

    def third_fails(run, start):
        if len(made) == 2:
            raise OSError("no space left")
        made.append(run.folder.name)
        return done(run, start)

    monkeypatch.setattr(trials, "save_and_report", third_fails)
    assert command(start, train, tmp_path / "out", *tries) == 1
    assert command(start, train, tmp_path / "out", *tries) == 1
    assert "runs holds runs that did not end; --resume continues them" in capsys.readouterr().err
    monkeypatch.setattr(trials, "save_and_report", lambda run, start: made.append(run.folder.name) or done(run, start))
    assert command(start, train, tmp_path / "out", "--try", "lr=0,1e-3", "seed=1,2", "--resume") == 1
    assert "a run of another model, settings or data" in capsys.readouterr().err
    assert command(start, train, tmp_path / "out", *tries, "--resume") == 0
    assert made == ["run-1", "run-2", "run-3", "run-4"]
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["dev", "scores"] and lines[1][:3] == ["lr", "seed", "loss"]
    assert [line[1:3] for line in lines[2:]] == [["0.0", "1"], ["0.0", "2"], ["0.01", "1"], ["0.01", "2"]]
    best = json.loads((tmp_path / "out/report/trials.json").read_text())["best"]
    assert [line[0] for line in lines[2:] if line[0].endswith("*")] == [best + "*"]
    assert "run 3 of 4: lr 0.01, seed 1" in err and f"the model of {best} is in" in err


def test_the_command_has_folds(start, tmp_path, capsys):
    train = write(tmp_path / "all.jsonl", as_dicts(examples(30)))
    assert command(start, train, tmp_path / "out", "--folds", "3") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0].rstrip("*") for line in lines[2:]] == ["fold-1", "fold-2", "fold-3", "mean", "spread"]
    losses = [float(line[1]) for line in lines[2:5]]
    assert float(lines[5][1]) == pytest.approx(np.mean(losses), abs=1e-4)
    assert float(lines[6][1]) == pytest.approx(np.std(losses, ddof=1), abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--try", "speed=3"], "'speed=3' is not a setting with a value"),
        (["--try", "lr"], "'lr' is not a setting with a value"),
        (["--try", "lr=fast"], "invalid float value: 'fast'"),
        (["--try", "batch-size=0,8"], "'0' is not a whole number of at least 1"),
        (["--dev", "x", "--dev-share", "0.1"], "not allowed with argument --dev"),
    ],
)
def test_the_command_refuses(start, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        command(start, tmp_path / "all.jsonl", tmp_path / "out", *more)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_label_of_one_example_is_no_error(start):
    """In no part but one, it is a label of all."""
    data = [*examples(40), ("hugo saw rome", "both")]
    found = fastbert.finetune(start, data, dev_share=0.2, task="classification", **QUICK)
    assert found.metrics["labels"] == ["both", "person", "place"]
    found = fastbert.finetune(start, data, folds=3, task="classification", **QUICK)
    assert found.spread.keys() <= found.metrics["test"].keys() and "f1_macro" in found.spread
    tagged = [{"words": [name, "saw"], "tags": ["B-PER", "O"]} for name in NAMES]
    tagged.append({"words": ["rome"], "tags": ["B-LOC"]})
    assert fastbert.finetune(start, tagged, folds=3, task="token-classification", **QUICK).spread


@pytest.mark.parametrize("kind", [list, tuple])
def test_rows_of_three_are_pairs(start, kind):
    pairs = kind([f"{a} saw", f"{b} left", str(int(a == b))] for a in NAMES[:5] for b in NAMES[:5])
    found = fastbert.finetune(start, pairs, dev_share=0.3, task="classification", **QUICK)
    assert all(row["pair"] for row in found.predictions)


def test_classes_of_datasets_have_their_names(start):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [text for text, _ in examples(40)], "label": [i % 2 for i in range(40)]}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["p", "q"])})
    data = datasets.Dataset.from_dict(rows, features=features)
    assert fastbert.finetune(start, data, dev_share=0.2, task="classification", **QUICK).metrics["labels"] == ["p", "q"]


def test_an_output_with_a_model_is_kept(start, tmp_path):
    data = examples(40)
    out = {"task": "classification", "output": tmp_path / "out", **QUICK}
    fastbert.finetune(start, data, folds=2, **out)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    for more in ({"folds": 2}, {"tries": {"seed": [1, 2]}}, {}):
        with pytest.raises(ValueError, match="out holds a model already; a new run takes another output"):
            fastbert.finetune(start, data, **more, **out)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_a_stopped_run_continues(start, tmp_path, monkeypatch):
    data, out = examples(40), {"task": "classification", "output": tmp_path / "out", **QUICK}
    done = trials.save_and_report
    monkeypatch.setattr(trials, "save_and_report", lambda run, start: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        fastbert.finetune(start, data, folds=2, **out)
    monkeypatch.setattr(trials, "save_and_report", done)
    found = fastbert.finetune(start, data, folds=2, resume=True, **out)
    assert found.scores == fastbert.finetune(start, data, folds=2, **{**out, "output": None}).scores
    assert len(found.predictions) == 20 and not list((tmp_path / "out").glob("*runs*"))
