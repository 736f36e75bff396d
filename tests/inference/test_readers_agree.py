"""embed, prepare and finetune read one file alike: the same texts, and the same complaint of the same line."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbert.inference.input_files import InputError
from fastbert.inference.records import Reading as EmbedReading
from fastbert.inference.records import Records
from fastbert.training.documents import DocumentReading, cut, documents, find_files
from fastbert.training.finetune.examples import Reading as FinetuneReading
from fastbert.training.finetune.examples import read_texts


def embed(path, **options):
    records = Records([str(path)], EmbedReading(**options))
    return [f"{records.where(r)}: {r.problem}" if r.problem else r.text for r in records]


def prepare(path, **options):
    reading = DocumentReading(separator="line", **options)
    found = [
        d for file in find_files([path], reading) for piece in cut(file, reading, 64) for d in documents(piece, reading)
    ]
    return [f"{d.where()}: {d.problem}" if d.problem else d.text for d in found]


def finetune(path, column="text", **options):
    label = "2" if options.get("header") is False else "label"
    return [example.text for example in read_texts(path, FinetuneReading(text=column, label=label, **options))]


def outcome(read, path, **options):
    """Texts, or the first complaint, whether it is of a record or of the file."""
    try:
        found = read(path, **options)
    except InputError as error:
        return str(error)
    return next((text for text in found if text.startswith(f"{path}:")), found)


GOOD = {
    "plain.csv": b'text,label\na,x\n"b, c",y\n',
    "bom.csv": b"\xef\xbb\xbftext,label\na,x\n",
    "crlf.csv": b'text,label\r\na,x\r\n"two\r\nlines",y\r\n',
    "spaces.csv": b" text , label\na,x\n",
    "control.csv": "text,label\na\x0bb\u2028c\x00,x\n".encode(),
    "upper.CSV": b"text,label\na,x\n",
    "quote.tsv": b'text\tlabel\n"a\tx\nb"\ty\n',
    "packed.csv.gz": gzip.compress(b"text,label\na,x\n"),
    "lines.jsonl": b'{"text":"a","label":"x"}\n{"text":"b","text":"c","label":"y"}\n',
    "bom.jsonl": b'\xef\xbb\xbf{"text":"a","label":"x"}\n',
    "list.json": b'[{"text":"a","label":"x"},\n{"text":"b","label":"y"}]',
    "objects.json": b'{"text":"a","label":"x"}\n{"text":"b","label":"y"}',
}
BAD = {
    "returns.csv": b"text,label\ra,x\rb,y\r",
    "semicolons.csv": b"text;label\na;x\n",
    "tabs.csv": b"text\tlabel\na\tx\n",
    "bars.csv": b"text|label\na|x\n",
    "nohead.csv": b"a,x\nb,y\n",
    "surplus.csv": b"text,label\nb,y\na,x,z\n",
    "short.csv": b"text,label\na\nb,y\n",
    "twice.csv": b"text,label,text\na,x,z\n",
    "quoted.tsv": b'"text"\t"label"\n"a"\t"x"\n',
    "open.csv": b'text,label\n"a,x\nb,y\n',
    "latin.csv": "text,label\né,x\n".encode("latin1"),
    "latin.jsonl": '{"text":"é","label":"x"}\n'.encode("latin1"),
    "latin.json": '[{"text":"é","label":"x"}]'.encode("latin1"),
    "utf16.csv": "text,label\na,x\n".encode("utf-16"),
    "utf16le.csv": "text,label\na,x\n".encode("utf-16-le"),
    "gzip.csv": gzip.compress(b"text,label\na,x\n"),
    "plain.csv.gz": b"text,label\na,x\n",
    "cut.csv.gz": gzip.compress(b"text,label\na,x\n")[:-3],
    "blank.jsonl": b'{"text":"a","label":"x"}\n\n{"text":"b","label":"y"}\n',
    "broken.jsonl": b'{"text":"a","label":"x"}\n{"text":\n',
    "list.jsonl": b'[{"text":"a","label":"x"}]\n',
    "escape.jsonl": b'{"text":"a","label":"x","more":["\\udc00"]}\n',
    "blank-header.csv": b"\ntext,label\na,x\n",
    "deep.jsonl": b"[" * 200_000 + b"\n",
    "broken.json": b'[{"text":"a","label":"x"}',
    "deep.json": b"[" * 200_000,
    "csv.parquet": b"text,label\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_texts(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    found = outcome(embed, tmp_path / name)
    assert isinstance(found, list) and found
    assert outcome(prepare, tmp_path / name) == outcome(finetune, tmp_path / name) == found


@pytest.mark.parametrize("name", BAD)
def test_complaints(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name])
    complaint = outcome(embed, tmp_path / name)
    assert isinstance(complaint, str) and str(tmp_path / name) in complaint
    assert outcome(prepare, tmp_path / name) == outcome(finetune, tmp_path / name) == complaint


def test_a_file_without_a_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,x\nb,y\n")
    for read in (embed, prepare, finetune):
        assert read(path, header=False, column="1") == ["a", "b"]
        assert "has 2 fields" in outcome(read, path, header=False, column="3")
        assert "without a header line, the column is a number from 1, not 'text'" in outcome(read, path, header=False)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode(), "label": ["x", "y", "x"]}), path)
    assert embed(path) == prepare(path) == finetune(path) == ["a", "b", "a"]
    pq.write_table(pa.table({"body": ["a"], "label": ["x"]}), path)
    for read in (embed, prepare, finetune):
        assert "no column 'text'; there are 'body', 'label'" in outcome(read, path)
