"""`fastbert finetune`: the model that comes out, its report, and what it says of bad input."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
import yaml
from finetune_support import READING, save_model, sentence, write, write_csv, write_jsonl

import fastbert
from fastbert.cli.finetune_arguments import DISTILLED_TASKS, FINETUNE_TASKS
from fastbert.cli.main import main
from fastbert.training.finetune.tasks import TASKS

OPTIONS = ["--epochs", "4", "--tokens", "128", "--lr", "2e-3"]
OWN = {"question-answering": ["--stride", "4", "--max-question", "8"]}
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def finetune(model, task, data, out, *more, test=None):
    files = ["--train", str(data), "--dev", str(data), *(["--test", str(test)] if test else [])]
    own = ["--pair-column", READING[task].pair] if task in READING else OWN.get(task, [])
    return main(["finetune", "--task", task, "--model", str(model), *files, "-o", str(out), *OPTIONS, *own, *more])


def test_the_command_offers_every_task():
    assert set(FINETUNE_TASKS) == set(TASKS)


def test_the_help_names_the_score_of_each_task_that_chooses_the_best(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    told = text.split("of scored pairs, spearman (default: ")[1].split(")")[0]
    named = {}
    for part in told.split(", "):
        score, tasks = part.split(" for ")
        named |= dict.fromkeys(tasks.split(" and "), score)
    assert named == {name: task.scores[0] for name, task in TASKS.items()}


@pytest.mark.parametrize("task", DISTILLED_TASKS)
def test_transformers_loads_the_model_and_predicts_the_same(tmp_path, model, task, capsys):
    data, out = write(tmp_path, task), tmp_path / "out"
    test = write(tmp_path, task, "test", n=17)
    assert finetune(model, task, data, out, test=test) == 0
    report = out / "report"
    metrics = json.loads((report / "metrics.json").read_text())
    assert (
        set(metrics["dev"])
        == set(metrics["test"])
        == {"loss", *TASKS[task].scores}
        | ({"has_answer_f1", "no_answer_f1"} if task == "question-answering" else set())
    )
    assert metrics["data"]["test"]["examples"] == 17 and metrics["settings"]["epochs"] == 4
    lines = {name: (report / f"predictions-{name}.jsonl").read_text().splitlines() for name in ("dev", "test")}
    assert (len(lines["dev"]), len(lines["test"])) == (20, 17)
    assert {path.name for path in report.iterdir()} == {
        "metrics.json",
        "learning-curves.png",
        "predictions-dev.jsonl",
        "predictions-test.jsonl",
        *(["confusion-matrix-test.png"] if task == "classification" else []),
    }
    for picture in report.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (out / "checkpoints").exists()
    assert "the model of step" in capsys.readouterr().err

    theirs = getattr(transformers, AUTO[task]).from_pretrained(out)
    mine = TASKS[task].model.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.config.problem_type == TASKS[task].problem_type
    inputs = tokenizer(["anna saw rome", "bob left oslo today"], padding=True, return_tensors="pt")
    if task == "multiple-choice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        a, b = mine(**inputs), theirs.eval()(**inputs)
    first = "start_logits" if task == "question-answering" else "logits"
    real = inputs["attention_mask"].bool() if first == "start_logits" or task == "token-classification" else ...
    torch.testing.assert_close(a[first][real], b[first][real], rtol=1e-4, atol=1e-5)
    if task == "classification":
        assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"} and theirs.config.label2id == {"a": 0, "b": 1, "c": 2}
        predicted = [json.loads(line)["predicted"] for line in lines["dev"]]
        texts = [" ".join(sentence(i)) for i in range(20)]
        classify = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer, device="cpu")
        assert [entry["label"] for entry in classify(texts)] == predicted
        right = np.mean([json.loads(line)["gold"] == p for line, p in zip(lines["dev"], predicted, strict=True)])
        assert metrics["dev"]["accuracy"] == pytest.approx(right)
    if task == "token-classification":
        assert theirs.config.id2label == {0: "O", 1: "B-LOC", 2: "B-PER", 3: "I-PER"}
    if task == "regression":
        assert theirs.config.num_labels == 1


def test_a_run_is_neither_overwritten_nor_silently_gone_on_with(tmp_path, model, capsys):
    data, out = write(tmp_path, "classification"), tmp_path / "out"
    assert finetune(model, "classification", data, out) == 0
    before = (out / "model.safetensors").read_bytes()
    assert finetune(model, "classification", data, out, "--resume") == 1
    assert "holds a model already" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before


def test_a_model_that_is_there_is_not_overwritten(tmp_path, capsys):
    model = save_model(tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for more in ((), ("--resume",)):
        message = error_of(capsys, model, "classification", write(tmp_path, "classification"), model, *more)
        assert message == f"{model} holds a model already; a new run takes another --output"
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_run_cut_short_before_its_model_is_written_goes_on(tmp_path, model, capsys, monkeypatch):
    from fastbert.training.finetune import result

    data, out = write(tmp_path, "classification"), tmp_path / "out"

    def fail(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(result, "draw_curves", fail)
        assert finetune(model, "classification", data, out) == 1
    assert finetune(model, "classification", data, out) == 1
    assert "is there already: --resume continues it" in capsys.readouterr().err
    assert finetune(model, "classification", data, out, "--resume") == 0
    assert "step-00000008: 8 of 8 steps done, only the report is missing" in capsys.readouterr().err
    other = tmp_path / "other"
    assert finetune(model, "classification", data, other) == 0
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_what_a_new_user_has_to_know_is_told_and_reported(tmp_path, model, capsys):
    """Two classes of Cyrillic text: [UNK] throughout; and long English ones, which are cut."""
    config = json.loads((model / "config.json").read_text())
    origin = tmp_path / "origin"
    shutil.copytree(model, origin)
    (origin / "config.json").write_text(json.dumps(config | {"_name_or_path": "somewhere/else"}))
    data = write_csv(tmp_path / "data.csv", [("привет мир " * (1 + i % 2), "ab"[i % 2]) for i in range(20)])
    long = write_csv(tmp_path / "long.csv", [("anna saw rome " * 9, "ab"[i % 2]) for i in range(4)])
    out = tmp_path / "out"
    assert finetune(origin, "classification", data, out, "--max-length", "9", "--tensorboard", test=long) == 0
    err = capsys.readouterr().err
    assert f"warning: {data}: 100% of the tokens are [UNK]" in err and f"warning: {long}: 1" not in err
    assert f"{long}: 4 of 4 examples are cut to 9 tokens" in err
    assert "warning: 8 optimizer steps in all; below 50" in err
    assert list((out / "tensorboard").iterdir())
    assert "_name_or_path" not in json.loads((out / "config.json").read_text())
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert {"f1_binary", "auc"} <= set(metrics["dev"])
    assert metrics["classes"]["test"]["a"]["number"] == 2
    row = json.loads((out / "report" / "predictions-dev.jsonl").read_text().splitlines()[1])
    assert (row["line"], row["text"]) == (3, "привет мир привет мир ")
    assert set(row["probabilities"]) == {"a", "b"} and sum(row["probabilities"].values()) == pytest.approx(1)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-classification" and front["library_name"] == "transformers"
    assert f"| auc | {metrics['dev']['auc']:.4f} | {metrics['test']['auc']:.4f} |" in card
    assert "| test | long.csv | 4 | 4 |" in card and str(tmp_path) not in card


def error_of(capsys, *arguments, **options):
    capsys.readouterr()
    assert finetune(*arguments, **options) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line.removeprefix("fastbert: error: ")


def test_errors_are_one_line_with_file_and_line(tmp_path, model, capsys):
    good = write(tmp_path, "classification")
    out = tmp_path / "out"
    bad = write_csv(tmp_path / "dev.csv", [("anna", "a"), ("bob", "d")])
    message = error_of(capsys, model, "classification", good, out, "--dev", str(bad))
    assert message == f"{bad}:3: label 'd' is none of the training data's 3: 'a', 'b', 'c'"
    assert error_of(capsys, model, "classification", good, out, test=bad) == message
    empty = tmp_path / "empty.csv"
    for text in ("", "text,label\n"):
        empty.write_text(text)
        assert error_of(capsys, model, "classification", empty, out) == f"{empty}:1: the file holds no example"
    message = error_of(capsys, model, "classification", good, out, "--label-column", "stars")
    assert message.startswith(f"{good}:1: no column 'stars'; there are ") and "'text', 'label'" in message
    assert error_of(capsys, model, "classification", tmp_path / "none.csv", out) == f"{tmp_path}/none.csv: no such file"
    message = error_of(capsys, model, "classification", good, out, "--freeze-layers", "9")
    assert message == "freeze_layers is 9; the model has 2 layers"
    message = error_of(capsys, model, "classification", good, out, "--max-length", "65")
    assert message == "max_length is 65; the model takes 64 tokens"
    words = write_jsonl(tmp_path / "words.jsonl", [{"words": ["anna", "saw"], "tags": ["B-PER"]}])
    message = error_of(capsys, model, "token-classification", words, out)
    assert message == f"{words}:1: 2 words and 1 tags; each word has one"
    message = error_of(capsys, model, "classification", good, out, "--best", "f1")
    assert message.startswith("best is 'f1'; classification has the scores f1_macro, accuracy")
    assert not out.exists()


@pytest.mark.parametrize(
    "task, option",
    [
        ("classification", ["--stride", "4"]),
        ("classification", ["--label-separator", ";"]),
        ("regression", ["--no-unanswerable"]),
        ("token-classification", ["--pair-column", "text"]),
        ("question-answering", ["--label-column", "label"]),
        ("multiple-choice", ["--pair-column", "text"]),
    ],
)
def test_options_of_other_tasks_are_refused(tmp_path, model, capsys, task, option):
    message = error_of(capsys, model, task, write(tmp_path, task), tmp_path / "out", *option)
    assert message == f"{option[0].replace('no-', '')} is given; --task {task} has no use for it"
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = error_of(capsys, model, "classification", write(tmp_path, "classification"), tmp_path / "out")
    assert message.startswith("WORLD_SIZE is 2; a run of embedding or sparse-embedding takes several processes, others")
    assert not (tmp_path / "out").exists()


def test_a_label_set_may_have_many_classes_of_long_names(tmp_path):
    """The picture has to hold them; a class that the dev data lack is a row of zeros."""
    from fastbert.training.finetune.report import draw_confusion

    labels = [f"class number {i} of a long name" for i in range(30)]
    draw_confusion(tmp_path / "many.png", labels[:9] * 3, labels[1:10] * 3, labels)
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_answers_questions_with_the_model(tmp_path, model):
    """Trained on 20 questions by heart, with windows; transformers' own decoding finds the same answers."""
    data, out = write(tmp_path, "question-answering"), tmp_path / "out"
    assert finetune(model, "question-answering", data, out, "--epochs", "40", "--max-length", "32") == 0
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert metrics["dev"]["exact_match"] == 1 and metrics["settings"]["no_answer"] is True
    rows = [json.loads(line) for line in (out / "report" / "predictions-dev.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [row["answers"][0] if row["answers"] else "" for row in rows]
    assert fastbert.BertConfig.from_pretrained(out).num_labels == 2


def test_questions_without_an_answer_may_be_ruled_out(tmp_path, model):
    data, out = write(tmp_path, "question-answering"), tmp_path / "out"
    assert finetune(model, "question-answering", data, out, "--epochs", "1", "--no-unanswerable") == 0
    rows = [json.loads(line) for line in (out / "report" / "predictions-dev.jsonl").read_text().splitlines()]
    assert all(row["answer"] for row in rows)


def test_without_tensorboard_the_message_names_the_switch_before_a_file_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = error_of(
        capsys, tmp_path / "none", "classification", tmp_path / "none", tmp_path / "out", "--tensorboard"
    )
    assert "--tensorboard is given and tensorboard is not installed: pip install" in message
    assert "or leave it out" in message


@pytest.mark.parametrize("score", ["f1_binary", "auc"])
def test_the_best_may_be_known_by_a_score_of_two_classes(tmp_path, model, capsys, score):
    rows = [(" ".join(sentence(i)), ["no", "yes"][i % 2]) for i in range(20)]
    two, one = write_csv(tmp_path / "two.csv", rows), write_csv(tmp_path / "one.csv", rows[::2])
    assert finetune(model, "classification", two, tmp_path / "out", "--best", score) == 0
    metrics = json.loads((tmp_path / "out" / "report" / "metrics.json").read_text())
    assert metrics["best"]["score"] == score and score in metrics["dev"]
    capsys.readouterr()
    three = write(tmp_path, "classification", "three")
    message = error_of(capsys, model, "classification", three, tmp_path / "other", "--best", score)
    assert message == f"best is {score!r}, a score of two labels; there are 3"
    if score == "auc":
        arguments = ["--best", score, "--dev", str(one)]
        message = error_of(capsys, model, "classification", two, tmp_path / "other", *arguments)
        assert message == f"{one}: every label is 'no'; best is 'auc', which takes examples of both labels"


def test_a_classifier_of_three_classes_becomes_one_of_two(tmp_path, model, capsys):
    first, second = tmp_path / "three", tmp_path / "two"
    assert finetune(model, "classification", write(tmp_path, "classification"), first) == 0
    data = write_csv(tmp_path / "two.csv", [(" ".join(sentence(i)), ["no", "yes"][i % 2]) for i in range(20)])
    assert "newly initialised" not in capsys.readouterr().err
    assert finetune(first, "classification", data, second) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "newly initialised" in line]
    assert line.startswith("fastbert: warning: ") and str(first / "model.safetensors") in line
    assert "tensor classifier.weight has shape (3, 48); the config makes it (2, 48)" in line
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(second)
    assert loaded.config.id2label == {0: "no", 1: "yes"} and loaded.classifier.weight.shape == (2, 48)
