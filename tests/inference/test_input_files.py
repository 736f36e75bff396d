"""The readers of input files that all commands share."""

import gzip
import io
import lzma
import re

import pyarrow as pa
import pytest

from fastbert.inference.input_files import (
    CsvRows,
    Form,
    InputError,
    Lines,
    RecordProblem,
    format_by_suffix,
    json_values,
    open_input,
    read_text,
)

TEXT = b"one\ntwo\n"


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def rows_of(tmp_path, name, text, **options):
    """(line, row or problem) of each row."""
    (tmp_path / name).write_bytes(text.encode())
    got = []
    with open_input(tmp_path / name) as stream:
        lines = Lines(stream)
        rows = CsvRows(tmp_path / name, lines, Form(**options))
        while True:
            line = lines.number + 1
            try:
                row = next(rows)
            except RecordProblem as problem:
                row = str(problem)
            except StopIteration:
                return got
            got.append((line, row))


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_compressed_files(tmp_path, suffix, compress):
    path = tmp_path / f"a.txt{suffix}"
    data = TEXT * 500_000  # several buffers
    path.write_bytes(compress(data))
    with open_input(path) as stream:
        assert stream.read() == data
    assert format_by_suffix(path, {".txt": "text"}) == "text"
    path.write_bytes(TEXT)
    with pytest.raises(InputError, match=re.escape(f"{path} is damaged or no ")):
        read_text(path)
    (tmp_path / "b.txt").write_bytes(compress(data))
    with pytest.raises(InputError, match=rf"b\.txt holds .* data \(suffix \{suffix}\)"):
        read_text(tmp_path / "b.txt")


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_a_compressed_file_that_was_cut(tmp_path, suffix, compress):
    data = bytes(range(32, 127)) * 20_000
    path = tmp_path / f"a.txt{suffix}"
    whole = compress(data)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=re.escape(f"{path} is damaged")):
        read_text(path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"PK\x03\x04abc", "holds a zip archive"),
        (b"PAR1abc", "holds a parquet file"),
        ("text\n".encode("utf-16"), "holds UTF-16 text; convert it to UTF-8"),
        ("text\n".encode("utf-16-le"), "holds UTF-16 text"),
        ("text\n".encode("utf-16-be"), "holds UTF-16 text"),
        (b"one\rtwo\r", "has lines that end in carriage returns alone"),
    ],
)
def test_foreign_bytes_are_named(tmp_path, data, message):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.csv {message}"):
        read_text(tmp_path / "a.csv")


def test_text_that_is_not_foreign(tmp_path):
    for data in (b"", b"one\r", b"one\r\ntwo", b"PKs\n", "é".encode()):
        (tmp_path / "a.txt").write_bytes(data)
        assert read_text(tmp_path / "a.txt") == data.decode().replace("\r\n", "\n")


def test_suffixes():
    formats = {".csv": "csv", ".txt": "text"}
    assert [format_by_suffix(name, formats) for name in ("A.CSV", "a.csv.GZ", "pipe", "a.gz")] == [
        "csv",
        "csv",
        "text",
        "text",
    ]
    for name in ("a.pdf", "a.pdf.gz"):
        with pytest.raises(InputError, match=rf"{name}: the suffix '\.pdf' is none of \.csv, \.txt .* --input-format"):
            format_by_suffix(name, formats)
    with pytest.raises(InputError, match="the suffix '' is none of"):
        format_by_suffix("pipe", {".csv": "csv"})


def test_a_reader_continues_after_a_problem(tmp_path):
    text = 'n, text\n1,"a""b"\n\n2\n3,"x" y\n4,c,d\n5,e\n'
    assert rows_of(tmp_path, "a.csv", text) == [
        (2, ["1", 'a"b']),
        (3, []),
        (4, "has 1 fields; the header line names 2"),
        (5, "is no csv: ',' expected after '\"'"),
        (6, "has 3 fields; the header line names 2"),
        (7, ["5", "e"]),
    ]


def test_names_are_stripped_and_not_doubled(tmp_path):
    (tmp_path / "a.csv").write_text(" a , b\n1,2\n")
    with open_input(tmp_path / "a.csv") as stream:
        rows = CsvRows(tmp_path / "a.csv", Lines(stream), Form())
        assert rows.names == ["a", "b"] and rows.column("b") == rows.column("2") == 1
    with pytest.raises(InputError, match=r"a\.csv:1: the header line names 'a' twice; .* --no-header"):
        rows_of(tmp_path, "a.csv", "a,b,a \n")


@pytest.mark.parametrize(
    "text",
    [
        '"text"\t"label"\na\tb\n',  # the header line
        'text\tlabel\n"one\ttwo"\tx\n',  # a tab in quotes
        'text\tlabel\na\tb\n"one\ntwo"\tx\n',  # a line end in quotes
        'text\tlabel\n"say ""hi"""\tx\n',  # quotes doubled
        'text\tlabel\n"one\ntwo"\tx\n' + "a\tb\n" * 30_000,  # longer than what is looked at
    ],
)
def test_a_tsv_written_with_quotes_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"a\.tsv looks written with fields in quotes: give --quoted, or --unquoted"):
        rows_of(tmp_path, "a.tsv", text)
    quoted = rows_of(tmp_path, "a.tsv", text, quoted=True)
    assert all(len(row) == 2 and '"' not in row[0].replace('"hi"', "") for _, row in quoted)
    assert isinstance(rows_of(tmp_path, "a.tsv", text, quoted=False), list)


@pytest.mark.parametrize(
    "text, rows",
    [
        ('text\tlabel\n"Alien\tx\nb"\ty\n', [['"Alien', "x"], ['b"', "y"]]),  # quoted reading would merge the rows
        ('text\tlabel\n"Alien" came\tx\n', [['"Alien" came', "x"]]),
        ('text\tlabel\n"Alien"\tx\n', [['"Alien"', "x"]]),
        ('text\tlabel\n5" pipe\tx\n', [['5" pipe', "x"]]),
    ],
)
def test_quotes_in_a_tsv_are_characters(tmp_path, text, rows):
    assert [row for _, row in rows_of(tmp_path, "a.tsv", text)] == rows


@pytest.mark.parametrize(
    "text, option",
    [
        ("text\tlabel\na\tb\n", r"separated by tabs: give --delimiter '\\t'"),
        ("text;label\na;b\n", r"separated by semicolons: give --delimiter ';'"),
        ("a fine film,1\na dull one,0\n", "if line 1 names no columns, give --no-header and the column's number"),
    ],
)
def test_a_column_that_is_missing_names_the_option(tmp_path, text, option):
    (tmp_path / "a.csv").write_text(text)
    with open_input(tmp_path / "a.csv") as stream:
        rows = CsvRows(tmp_path / "a.csv", Lines(stream), Form())
        with pytest.raises(InputError, match=rf"a\.csv:1: no column 'text'; there are .*; .*{option}"):
            rows.column("text")
        if len(rows.names) == 1:  # a number must not take the whole line for a text
            with pytest.raises(InputError, match=option):
                rows.column("1")


def test_json_lists_and_objects_that_follow_one_another():
    assert list(json_values("f", '\n[{"a": 1},\n\n 2 , "x,]"]\n')) == [(2, {"a": 1}), (4, 2), (4, "x,]")]
    assert list(json_values("f", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert list(json_values("f", " [ ] ")) == [] == list(json_values("f", ""))
    for text, message in (
        ("[1,\n2 3]", "f:2: the JSON list does not go on"),
        ("[1, 2", "f:1: the JSON list does not go on"),
        ("[1, ", "the JSON list does not end where the file does"),
        ("[1] 2", "the JSON list does not end where the file does"),
        ('[1,\n{"a"}]', "f:2: is not JSON"),
        ("[1,\n2,\n]", "f:3: the JSON list ends with a comma"),
    ):
        with pytest.raises(InputError, match=message):
            list(json_values("f", text))


def test_a_long_line_is_a_problem_and_the_next_line_is_read():
    lines = Lines(io.BytesIO(b"a" * ((1 << 24) + 2) + b"\nb\n"))
    with pytest.raises(RecordProblem, match="is longer than 16 MiB"):
        next(lines)
    assert next(lines) == "b\n" and lines.number == 2
