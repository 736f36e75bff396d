"""`fastbert predict` and the commands around it: the columns of rows, formats, kills, memory."""

import csv
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_support import COMMAND, ENVIRONMENT, drive, make_texts, run, write_texts
from tasks_support import labels, save
from tiny_bert import save_tiny

import fastbert

TAGS = labels("O", "B-PER", "I-PER")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    home = tmp_path_factory.mktemp("classifier")
    return save(home, "bert", "ForSequenceClassification", num_labels=3, **labels("sport", "news", "art"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def write_rows(path, rows):
    """Rows of strings, in the format of the suffix."""
    if path.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.endswith("csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    if path.endswith("parquet"):
        return pq.read_table(path).to_pylist()
    if path.endswith("csv"):
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    return rows_of(Path(path).read_text())


@pytest.mark.parametrize("source", ["in.jsonl", "in.csv", "in.parquet"])
@pytest.mark.parametrize("out", ["o.jsonl", "o.csv", "o.parquet"])
def test_the_columns_of_the_input_are_kept(classifier, folder, capsys, source, out):
    texts = make_texts(30)
    write_rows(source, [{"id": f"n{i}", "text": text, "note": f'a "{i}", b'} for i, text in enumerate(texts)])
    code, _, err = run(capsys, "predict", classifier, source, "-o", out, "--allow-empty")
    assert code == 0 and f"30 rows to {out}" in err, err
    rows = read_rows(out)
    answers = fastbert.pipeline("text-classification", classifier)(texts)
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(30)]
    assert [row["text"] for row in rows] == texts and rows[4]["note"] == 'a "4", b'
    assert [row["prediction"] for row in rows] == [answer["label"] for answer in answers]
    np.testing.assert_allclose(
        [float(row["prediction_score"]) for row in rows], [a["score"] for a in answers], atol=1e-6
    )
    assert {int(row["prediction_windows"]) for row in rows} == {1}


def test_stdin_and_options(classifier, folder, capsys, monkeypatch):
    import io
    import sys

    class Stdin:
        buffer = io.BytesIO(b"the fox\n\nthe dog\n")

    monkeypatch.setattr(sys, "stdin", Stdin)
    code, out, err = run(capsys, "predict", classifier, "-", "--bad-lines", "skip", "--top-k", 2, "--prefix", "p")
    rows = rows_of(out)
    assert code == 0 and [row["line"] for row in rows] == [1, 3] and "1 of 3 lines skipped" in err
    assert all(len(row["p_top"]) == 2 and row["p_top"][0]["label"] == row["p"] for row in rows)
    write_texts("in.txt", ["the fox " * 100, "fox"])
    code, out, err = run(capsys, "predict", classifier, "in.txt", "--threshold", 1.1)
    rows = rows_of(out)
    assert [row["prediction"] for row in rows] == [None, None] and rows[0]["prediction_windows"] > 1
    assert rows[0]["prediction_tokens"] >= 200 and "1 rows were too long for the model" in err
    code, out, _ = run(capsys, "predict", classifier, "in.txt", "--truncation", "-q")
    assert rows_of(out)[0]["prediction_windows"] == 1


def test_several_labels_and_numbers(folder, capsys):
    several = save(
        folder / "several",
        "bert",
        "ForSequenceClassification",
        problem_type="multi_label_classification",
        **labels("a", "b", "c"),
    )
    number = save(folder / "number", "bert", "ForSequenceClassification", num_labels=1, problem_type="regression")
    write_texts("in.txt", ["the fox", "dogs"])
    rows = rows_of(run(capsys, "predict", several, "in.txt")[1])
    scores = fastbert.pipeline("text-classification", several)(["the fox", "dogs"], top_k=None)
    for row, found in zip(rows, scores, strict=True):
        assert row["prediction"] == [each["label"] for each in found if each["score"] >= 0.5]
    everything = rows_of(run(capsys, "predict", several, "in.txt", "--threshold", 0)[1])
    assert all(sorted(row["prediction"]) == ["a", "b", "c"] for row in everything)
    rows = rows_of(run(capsys, "predict", number, "in.txt")[1])
    assert all(isinstance(row["prediction"], float) and "prediction_score" not in row for row in rows)


def test_tags_questions_and_choices(folder, capsys):
    tagger = save(folder / "tagger", "bert", "ForTokenClassification", num_labels=3, **TAGS)
    write_rows("words.jsonl", [{"words": ["the", "quick", "fox"]}, {"text": "the quick fox"}])
    rows = rows_of(run(capsys, "predict", tagger, "words.jsonl")[1])
    assert rows[0]["prediction"] == rows[1]["prediction"]
    assert all("the quick fox"[each["start"] : each["end"]] for row in rows for each in row["prediction"])
    reader = save(folder / "reader", "bert", "ForQuestionAnswering")
    asked = [{"id": 7, "question": "who?", "context": "the quick brown fox jumps over the dog"}]
    write_rows("q.jsonl", asked)
    (row,) = rows_of(run(capsys, "predict", reader, "q.jsonl", "--top-k", 2)[1])
    answer = fastbert.pipeline("question-answering", reader)(asked[0], top_k=2)[0]
    assert row["id"] == 7 and row["prediction"] == answer["answer"] and len(row["prediction_top"]) == 2
    assert asked[0]["context"][row["prediction_start"] : row["prediction_end"]] == row["prediction"]
    chooser = save(folder / "chooser", "bert", "ForMultipleChoice")
    write_rows("c.csv", [{"text": "the fox", "x": "jumps", "y": "sleeps"}])
    (row,) = rows_of(run(capsys, "predict", chooser, "c.csv", "--choice-columns", "x,y")[1])
    assert row["prediction"] in (0, 1) and len(row["prediction_scores"]) == 2


def test_sentences_of_conll(folder, capsys):
    tagger = save(folder / "tagger", "bert", "ForTokenClassification", num_labels=3, **TAGS)
    write_rows("words.jsonl", [{"words": ["the", "quick", "fox"]}, {"words": ["dogs"]}])
    wanted = [row["prediction"] for row in rows_of(run(capsys, "predict", tagger, "words.jsonl")[1])]
    Path("a.conll").write_text("-DOCSTART- O\n\nthe DT O\nquick JJ O\nfox NN B-PER\n\ndogs NN O\n")
    rows = rows_of(run(capsys, "predict", tagger, "a.conll")[1])
    assert [(row["line"], row["words"], row["tags"]) for row in rows] == [
        (3, ["the", "quick", "fox"], ["O", "O", "B-PER"]),
        (7, ["dogs"], ["O"]),
    ]
    assert [row["prediction"] for row in rows] == wanted
    Path("words.iob2").write_text("the\nquick\nfox\n\ndogs\n")  # nothing but words
    rows = rows_of(run(capsys, "predict", tagger, "words.iob2")[1])
    assert [row["prediction"] for row in rows] == wanted and "tags" not in rows[0]
    Path("a.tsv").write_text("1\tthe\tO\n2\tquick\tO\n3\tfox\tO\n\n1\tdogs\tO\n")
    code, _, err = run(capsys, "predict", tagger, "a.tsv", "--input-format", "conll", "-o", "o.csv")
    assert code == 0 and [json.loads(row["prediction"]) for row in read_rows("o.csv")] == wanted, err
    rows = rows_of(run(capsys, "predict", tagger, "a.conll", "--words-column", 2)[1])
    assert rows[0]["2"] == ["DT", "JJ", "NN"]
    Path("bad.conll").write_text("a O\nb\n")
    code, _, err = run(capsys, "predict", tagger, "bad.conll")
    assert code == 1 and "bad.conll:2: one column, 'b'; there must be a word and its tag" in err
    code, _, err = run(capsys, "predict", save_tiny("other", fastbert.BertForSequenceClassification), "a.conll")
    assert code == 1 and "a.conll: the suffix '.conll' is none of" in err


def test_questions_of_squad(folder, capsys):
    reader = save(folder / "reader", "bert", "ForQuestionAnswering")
    context = "the quick brown fox jumps over the dog"
    answer = {"text": "fox", "answer_start": 16}
    asked = [
        {"id": "7", "question": "who?", "answers": [answer]},
        {"id": "8", "question": "what?", "answers": [], "is_impossible": True},
        {"id": "9", "question": "the dog?"},
    ]
    Path("q.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}]}]}))
    rows = rows_of(run(capsys, "predict", reader, "q.json")[1])
    assert [(row["id"], row["question"], row["context"]) for row in rows] == [
        ("7", "who?", context),
        ("8", "what?", context),
        ("9", "the dog?", context),
    ]
    assert rows[0]["answers"] == {"text": ["fox"], "answer_start": [16]} and "answers" not in rows[2]
    assert rows[1]["answers"] == {"text": [], "answer_start": []}
    answers = fastbert.pipeline("question-answering", reader)([{**each, "context": context} for each in asked])
    assert [row["prediction"] for row in rows] == [each["answer"] for each in answers]
    Path("rows.json").write_text(json.dumps([{"question": "who?", "context": context}]))
    (row,) = rows_of(run(capsys, "predict", reader, "rows.json")[1])
    assert row["prediction"] == rows[0]["prediction"]
    asked[1]["answers"] = asked[1].pop("is_impossible")
    Path("q.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}]}]}))
    code, _, err = run(capsys, "predict", reader, "q.json")
    assert code == 1 and "q.json:1 has a question '8' with the answers True; they must be a list of objects" in err
    rows = rows_of(run(capsys, "predict", reader, "q.json", "--bad-lines", "skip")[1])
    assert [row["id"] for row in rows] == ["7", "9"]


def test_zero_shot(folder, capsys):
    model = save(
        folder / "nli", "bert", "ForSequenceClassification", **labels("contradiction", "neutral", "entailment")
    )
    write_texts("in.txt", ["the fox", "dogs"])
    rows = rows_of(run(capsys, "zero-shot", model, "in.txt", "--labels", "animal,art", "--top-k", 2)[1])
    wanted = fastbert.pipeline("zero-shot-classification", model)(["the fox", "dogs"], ["animal", "art"])
    assert [row["prediction"] for row in rows] == [answer["labels"][0] for answer in wanted]


def test_search_rerank_summarize(folder, capsys):
    model, ranker = (
        save(folder / "m", "bert", "Model"),
        save(folder / "r", "bert", "ForSequenceClassification", num_labels=1),
    )
    texts = ["the quick brown fox", "la plage", "dogs and dogs", "1,000 dogs"]
    write_texts("in.txt", texts)
    assert run(capsys, "embed", model, "in.txt", "-o", "in.npy", "-q")[0] == 0
    (row,) = rows_of(
        run(capsys, "search", model, "la plage", "--corpus", "in.npy", "--texts", "in.txt", "--top-k", 2)[1]
    )
    assert row["query"] == "la plage" and len(row["hits"]) == 2
    assert row["hits"][0]["text"] == "la plage" and row["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    rows = rows_of(run(capsys, "search", model, "--queries", "in.txt", "--corpus", "in.npy", "--top-k", 1)[1])
    assert [row["hits"][0]["corpus_id"] for row in rows] == [0, 1, 2, 3]
    rows = rows_of(run(capsys, "rerank", ranker, "a dog", "in.txt", "--top-k", 3)[1])
    assert [row["corpus_id"] for row in rows] == [
        hit["corpus_id"] for hit in fastbert.rerank("a dog", texts, model=ranker, top_k=3)
    ]
    Path("article.txt").write_text("The quick brown fox jumps over it. A second one is here. And the third ends it.")
    out = run(capsys, "summarize", model, "article.txt", "--sentences", 2, "--min-length", 5)[1]
    assert out.startswith("The quick brown fox jumps over it. ") and out.count(".") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in.txt", "-o", "o.npy"], "-o o.npy: the suffix is none of .jsonl"),
        (["none.txt"], "none.txt: no such file"),
        (["in.txt", "-o", "in.txt", "--output-format", "jsonl"], "in.txt is an input, too"),
        (["in.csv", "--text-column", "body"], "in.csv:2 has no column 'body'"),
        (["in.csv"], "the input has a column 'prediction', too; give another --prefix"),
        (["-", "--resume"], "--resume and --restart need a file"),
    ],
)
def test_bad_input(classifier, folder, capsys, args, message):
    write_texts("in.txt", ["a fox"])
    write_rows("in.csv", [{"text": "a fox", "prediction": "mine"}])
    code, _, err = run(capsys, "predict", classifier, *args)
    assert code in (1, 2) and message in err, err


def test_no_head_of_a_task(folder, capsys):
    write_texts("in.txt", ["a fox"])
    code, _, err = run(capsys, "predict", save(folder / "m", "bert", "Model"), "in.txt")
    assert code == 1 and "the model has no head of a task (BertModel)" in err
    code, _, err = run(capsys, "predict", save(folder / "mlm", "bert", "ForMaskedLM"), "in.txt")
    assert code == 1 and "the model's head is for fill-mask; fastbert predict runs text-classification" in err


def test_a_kill_at_any_step_loses_nothing(folder):
    model = save_tiny(folder / "model", fastbert.BertForSequenceClassification)
    write_texts("in.txt", [*make_texts(20), "", "a cat"])
    report = drive("kill", "o.csv", model, "in.txt", "predict")
    assert report["identical"] == report["kills"] >= 12, report
    assert report["kept"] == [8, 16, 22], report
    assert report["chain"] and report["left"] == ["in.txt", "model", "o.csv"], report


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(folder):
    model = save_tiny(folder / "model", fastbert.BertForSequenceClassification, num_hidden_layers=0)
    for count in (2_000, 10_000):
        write_texts(f"{count}.txt", ["a cat sat on the red mat"] * count)
    peaks = [drive("memory", f"o{n}.csv", model, f"{n}.txt", "predict")["peak_mib"] for n in (2_000, 10_000)]
    assert peaks[1] - peaks[0] < 20, peaks


@pytest.mark.slow
def test_a_million_rows(folder):
    """Killed on the way, it goes on; memory does not grow; row i of the output is row i of the input."""
    model = save_tiny(folder / "model", fastbert.BertForSequenceClassification, num_hidden_layers=1)
    texts = make_texts(997)

    def rows(count):
        return ((str(i), texts[i % 997]) for i in range(count))

    for count in (50_000, 1_000_000):
        with open(f"{count}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text"), *rows(count)])

    def start(count):
        return subprocess.Popen(
            [*COMMAND, "predict", str(model), f"{count}.csv", "-o", f"{count}-out.csv", "-q", "--resume"],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
        )

    def peak_mib(process):
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, process.stderr.read()
        return usage.ru_maxrss / 1024

    small = peak_mib(start(50_000))
    killed, partial = start(1_000_000), Path("1000000-out.csv.partial")
    while not partial.exists() or partial.stat().st_size < 20 << 20:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    before = partial.stat().st_size
    assert not Path("1000000-out.csv").exists()
    large = peak_mib(start(1_000_000))
    print(f"peak of 50,000 rows: {small:.0f} MiB, of 1,000,000: {large:.0f} MiB; killed at {before / 2**20:.0f} MiB")
    assert large - small < 30
    with open("1000000-out.csv", newline="", encoding="utf-8") as file:
        count = 0
        for row, (id, text) in zip(csv.DictReader(file), rows(1_000_000), strict=True):
            assert (row["id"], row["text"]) == (id, text) and row["prediction"]
            count += 1
    assert count == 1_000_000


def test_columns_by_number(folder, classifier, capsys):
    """Without a header line, columns are numbers, as in the input."""
    Path("in.csv").write_text("1,the fox\n2,a dog\n")
    code, _, err = run(capsys, "predict", classifier, "in.csv", "--no-header", "--text-column", "2", "-o", "out.jsonl")
    assert code == 0, err
    rows = rows_of(Path("out.jsonl").read_text())
    assert [(row["1"], row["2"], row["line"]) for row in rows] == [("1", "the fox", 1), ("2", "a dog", 2)]


def test_what_a_row_holds_is_kept_or_refused(folder, classifier, capsys):
    pq.write_table(pa.table({"text": ["a fox", "a dog"], "x": [float("nan"), 1.5], "line": [7, 8]}), "in.parquet")
    assert run(capsys, "predict", classifier, "in.parquet", "-o", "out.jsonl")[0] == 0
    rows = rows_of(Path("out.jsonl").read_text())
    assert [(row["x"], row["line"]) for row in rows] == [(None, 7), (1.5, 8)]
    pq.write_table(pa.table({"text": ["a fox"], "picture": [b"\x89"]}), "bytes.parquet")
    code, _, err = run(capsys, "predict", classifier, "bytes.parquet", "-o", "bytes.jsonl")
    assert code == 1 and "column 'picture' holds bytes" in err


def test_a_tsv_can_be_read_again(folder, classifier, capsys):
    Path("in.tsv").write_text('text\na "fox" and a dog\n')
    assert run(capsys, "predict", classifier, "in.tsv", "-o", "out.tsv")[0] == 0
    assert run(capsys, "predict", classifier, "out.tsv", "-o", "again.jsonl", "--prefix", "again")[0] == 0
    assert rows_of(Path("again.jsonl").read_text())[0]["text"] == 'a "fox" and a dog'
    write_rows("tabs.jsonl", [{"text": "a\tfox"}])
    code, _, err = run(capsys, "predict", classifier, "tabs.jsonl", "-o", "tabs.tsv")
    assert code == 1 and "row 1 holds a tab or a line break, which a .tsv cannot; write .csv" in err


def test_truncation_is_told(folder, classifier, capsys):
    write_texts("in.txt", ["a fox", "fox " * 200])
    assert run(capsys, "predict", classifier, "in.txt", "-o", "out.jsonl", "--truncation")[2].count("were cut") == 1
    rows = rows_of(Path("out.jsonl").read_text())
    assert [row["prediction_truncated"] for row in rows] == [False, True]


def test_questions_have_options_of_their_own(folder, capsys):
    model = save(folder / "qa", "bert", "ForQuestionAnswering")
    write_rows("in.jsonl", [{"question": "the fox", "context": "the quick brown fox jumps over the dog " * 20}])
    options = ["--max-length", "40", "--stride", "8", "--max-answer", "3", "--unanswerable"]
    assert run(capsys, "predict", model, "in.jsonl", "-o", "out.jsonl", *options)[0] == 0
    (row,) = rows_of(Path("out.jsonl").read_text())
    ours = fastbert.pipeline("question-answering", model)
    given = {"max_seq_len": 40, "doc_stride": 8, "max_answer_len": 3, "handle_impossible_answer": True}
    expected = ours(question=row["question"], context=row["context"], **given)
    assert (row["prediction"], row["prediction_windows"]) == (expected["answer"], expected["windows"])
    code, _, err = run(capsys, "predict", model, "in.jsonl", "--truncation")
    assert code == 2 and "--truncation is given; the model's task is question-answering, which has no use" in err


def test_texts_of_another_field_are_shown(folder, capsys):
    model = save(folder / "model", "bert", "Model")
    write_rows("texts.jsonl", [{"body": text} for text in ("a fox", "a dog", "the sea")])
    assert run(capsys, "embed", model, "texts.jsonl", "--field", "body", "-o", "texts.npy")[0] == 0
    search = ["search", model, "a fox", "--corpus", "texts.npy", "--texts", "texts.jsonl", "--top-k", "1"]
    code, _, err = run(capsys, *search)
    assert code == 1 and "no field 'text'" in err
    code, out, _ = run(capsys, *search, "--field", "body")
    assert code == 0 and rows_of(out)[0]["hits"][0]["text"] == "a fox"


def test_long_texts_as_means(folder, capsys):
    model = save(folder / "model", "bert", "Model")
    texts = ["a fox", "the quick brown fox " * 60, "a dog"]
    write_texts("in.txt", texts)
    code, _, err = run(capsys, "embed", model, "in.txt", "-o", "out.npy", "--long", "mean")
    assert code == 0 and "1 of 3 texts are the mean of several windows" in err
    expected = fastbert.Embedder.from_pretrained(model).embed(texts, long="mean")
    np.testing.assert_allclose(np.load("out.npy"), expected, atol=1e-6)
