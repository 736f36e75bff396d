"""Files of labelled examples, their alignment with tokens, and every way in which they can be wrong."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetune_support import VOCAB, write_csv, write_jsonl, write_squad

import fastbert
from fastbert.training.finetune import answers
from fastbert.training.finetune.examples import (
    Answer,
    DataError,
    QuestionExample,
    Reading,
    WordsExample,
    read_choices,
    read_label_lists,
    read_questions,
    read_scores,
    read_texts,
    read_words,
)
from fastbert.training.finetune.features import IGNORE, packed, padded
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.tasks import TASKS

TOKENIZER = fastbert.BertTokenizer(VOCAB)


def settings(task, **options):
    return FinetuneSettings(task=task, **{"max_length": 64, "stride": 3, "max_question": 6, **options})


# Reading


def test_csv_by_name_by_number_and_unquoted(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one, two", "x"), ("three\nfour", "y")])
    examples = read_texts(path, Reading())
    assert [(e.text, e.label) for e in examples] == [("one, two", "x"), ("three\nfour", "y")]
    assert [e.where for e in examples] == [f"{path}:2", f"{path}:3"]
    path = tmp_path / "sts.csv"
    path.write_text('a\t2.5\tsay "hi\tgo\n b\t0\t"x"\tend\textra\n')
    reading = Reading(delimiter="\t", header=False, quoted=False, label="2", text="3", pair="4")
    assert [(e.text, e.pair, e.label) for e in read_scores(path, reading)] == [
        ('say "hi', "go", 2.5),
        ('"x"', "end", 0),
    ]


def test_jsonl_labels_may_be_numbers_lists_or_truth_values(tmp_path):
    rows = [{"text": "a", "label": 3}, {"text": "b", "label": True}, {"text": "c", "label": " x "}]
    assert [e.label for e in read_texts(write_jsonl(tmp_path / "a.jsonl", rows), Reading())] == ["3", "True", "x"]
    rows = [{"text": "a", "label": ["x", "y", "x"]}, {"text": "b", "label": ""}, {"text": "c", "label": "x|y"}]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    assert [e.label for e in read_label_lists(path, Reading(label_separator="|"))] == [["x", "y"], [], ["x", "y"]]


def test_choices_in_columns_and_in_lists(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("t", "u", "v", "1")], header=("text", "p", "q", "label"))
    (example,) = read_choices(path, Reading(choices=("p", "q")))
    assert (example.choices, example.label) == (["u", "v"], 1)
    (example,) = read_choices(
        write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "choices": ["u", "v"], "label": 0}]), Reading()
    )
    assert (example.choices, example.label) == (["u", "v"], 0)


def test_conll_sentences_end_at_blank_lines_and_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"-DOCSTART- O\r\n\r\nanna NN B-PER\r\nsaw O\n\n\n  \nrome B-LOC\n-DOCSTART- -X- O\nbob B-PER")
    examples = read_words(path, Reading())
    assert [(e.words, e.tags) for e in examples] == [
        (["anna", "saw"], ["B-PER", "O"]),
        (["rome"], ["B-LOC"]),
        (["bob"], ["B-PER"]),
    ]
    assert [e.where.rsplit(":")[-1] for e in examples] == ["3", "8", "10"]


def test_questions_of_squad_and_of_jsonl(tmp_path):
    question = {
        "id": "7",
        "question": "who?",
        "context": "anna saw bob",
        "answers": [{"text": "bob", "answer_start": 9}],
    }
    none = {"id": "8", "question": "who?", "context": "anna", "answers": [], "is_impossible": True}
    examples = read_questions(write_squad(tmp_path / "a.json", [question, none]), Reading())
    assert [(e.id, e.question, e.context, e.answers) for e in examples] == [
        ("7", "who?", "anna saw bob", [Answer("bob", 9)]),
        ("8", "who?", "anna", []),
    ]
    row = {**question, "answers": {"text": ["bob"], "answer_start": [9]}}
    (example,) = read_questions(write_jsonl(tmp_path / "a.jsonl", [row]), Reading())
    assert (example.id, example.answers) == ("7", [Answer("bob", 9)])


def squad_file(tmp_path, **changes):
    good = {"id": "a", "question": "who?", "context": "anna", "answers": []}
    bad = {"id": "b", "question": "who?", "context": "anna saw", "answers": [{"text": "saw", "answer_start": 5}]}
    return write_squad(tmp_path / "bad.json", [good, {**bad, **changes}])


BAD_TEXTS = [
    (read_texts, "text,label\na,x\nb\n", "bad.csv:3: has 1 fields; the header line names 2"),
    (read_texts, "text,label\none, two,x\n", "bad.csv:2: has 3 fields; the header line names 2"),
    (
        read_texts,
        "text,label,text\na,x,b\n",
        "bad.csv:1: the header line names 'text' twice; if it names no columns, give --no-header",
    ),
    (
        read_texts,
        "words,label\na,x\n",
        "bad.csv:1: no column 'text'; there are 'words', 'label'; if line 1 names no columns, give --no-header and the "
        "column's number",
    ),
    (
        read_texts,
        "text;label\na;x\n",
        "bad.csv:1: no column 'text'; there are 'text;label'; the line looks separated by semicolons: give "
        "--delimiter ';'",
    ),
    (read_texts, 'text,label\na,x\n"b,y\n', "bad.csv:3: is no csv: unexpected end of data"),
    (read_texts, "text,label\n  ,x\n", "bad.csv:2: text is '  '; it must be a text, not empty"),
    (read_texts, "text,label\na,\n", "bad.csv:2: label is ''; it must be a name or a number"),
    (read_scores, "text,label\na,1\nb,high\n", "bad.csv:3: label is 'high'; it must be a number"),
    (read_scores, "text,label\na,nan\n", "bad.csv:2: label is 'nan'; it must be a number"),
    (read_choices, "text,p,q,label\na,b,c,2\n", "bad.csv:2: label 2 is no number of a choice, 0 to 1"),
    (read_choices, "text,p,q,label\na,b,c,0.5\n", "bad.csv:2: label 0.5 is no number of a choice, 0 to 1"),
]


@pytest.mark.parametrize("read, text, message", BAD_TEXTS)
def test_a_bad_csv_file(tmp_path, read, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError) as error:
        read(tmp_path / "bad.csv", Reading(choices=("p", "q")))
    assert str(error.value) == f"{tmp_path}/{message}"


def test_the_same_examples_in_every_file_format(tmp_path):
    """Each format holds the same two examples; a quote in a .tsv is a character."""
    rows = [{"text": 'a "b', "label": "x"}, {"text": "c, d", "label": "y"}]
    plain = "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    (tmp_path / "a.tsv").write_text(plain)
    with gzip.open(tmp_path / "b.tsv.gz", "wt") as file:
        file.write(plain)
    write_csv(tmp_path / "c.csv", [tuple(row.values()) for row in rows])
    write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "e.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    names = ["a.tsv", "b.tsv.gz", "c.csv", "d.jsonl", "e.json", "f.parquet"]
    for name in names:
        got = [{"text": e.text, "label": e.label} for e in read_texts(tmp_path / name, Reading())]
        assert got == rows, name
    assert [e.where for e in read_texts(tmp_path / "e.json", Reading())] == [
        f"{tmp_path}/e.json:{line}" for line in (2, 6)
    ]
    assert read_texts(tmp_path / "f.parquet", Reading())[1].where == f"{tmp_path}/f.parquet: row 2"


def test_files_that_are_not_what_they_seem(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"one\ntwo"\tx\n')
    with pytest.raises(DataError, match=r"a\.tsv looks written with fields in quotes: give --quoted"):
        read_texts(path, Reading())
    assert [e.text for e in read_texts(path, Reading(quoted=True))] == ["one\ntwo"]
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"the suffix '\.xlsx' is none of \.jsonl, .* name the format with --format"):
        read_texts(path, Reading())
    with pytest.raises(DataError, match=r"a\.xlsx holds a zip archive"):
        read_texts(path, Reading(format="csv"))


def test_a_tab_parts_columns_and_a_blank_does_not(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("New York\tB-LOC\nis\tO\n")
    (example,) = read_words(path, Reading())
    assert (example.words, example.tags) == (["New York", "is"], ["B-LOC", "O"])


def test_a_whole_float_is_the_class_of_its_integer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1.0}\n{"text": "b", "label": 1}\n')
    assert [example.label for example in read_texts(path, Reading())] == ["1", "1"]
    path.write_text('{"text": "a", "label": 1.5}\n')
    with pytest.raises(DataError, match=r"label is 1\.5; it must be a name or a number"):
        read_texts(path, Reading())


def test_a_bad_jsonl_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    for line, message in {
        "{": "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "": "is empty",
        "[1]": "holds a JSON list, not an object",
        '{"text": "a"}': "no column 'label'; there are 'text'",
        '{"text": 1, "label": "x"}': "text is 1; it must be a text, not empty",
        '{"text": "a", "label": null}': "label is None; it must be a name or a number",
        '{"text": "a", "label": "\\ud800"}': "has half a surrogate pair, which is no character",
    }.items():
        path.write_text('{"text": "a", "label": "x"}\n' + line + "\n")
        with pytest.raises(DataError) as error:
            read_texts(path, Reading())
        assert str(error.value) == f"{path}:2: {message}"
    for labels in ([None], [{"x": 1}], 3):
        path = write_jsonl(path, [{"text": "a", "label": labels}])
        with pytest.raises(DataError, match=r"bad.jsonl:1: label is .*; it must be a list of labels, names or numbers"):
            read_label_lists(path, Reading())
    path.write_bytes(b'{"text": "a", "label": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: is not UTF-8 \(byte 0xff at byte 11\)"):
        read_texts(path, Reading())
    with pytest.raises(DataError, match="the format is conll; this task reads jsonl, json, csv, parquet"):
        read_texts(path, Reading(format="conll"))
    rows = [{"text": "a", "choices": ["b", "c"], "label": 0}, {"text": "a", "choices": ["b"] * 3, "label": 0}]
    with pytest.raises(DataError, match=r"c.jsonl:2: 3 choices; .*c.jsonl:1 has 2"):
        read_choices(write_jsonl(tmp_path / "c.jsonl", rows), Reading())
    with pytest.raises(DataError, match=r"c.jsonl:1: 1 choices; there must be at least 2"):
        read_choices(write_jsonl(tmp_path / "c.jsonl", [{"text": "a", "choices": ["b"], "label": 0}]), Reading())


def test_a_bad_file_of_words(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"words": ["a"], "tags": ["O"]}, {"words": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(DataError, match=r"bad.jsonl:2: 2 words and 1 tags; each word has one"):
        read_words(path, Reading())
    path = tmp_path / "bad.conll"
    for text, message in {
        "a O\nb\n": "2: one column, 'b'; there must be a word and its tag",
        "a O\n\n\nb O\nc X-PER\n": "4: tag 'X-PER' of 'c'; tags are O, B-TYPE and I-TYPE",
        "a B-LOC\nb I-PER\n": "1: I-PER of 'b' follows B-LOC; an entity begins with B-PER",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError) as error:
            read_words(path, Reading())
        assert str(error.value) == f"{path}:{message}"


def test_a_bad_file_of_questions(tmp_path):
    path = squad_file(tmp_path, answers=[{"text": "saw", "answer_start": 4}])
    line = 1 + path.read_text()[: path.read_text().index('"b"')].count("\n")
    assert line > 10
    with pytest.raises(DataError) as error:
        read_questions(path, Reading())
    assert str(error.value) == (
        f"{path}:{line}: question 'b': the answer 'saw' is not in its context at character 4, where there is ' sa'"
    )
    for start in (-3, 99):
        with pytest.raises(DataError, match=f"not in its context at character {start}"):
            read_questions(squad_file(tmp_path, answers=[{"text": "saw", "answer_start": start}]), Reading())
    with pytest.raises(DataError, match=r"bad.json:1: is not SQuAD's JSON: no 'data' where it should be"):
        path.write_text("{}")
        read_questions(path, Reading())
    with pytest.raises(DataError, match=r"bad.json:2: is not JSON"):
        path.write_text("{\n]")
        read_questions(path, Reading())
    with pytest.raises(DataError, match=r"question 'a' is at .*bad.json:\d+, too"):
        read_questions(squad_file(tmp_path, id="a"), Reading())
    with pytest.raises(DataError, match="has a question 'b' with an answer that has no 'answer_start'"):
        read_questions(squad_file(tmp_path, answers=[{"text": "saw"}]), Reading())
    listed = "a question 'b' with the answers .*; they must be a list of objects, each with a text and a whole number"
    for start in ("5", 5.0, None, True):
        with pytest.raises(DataError, match=listed):
            read_questions(squad_file(tmp_path, answers=[{"text": "saw", "answer_start": start}]), Reading())
    for given in (None, {"text": ["saw"], "answer_start": [5]}, [{"text": 3, "answer_start": 5}]):
        with pytest.raises(DataError, match=listed):
            read_questions(squad_file(tmp_path, answers=given), Reading())
    for change, message in (
        ({"question": 5}, r"bad.json:\d+: question is 5; it must be a text, not empty"),
        ({"context": ""}, r"bad.json:\d+: context is ''; it must be a text, not empty"),
        ({"question": "\ud800"}, r"bad.json:\d+: has half a surrogate pair, which is no character"),
    ):
        with pytest.raises(DataError, match=message):
            read_questions(squad_file(tmp_path, **change), Reading())
    for qas, message in (
        ([3], "bad.json:1: holds a JSON int, not an object"),
        (3, "bad.json:1: is not SQuAD's JSON: data, paragraphs and qas must be lists of objects"),
    ):
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "anna", "qas": qas}]}]}))
        with pytest.raises(DataError, match=message):
            read_questions(path, Reading())
    for given in ({"text": ["saw"], "answer_start": ["5"]}, {"text": "s", "answer_start": [5]}):
        row = {"question": "who?", "context": "anna saw", "answers": given}
        with pytest.raises(DataError, match=r"bad.jsonl:1: answers is .*; it must be two lists"):
            read_questions(write_jsonl(tmp_path / "bad.jsonl", [row]), Reading())


def test_readings_that_cannot_be():
    for options, message in (
        ({"delimiter": ";;"}, "delimiter is ';;'; it must be one character"),
        ({"delimiter": ""}, "delimiter is ''; it must be one character"),
        ({"label_separator": ""}, "label_separator is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Reading(**options)


# Words


def test_a_tag_stands_at_the_first_token_of_its_word():
    example = WordsExample("f:1", ["annaab", "saw", "romes"], ["B-PER", "O", "B-LOC"])
    labels = ["O", "B-LOC", "B-PER"]
    (feature,) = TASKS["token-classification"].encode([example], TOKENIZER, labels, settings("token-classification"))
    tokens = TOKENIZER.convert_ids_to_tokens(feature.sequences[0][0].tolist())
    assert tokens == ["[CLS]", "anna", "##a", "##b", "saw", "rome", "##s", "[SEP]"]
    assert feature.label == [IGNORE, 2, IGNORE, IGNORE, 0, 1, IGNORE, IGNORE]
    assert feature.places.tolist() == [-1, 0, -1, -1, 1, 2, -1, -1]
    assert feature.weight == 3


def test_a_word_without_tokens_is_predicted_as_outside():
    task = TASKS["token-classification"]
    example = WordsExample("f:1", ["anna", "\u200b", "rome", "bob"], ["B-PER", "O", "B-LOC", "B-PER"])
    labels = ["O", "B-LOC", "B-PER"]
    (feature,) = task.encode([example], TOKENIZER, labels, settings("token-classification"))
    assert not feature.truncated and feature.places.tolist() == [-1, 0, 2, 3, -1]
    (prediction,) = task.decode(
        [example], [feature], [np.eye(3)[[0, 2, 1, 2, 1]]], labels, settings("token-classification")
    )
    assert prediction["predicted"] == ["B-PER", "O", "B-LOC", "B-PER"]
    assert prediction["gold"] == example.tags


def test_a_long_text_has_windows_and_each_word_one_tag():
    """Of the window where it is most central; the others neither train nor predict it."""
    task = TASKS["token-classification"]
    words = ["anna", "saw", "rome", "annaab", "bob", "left", "oslo", "and", "carl"] * 3
    example = WordsExample("f:1", words, ["B-PER", "O", "B-LOC"] * 9)
    labels = ["O", "B-LOC", "B-PER"]
    chosen = settings("token-classification", max_length=10, stride=2)
    features = task.encode([example], TOKENIZER, labels, chosen)
    assert len(features) > 3 and all(feature.example == 0 for feature in features)
    kept = [word for feature in features for word in feature.places.tolist() if word >= 0]
    assert sorted(kept) == list(range(27)) and sum(feature.weight for feature in features) == 27
    for feature in features:
        assert [tag == IGNORE for tag in feature.label] == (feature.places < 0).tolist()
        for place in np.flatnonzero(feature.places >= 0):
            assert feature is features[0] or feature is features[-1] or 2 <= place < len(feature.places) - 2
    logits = [np.eye(3)[[max(tag, 0) for tag in feature.label]] for feature in features]
    (prediction,) = task.decode([example], features, logits, labels, chosen)
    assert prediction["predicted"] == example.tags


def test_labels_outside_the_label_set():
    bad = WordsExample("dev.conll:9", ["anna"], ["B-ORG"])
    with pytest.raises(DataError, match=r"dev.conll:9: label 'B-ORG' is none of the training data's 2: 'O', 'B-PER'"):
        TASKS["token-classification"].encode([bad], TOKENIZER, ["O", "B-PER"], settings("token-classification"))


def test_label_sets_are_in_order():
    words = [WordsExample("f", ["a"] * 4, ["B-PER", "I-PER", "B-LOC", "I-LOC"])]
    assert TASKS["token-classification"].labels(words) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    from fastbert.training.finetune.examples import TextExample

    texts = lambda *labels: [TextExample("f:1", "a", None, label) for label in labels]  # noqa: E731
    assert TASKS["classification"].labels(texts("10", "9", "-1")) == ["-1", "9", "10"]
    assert TASKS["classification"].labels(texts("b", "10", "a")) == ["10", "a", "b"]
    with pytest.raises(DataError, match="f:1: all labels are 'a'; classification needs two or more"):
        TASKS["classification"].labels(texts("a", "a"))


# Questions

CONTEXTS = [
    ("anna saw rome today. bob left oslo, and carl found lima.", ["rome", "bob left oslo", "lima", "anna", "lima."]),
    ("Café  in  ROMÉ —  anna\tsaw 東京都 ?\n\n", ["Café", "ROMÉ", "京", "東京都 ?", "anna\tsaw", "Café  in  ROMÉ"]),
    ("e\u0301 cafe\u0301s in \U0001f600 rome", ["cafe\u0301s", "\U0001f600", "rome", "\U0001f600 rome"]),
]
CASES = [(context, answer) for context, found in CONTEXTS for answer in found]


@pytest.mark.parametrize("max_length", [14, 64])
@pytest.mark.parametrize("context, answer", CASES)
def test_the_tokens_of_an_answer_give_its_text_back(context, answer, max_length):
    """From characters to tokens of a window and, by logits that point there, back to the very same characters."""
    start = context.index(answer)
    example = QuestionExample("f:1", "q", "who is anna?", context, [Answer(answer, start)])
    options = settings("question-answering", max_length=max_length, max_question=4)
    features = answers.encode([example], TOKENIZER, [], options)
    assert all(feature.length <= max_length for feature in features)
    found = [feature for feature in features if feature.label != (0, 0)]
    assert found or max_length == 14
    logits = []
    for feature in features:
        window = np.zeros((feature.length, 2))
        if feature.label != (0, 0):
            window[feature.label[0], 0] = window[feature.label[1], 1] = 9
        logits.append(window)
    if found:
        (prediction,) = answers.decode([example], features, logits, [], options)
        assert (prediction["answer"], prediction["start"]) == (answer, start)


def test_windows_overlap_by_the_stride_and_hold_the_whole_context():
    context = " ".join(["anna saw rome . bob left oslo ."] * 6)
    example = QuestionExample("f:1", "q", "who ?", context, [Answer("rome", 9)])
    options = settings("question-answering", max_length=20, stride=4, max_question=4)
    features = answers.encode([example], TOKENIZER, [], options)
    spans = [feature.places[feature.places[:, 0] >= 0] for feature in features]
    assert len(spans) > 3 and all(len(span) == 20 - 2 - 3 for span in spans[:-1])
    for before, after in pairwise(spans):
        assert after[:4].tolist() == before[-4:].tolist() and after[4, 0] > before[-1, 1]
    assert spans[0][0, 0] == 0 and spans[-1][-1, 1] == len(context)
    assert [feature.label != (0, 0) for feature in features] == [True] + [False] * (len(features) - 1)


def test_an_answer_cut_by_a_window_is_none_of_it():
    context = "anna saw rome . bob left oslo . carl found lima ."
    example = QuestionExample("f:1", "q", "who ?", context, [Answer("rome . bob left", 9)])
    options = settings("question-answering", max_length=10, stride=0, max_question=4)
    assert answers.encode([example], TOKENIZER, [], settings("question-answering"))[0].label == (6, 9)
    assert {feature.label for feature in answers.encode([example], TOKENIZER, [], options)} == {(0, 0)}


def test_long_questions_are_cut_and_long_strides_refused():
    example = QuestionExample("f:1", "q", "who is annas , and where is bob ?", "rome", [Answer("rome", 0)])
    (feature,) = answers.encode([example], TOKENIZER, [], settings("question-answering", max_question=4))
    assert TOKENIZER.decode(feature.sequences[0][0].tolist()) == "[CLS] who is annas [SEP] rome [SEP]"
    with pytest.raises(ValueError, match="stride is 8; max_length 16 leaves 7 tokens of context"):
        answers.encode([example], TOKENIZER, [], settings("question-answering", max_length=16, stride=8))


def window(scores, n=6):
    """Logits of [CLS] who [SEP] and n words, 0 but for {(token, start or end): score}."""
    logits = np.full((n + 4, 2), -5.0)
    for (token, side), score in scores.items():
        logits[token, side] = score
    return logits


def decode_window(*windows, **options):
    context = "anna saw rome bob left oslo"
    example = QuestionExample("f:1", "q", "who", context, [])
    wanted = settings("question-answering", **options)
    (feature,) = answers.encode([example], TOKENIZER, [], settings("question-answering"))
    return answers.decode([example], [feature] * len(windows), windows, [], wanted)[0]


def test_the_best_span_ends_after_it_starts_and_is_not_too_long():
    scores = {(5, 0): 9, (4, 1): 9, (8, 1): 5, (6, 1): 3}  # ends before; four tokens; two tokens
    assert decode_window(window(scores))["answer"] == "rome bob left oslo"
    assert decode_window(window(scores), max_answer=3)["answer"] == "rome bob"
    assert decode_window(window({(1, 0): 99, (1, 1): 99, (4, 0): 1, (4, 1): 1}))["answer"] == "saw"  # not the question


def test_only_the_n_best_starts_and_ends_are_tried():
    scores = {(5, 0): 9, (4, 0): 8, (3, 1): 9, (4, 1): 8, (8, 1): 1}
    assert decode_window(window(scores), n_best=1)["answer"] == ""  # the best start follows the best end
    assert decode_window(window(scores), n_best=2)["answer"] == "saw"


def test_the_best_of_all_windows_wins():
    weak, strong = window({(3, 0): 2, (3, 1): 2}), window({(8, 0): 3, (8, 1): 3})
    prediction = decode_window(weak, strong)
    assert prediction["answer"] == "oslo"
    assert [entry["answer"] for entry in prediction["n_best"]][:2] == ["oslo", "anna"]


def test_no_answer_needs_to_be_better_by_the_threshold_in_every_window():
    spans = {(3, 0): 2, (3, 1): 2}
    sure, unsure = window({**spans, (0, 0): 4, (0, 1): 3}), window({**spans, (0, 0): 1, (0, 1): 1})
    assert decode_window(sure, no_answer=True)["answer"] == ""
    assert decode_window(sure, no_answer=False)["answer"] == "anna"
    assert decode_window(sure, no_answer=True, null_threshold=3.5)["answer"] == "anna"
    assert decode_window(sure, unsure, no_answer=True)["answer"] == "anna"


# Batches


def test_packed_and_padded_hold_the_same_tokens():
    from fastbert.training.finetune.examples import ChoiceExample

    rows = [
        ChoiceExample("f", "anna saw", ["rome", "oslo today ."], 1),
        ChoiceExample("f", "bob", ["lima", "quito"], 0),
    ]
    features = TASKS["multiple-choice"].encode(rows, TOKENIZER, [], settings("multiple-choice"))
    row, table = packed(features), padded(features)
    assert table["input_ids"].shape == (2, 2, 8) and row["cu_seqlens"].tolist() == [0, 6, 14, 19, 24]
    mask = table["attention_mask"].bool()
    assert mask.sum(dim=-1).flatten().tolist() == row["cu_seqlens"].diff().tolist()
    assert table["input_ids"][mask].tolist() == row["input_ids"].tolist()
    assert (
        table["token_type_ids"][mask].tolist() == row["token_type_ids"].tolist() and row["token_type_ids"].sum() == 10
    )
