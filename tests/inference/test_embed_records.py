"""What `fastbert embed` reads: records of each kind of file, and the windows that they are split into."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_support import write_texts

from fastbert.inference.job import windows
from fastbert.inference.records import InputError, Reading, Record, Records


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts_of(inputs, **reading):
    """(line, text) of each record, the problem in place of a text there is not."""
    records = Records([str(name) for name in inputs], Reading(**reading))
    return [(record.line, record.problem or record.text) for record in records]


def test_text_lines(folder):
    Path("in").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x0b\xe2\x80\xa8\rstill\n\n \nbad\xff\nlast")
    assert texts_of(["in"]) == [
        (1, "one"),
        (2, "two\x0b\u2028\rstill"),
        (3, "has an empty text"),
        (4, "has an empty text"),
        (5, "is not UTF-8 (byte 0xff at byte 4)"),
        (6, "last"),
    ]
    assert [text for _, text in texts_of(["in"], allow_empty=True)][2:4] == ["", " "]


def test_jsonl_lines(folder):
    lines = ['{"text": "a", "x": 1}', "{", "", "[1]", '{"x": 1}', '{"text": null}', '{"text": ""}']
    lines += ['{"text": "\\ud800"}', "[" * 100_000, '{"text": "caf\\u00e9"}']
    write_texts("in.jsonl", lines)
    got = texts_of(["in.jsonl"])
    assert got[0] == (1, "a") and got[9] == (10, "café")
    for (_, problem), part in zip(
        got[1:9],
        ["not JSON", "is empty", "a JSON list", "no field 'text'", "NoneType", "empty text", "surrogate", "not JSON"],
        strict=True,
    ):
        assert part in problem, (part, problem)


def test_csv_lines(folder):
    Path("in.csv").write_bytes(
        b'id,text\n1,"one, ""quoted"""\n2,"two\nlines"\n3\n\n4,"x" y\n5,\xff\n6,caf\xc3\xa9\n7,"open\n8,never closed\n'
    )
    got = texts_of(["in.csv"])
    assert [line for line, _ in got] == [2, 3, 5, 6, 7, 8, 9, 10]
    assert got[0][1] == 'one, "quoted"' and got[1][1] == "two\nlines" and got[6 - 0][1] == "café"
    for index, part in {
        2: "has 1 fields; the header line names 2",
        3: "is empty",
        4: "no csv",
        5: "UTF-8",
        7: "no csv",
    }.items():
        assert part in got[index][1], (index, got[index])


def test_a_suffix_that_is_not_known_is_refused(folder):
    Path("in.log").write_text('["a"]\n')
    with pytest.raises(InputError, match=r"in\.log: the suffix '\.log' is none of \.txt, \.md"):
        Records(["in.log"])
    assert texts_of(["in.log"], format="text") == [(1, '["a"]')]
    with pytest.raises(
        InputError, match=r"in\.log: the format is 'xml'; it must be one of text, jsonl, json, csv, parquet"
    ):
        texts_of(["in.log"], format="xml")


def test_csv_columns(folder):
    Path("in.tsv").write_text('a\t"b\n')
    assert texts_of(["in.tsv"], header=False, column="2", quoted=False) == [(1, '"b')]
    Path("in.csv").write_text("2;text\nx;y\n")
    assert texts_of(["in.csv"], column="2", delimiter=";") == [(2, "x")]  # a name goes before a number
    assert texts_of(["in.csv"], column="1", delimiter=";") == [(2, "x")]
    with pytest.raises(ValueError, match=r"in\.csv:1: no column 'body'; there are '2', 'text'"):
        texts_of(["in.csv"], column="body", delimiter=";")
    with pytest.raises(ValueError, match="without a header line, the column is a number"):
        texts_of(["in.csv"], header=False)
    Path("empty.csv").write_text("")
    assert texts_of(["empty.csv"]) == []


def test_records_of_json_and_parquet(folder):
    Path("in.json").write_text('[\n {"text": "one"},\n {"text": 2},\n {"text": "three"}]')
    assert texts_of(["in.json"]) == [(2, "one"), (3, "has a field 'text' of type int, not a string"), (4, "three")]
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["one", None, "three"]}), "in.parquet", row_group_size=2)
    assert texts_of(["in.parquet"]) == [(1, "one"), (2, "has an empty text"), (3, "three")]
    with pytest.raises(InputError, match=r"in\.parquet: column 'n' is of type int64, not string"):
        Records(["in.parquet"], Reading(column="n"))


def test_quotes_in_tsv_are_characters(folder):
    Path("in.tsv").write_text('id\ttext\n1\t"Alien\n2\tred\n3\t"x" y\n')
    assert texts_of(["in.tsv"]) == [(2, '"Alien'), (3, "red"), (4, '"x" y')]
    Path("in.tsv").write_text("text\n" + "a\n" * 40000 + 'b\tc"\n' + "d\n")  # past the bytes that are looked at
    assert texts_of(["in.tsv"])[-2:] == [
        (40002, "has 2 fields; the header line names 1; if fields stand in quotes, give --quoted"),
        (40003, "d"),
    ]


def test_the_hash_is_of_what_records_came_from(folder):
    write_texts("a.txt", ["one", "two"])
    write_texts("empty.txt", [])
    records = Records(["a.txt", "empty.txt"])
    seen = [records.digest() for _ in records]
    assert len(set(seen)) == 2 and records.digest() == seen[-1]  # an empty file after it adds nothing


def test_a_line_without_end_is_bad_and_not_held(folder, monkeypatch):
    monkeypatch.setattr("fastbert.inference.input_files.MAX_LINE", 1 << 20)
    Path("in").write_bytes(b"one\n" + b"x" * (3 << 20) + b"\n" + b"y" * (1 << 20) + b"\nthree\n")
    got = texts_of(["in"])
    assert got[0] == (1, "one") and got[1] == (2, "is longer than 1 MiB") and got[3] == (4, "three")
    assert len(got[2][1]) == 1 << 20


def test_windows_are_bounded():
    records = [Record(0, i, "x" * (i % 5)) for i in range(20)]
    split = list(windows(records, size=8, chars=10))
    assert [record for window in split for record in window] == records
    assert [len(window) for window in split] == [5, 5, 5, 5]
    assert [len(window) for window in windows(records, size=8)] == [8, 8, 4]
