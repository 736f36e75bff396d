"""`fastbert embed --id-column`: ids of the input next to the vectors."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbert.cli.main import main
from fastbert.inference.output import FileOutput, Progress, make_format
from fastbert.inference.records import InputError, Reading, Record, Records


def ids_of(path, **options):
    return [r.problem or r.id for r in Records([str(path)], Reading(id_column="n", **options))]


def test_ids_of_each_format(tmp_path):
    (tmp_path / "a.csv").write_text("n,text\nx1,one\nx2,two\n")
    (tmp_path / "a.jsonl").write_text('{"n": 7, "text": "one"}\n{"n": "b", "text": "two"}\n{"n": null, "text": "c"}\n')
    (tmp_path / "a.json").write_text('[{"n": 7, "text": "one"}, {"text": "two"}]')
    pq.write_table(pa.table({"text": ["one", "two"], "n": [3, 4]}), tmp_path / "a.parquet")
    missing = "has None for an id in 'n', not a string or a whole number"
    assert ids_of(tmp_path / "a.csv") == ["x1", "x2"]
    assert ids_of(tmp_path / "a.jsonl") == [7, "b", missing]
    assert ids_of(tmp_path / "a.json") == [7, missing]
    assert ids_of(tmp_path / "a.parquet") == [3, 4]
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"a\.txt: a text file has no column 'n' of ids"):
        ids_of(tmp_path / "a.txt")
    (tmp_path / "b.csv").write_text("text,m\none,1\n")
    with pytest.raises(InputError, match=r"b\.csv:1: no column 'n'; there are 'text', 'm'"):
        ids_of(tmp_path / "b.csv")
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: no column 'n'; there are 'text'"):
        ids_of(tmp_path / "b.parquet")


@pytest.mark.parametrize("name, ids", [("jsonl", ["é", 5, "c"]), ("parquet", ["é", "5", "c"])])
def test_ids_stand_next_to_their_vectors_and_skipped_lines_have_none(tmp_path, name, ids, monkeypatch):
    monkeypatch.setattr("fastbert.inference.output.ROW_GROUP", 2)
    out = tmp_path / f"o.{name}"
    windows = [
        [Record(0, 1, "a", id="é"), Record(0, 2, "", "is bad")],
        [Record(0, 3, "b", id=5)],
        [Record(0, 4, "c", id="c")],
    ]
    output = FileOutput(out, make_format(name, 2, ["in"], ids=True), {})
    for i, window in enumerate(windows):
        output.append(window, np.full((len(window), 2), i, dtype=np.float32), Progress())
    output.finish(Progress(records=4))
    if name == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        table = pq.read_table(out)
        assert table.column_names == ["line", "id", "embedding"]
        rows = table.to_pylist()
    assert [row["id"] for row in rows] == ids
    assert [(row["line"], row["embedding"]) for row in rows] == [(1, [0, 0]), (3, [1, 1]), (4, [2, 2])]


def test_a_npy_file_has_no_room_for_ids(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["embed", "model", str(tmp_path / "a.csv"), "--id-column", "n", "-o", str(tmp_path / "o.npy")])
    assert stop.value.code == 2 and "--id-column: a .npy file has no room for ids" in capsys.readouterr().err
