"""Reading documents, splitting sentences, making pairs and runs of them: without a tokenizer or a run."""

import gzip
import json
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from training_text import make_documents, write_documents

from fastbert.inference.records import InputError
from fastbert.training.documents import DocumentReading, cut, documents, find_files, group
from fastbert.training.examples import TokenizedDocuments, pairs, runs
from fastbert.training.sentences import split_sentences

# Reading


def read(path, size=1 << 20, **options):
    """The texts of a file cut into pieces of `size` bytes, problems in brackets."""
    reading = DocumentReading(**options)
    found = [document for piece in cut(path, reading, size) for document in documents(piece, reading)]
    return [f"[{d.where().removeprefix(str(path))} {d.problem}]" if d.problem else d.text for d in found]


@pytest.mark.parametrize("size", [1, 9, 1 << 20])
@pytest.mark.parametrize("separator", ["blank-line", "line"])
def test_the_line_of_a_bad_document_however_a_file_is_cut(tmp_path, size, separator):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\n \nbad \xff\n\n\n good\n\r\n\n  bad \xfe\n\ngood")
    where = [text.split()[0] for text in read(path, size, separator=separator) if text != "good"]
    assert where == ["[:3", "[:9"]


@pytest.mark.parametrize("size", [1, 7, 64, 300, 1 << 20])
def test_blank_lines_end_documents_however_a_file_is_cut(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbf\n \none\nstill one\n\ntwo\n \t\r\n\n\r\n three\r\n\r\nfour\n\n\n\n" + b"five\n" * 30 + b"\n\nsix"
    )
    assert read(path, size) == ["one\nstill one", "two", "three", "four", "\n".join(["five"] * 30), "six"]
    assert read(path, size, separator="line")[:4] == ["one", "still one", "two", "three"]
    assert len(read(path, size, separator="line")) == 36
    assert len(read(path, size, separator="file")) == 1


def test_pieces_cover_a_file_and_groups_cover_the_pieces(tmp_path):
    path = write_documents(tmp_path / "a.txt", make_documents(300))
    pieces = cut(path, DocumentReading(), 5000)
    assert len(pieces) > 10 and pieces[0].start == 0 and pieces[-1].stop == path.stat().st_size
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    for size in (1, 5000, 12_000, 1 << 30):
        groups = group(pieces, size)
        assert [piece for members in groups for piece in members] == pieces
        sizes = [sum(piece.bytes for piece in members) for members in groups]
        assert min(sizes) >= min(size, 5000) / 2 and max(sizes) <= 2 * max(size, 5000)


@pytest.mark.parametrize("size", [1, 40, 1 << 20])
def test_jsonl(tmp_path, size):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"body": f"text {i}\n\nmore"}) for i in range(9)]
    rows[2:5] = ['{"body": 3}', "{", '{"body": " "}']
    path.write_text("\n".join(rows))
    found = read(path, size, field="body")
    assert found[:2] == ["text 0\n\nmore", "text 1\n\nmore"] and len(found) == 9
    assert found[2] == "[:3 has a field 'body' of type int, not a string]"
    assert found[3].startswith("[:4 is not JSON") and found[4] == "[:5 has an empty text]"


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.table({"n": range(7), "body": [f"text {i}" for i in range(5)] + [None, ""]})
    pq.write_table(table, path, row_group_size=3)
    problems = ["[: row 3 of row group 2 has an empty text]", "[: row 1 of row group 3 has an empty text]"]
    assert read(path, column="body") == [*(f"text {i}" for i in range(5)), *problems]
    for options, message in (
        ({}, r"a.parquet: no column 'text'; there are 'n', 'body'"),
        ({"column": "n"}, r"a.parquet: column 'n' is of type int64, not string"),
    ):
        with pytest.raises(InputError, match=message):
            read(path, **options)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is no parquet file"):
        read(path, column="body")


def test_inputs(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("in/z.txt", "in/b/a.txt", "in/.hidden", "c.txt"):
        (tmp_path / name).write_text("text")
    found = find_files([tmp_path / "in", tmp_path / "c.txt"])
    assert [path.name for path in found] == ["a.txt", "z.txt", "c.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\n" * 9)
    for name, message in (
        ("gone.txt", r"gone.txt: no such file"),
        ("empty", "empty: the folder holds no files"),
        ("none.txt", "none.txt is empty"),
        ("blank.txt", "blank.txt holds white space alone"),
    ):
        with pytest.raises(InputError, match=message):
            find_files([tmp_path / "c.txt", tmp_path / name])


def test_sentences():
    text = (
        'Dr. J. Smith met Mrs. Jones at 3.15 p.m. in the U.S. Senate. "Is it so?" he asked. (It was.) Yes! '
        "Prices rose 3.5 percent, e.g. Bread... Then what?\nA new line\n\n"
        "其实不是。真的吗？是。 ¿Qué tal? ¡Bien! end. of it. Émile came."
    )
    assert split_sentences(text) == [
        "Dr. J. Smith met Mrs. Jones at 3.15 p.m. in the U.S. Senate.",
        '"Is it so?" he asked.',
        "(It was.)",
        "Yes!",
        "Prices rose 3.5 percent, e.g. Bread...",
        "Then what?",
        "A new line",
        "其实不是。",
        "真的吗？",
        "是。",
        "¿Qué tal?",
        "¡Bien! end. of it.",
        "Émile came.",
    ]
    assert split_sentences(" \n\t\n") == [] and split_sentences("a") == ["a"]


# Examples


def tokenized(lengths):
    """Documents of sentences of these lengths; each token is its own number."""
    flat = [length for document in lengths for length in document]
    sentences = np.cumsum([0, *flat]).tolist()
    return TokenizedDocuments(np.arange(sum(flat)), sentences, np.cumsum([0, *map(len, lengths)]).tolist())


def random_lengths(documents, seed=0, longest=30):
    rng = Random(seed)
    return [[rng.randint(1, longest) for _ in range(rng.randint(1, 25))] for _ in range(documents)]


@pytest.mark.parametrize(("max_length", "short"), [(5, 0.0), (40, 0.0), (40, 0.5), (200, 0.1)])
def test_pairs_by_the_rules(max_length, short):
    held = tokenized(random_lengths(300))
    document_of = np.repeat(np.arange(300), np.diff(np.array(held.sentences)[held.documents]))
    begins = set(held.sentences)
    rows = list(pairs(held, max_length, short, Random(1)))
    whole = 0
    for row in rows:
        a, b = (row.start, row.stop), (row.second_start, row.second_stop)
        assert a[1] > a[0] and b[1] > b[0] and (a[1] - a[0]) + (b[1] - b[0]) <= max_length - 3
        assert document_of[a[0]] == document_of[a[1] - 1] and document_of[b[0]] == document_of[b[1] - 1]
        assert (document_of[a[0]] != document_of[b[0]]) == bool(row.label)
        if (a[1] - a[0]) + (b[1] - b[0]) < max_length - 3:  # nothing was cut: between sentences, and in sequence
            assert begins >= {*a, *b}
            assert row.label or a[1] == b[0]
            whole += 1
        elif not row.label:
            assert a[1] <= b[0]
    assert whole > 100 or max_length == 5
    if (max_length, short) == (40, 0.0):  # all but the ends of documents
        full = [(r.stop - r.start) + (r.second_stop - r.second_start) > 33 for r in rows]
        assert np.mean(full) > 0.8


def test_pairs_leave_no_sentence_out():
    held = tokenized(random_lengths(300))
    rows = list(pairs(held, 2000, 0.0, Random(1)))  # longer than any two documents: nothing is cut off
    used = [(row.start, row.stop) for row in rows] + [
        (row.second_start, row.second_stop) for row in rows if not row.label
    ]
    # What a random second segment stands in for comes later: first segments and real second ones tile the text.
    assert sorted(used)[0][0] == 0 and max(used)[1] == len(held.tokens)
    assert all(a[1] == b[0] for a, b in pairwise(sorted(used)))
    assert 0.3 < np.mean([row.label for row in rows]) < 0.8


def test_half_of_the_pairs_are_real():
    held = tokenized([[5] * 4000] * 10)
    rows = list(pairs(held, 43, 0.0, Random(2)))
    count, labels = len(rows), [row.label for row in rows]
    assert count > 4000 and abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(count)
    for document in range(10):  # from each document, and anywhere in it
        starts = [row.second_start - 20_000 * document for row in rows if row.label]
        starts = [start for start in starts if 0 <= start < 20_000]
        assert len(starts) > 100 and min(starts) < 2000 and max(starts) > 18_000
    # A single sentence has no next one: as in BERT, another document's then.
    assert [row.label for row in pairs(tokenized([[9]] * 50), 40, 0.0, Random(2))] == [1] * 50


def test_short_pairs_are_there_where_asked():
    held = tokenized([[2] * 60] * 400)
    lengths = {
        short: [r.stop - r.start + r.second_stop - r.second_start for r in pairs(held, 103, short, Random(0))]
        for short in (0.0, 0.5)
    }
    # Of the short documents half have a target below 50.
    assert np.mean(np.array(lengths[0.5]) < 50) > np.mean(np.array(lengths[0.0]) < 50) + 0.2


@pytest.mark.parametrize(("max_length", "short"), [(5, 0.0), (40, 0.0), (40, 0.5), (500, 0.0)])
def test_runs_hold_every_token_once_and_cross_no_document(max_length, short):
    lengths = random_lengths(200, longest=60)
    held = tokenized(lengths)
    ends = {held.sentences[last] for last in held.documents}
    begins = set(held.sentences)
    rows = list(runs(held, max_length, short, Random(1)))
    assert rows[0].start == 0 and rows[-1].stop == len(held.tokens)
    for row, following in pairwise(rows):
        assert row.stop == following.start and 0 < row.stop - row.start <= max_length - 2
        assert not any(end in ends for end in range(row.start + 1, row.stop))
        if row.stop not in begins:  # a sentence is cut where it alone is too long
            assert not any(s in begins for s in range(row.start + 1, row.stop + 1))
        elif row.stop not in ends and not short:  # as much as there is room for
            sentence = held.sentences.index(row.stop)
            assert held.sentences[sentence + 1] - row.start > max_length - 2


def test_a_suffix_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "in.log"
    path.write_text("text\na\n")
    with pytest.raises(InputError, match=r"the suffix '\.log' is none of \.txt, \.md, \.jsonl, .* --input-format"):
        cut(path, DocumentReading(), 100)
    assert cut(path, DocumentReading("text"), 100)[0].format == "text"


def test_files_of_other_suffixes_in_a_folder_are_left_out_with_a_warning(tmp_path):
    for name in ("a.txt", "b.pdf", "c.csv.gz", "d.zip", "README"):
        (tmp_path / name).write_bytes(b"text\n")
    with pytest.warns(UserWarning, match=r"2 files of other suffixes are left out: \.pdf, \.zip"):
        found = find_files([tmp_path])
    assert [path.name for path in found] == ["README", "a.txt", "c.csv.gz"]
    assert len(find_files([tmp_path], DocumentReading("text"))) == 5
    assert find_files([tmp_path / "b.pdf"]) == [tmp_path / "b.pdf"]  # a named one is refused when it is cut
    (tmp_path / "pdf").mkdir()
    (tmp_path / "pdf" / "e.pdf").write_bytes(b"text\n")
    with pytest.raises(InputError, match=r"pdf: the folder holds no file of a suffix among \.txt"):
        find_files([tmp_path / "pdf"])


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_csv_and_json_documents(tmp_path, size):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"one\n\nstill one"\n2\n\n3,  \n4, four\n')
    assert read(path, size) == [
        "one\n\nstill one",
        "[:5 has 1 fields; the header line names 2]",
        "[:7 has an empty text]",
        "four",
    ]
    assert read(path, size, column="1")[-1] == "4"
    with pytest.raises(InputError, match=r"a\.csv:1: no column 'body'; there are 'id', 'text'"):
        read(path, size, column="body")
    path = tmp_path / "a.tsv"
    path.write_text('text\n"one" two\n"three\n')
    assert read(path, size) == ['"one" two', '"three']
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"},\n {"text": 2}]')
    assert read(path, size) == ["one", "[:2 has a field 'text' of type int, not a string]"]


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_compressed_file_holds_the_documents_of_the_file(tmp_path, size):
    data = b"\xef\xbb\xbfone\nmore\n\ntwo\n\nbad \xff\n\nthree\n"
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data))
    plain, compressed = (read(tmp_path / name, size) for name in ("a.txt", "a.txt.gz"))
    assert plain == compressed and plain[2].startswith("[:6 is not UTF-8") and len(plain) == 4
    (tmp_path / "b.txt").write_bytes(gzip.compress(data))
    with pytest.raises(InputError, match=r"b\.txt holds gzip data"):
        read(tmp_path / "b.txt", size)
