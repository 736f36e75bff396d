"""Parts of parquet files: the rows once, in order, with the bits of the library; what is there is kept."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import require_native
from tasks_support import labels, make_texts, save
from tiny_bert import save_tiny

from fastbert import light
from fastbert.integrations.parquet import EmbedWorker, PredictWorker, RerankWorker, clear_partial, parts_of
from fastbert.tasks.names import task_of
from fastbert.tasks.predict import PREDICTED, Predicting, answered, prepared_inputs
from fastbert.tasks.rows import TaskReading

TEXTS = [text for text in make_texts(60, longest=12) if text.strip() and len(text) < 60]
LOAD = {"device": "cpu"}
OWN = {"reading": TaskReading(), "prefix": "embedding", "skip_bad": False, "load": LOAD}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    require_native()
    folder, kind = tmp_path_factory.mktemp("models"), "ForSequenceClassification"
    several = {"problem_type": "multi_label_classification", **labels("a", "b")}
    return {
        "vectors": str(save_tiny(folder / "vectors")),
        "classes": save(folder / "classes", "bert", kind, **labels("bad", "good", "neither")),
        "several": save(folder / "several", "bert", kind, **several),
        "number": save(folder / "number", "bert", kind, problem_type="regression", num_labels=1),
        "tags": save(folder / "tags", "bert", "ForTokenClassification", **labels("O", "B-PER", "I-PER")),
        "answers": save(folder / "answers", "bert", "ForQuestionAnswering"),
        "choices": save(folder / "choices", "bert", "ForMultipleChoice"),
        "ranks": save(folder / "ranks", "bert", kind, num_labels=1),
    }


def source(folder, rows=200, files=3, **columns):
    """Files of rows with ids, of 16 in a row group, and the texts."""
    texts = [TEXTS[i % len(TEXTS)] for i in range(rows)]
    table = pa.table({"id": range(rows), "text": texts, **columns})
    folder.mkdir()
    each = -(-rows // files)
    for k in range(files):
        pq.write_table(table.slice(k * each, each), folder / f"{k}.parquet", row_group_size=16)
    return folder, texts


def run(worker, folder, target, part_rows=40):
    kept = [worker.write(part) for part in parts_of(folder, target, part_rows)]
    clear_partial(target)
    assert all(not path.name.startswith(".") for path in target.iterdir())
    return kept, pa.concat_tables([pq.read_table(file) for file in sorted(target.glob("*.parquet"))])


@pytest.mark.parametrize(("quantize", "precision"), [(None, "float32"), ("int8", "float32"), (None, "ubinary")])
def test_embed(models, tmp_path, quantize, precision):
    folder, texts = source(tmp_path / "a folder with spaces")
    load = {**LOAD, "quantize": quantize, "cache": str(tmp_path / "packed")}
    worker = EmbedWorker(models["vectors"], prompt_name=None, precision=precision, **{**OWN, "load": load})
    kept, found = run(worker, folder, tmp_path / "out")
    assert kept == [False] * 6  # 67, 67 and 66 rows in parts of 48 and what is left
    assert found["id"].to_pylist() == list(range(200)) and found["text"].to_pylist() == texts
    expected = light.TextEmbedder.from_pretrained(models["vectors"], quantize=quantize).embed(
        texts, precision=precision
    )
    assert np.array_equal(np.array(found["embedding"].to_pylist(), expected.dtype), expected)


def test_what_is_there_is_kept(models, tmp_path):
    folder, _ = source(tmp_path / "in")
    worker = EmbedWorker(models["vectors"], prompt_name=None, precision="float32", **OWN)
    _, found = run(worker, folder, tmp_path / "out")
    (tmp_path / "out" / "000002.parquet").unlink()
    (tmp_path / "out" / f".000002-{0:032}.parquet").write_bytes(b"what a killed worker had written")
    kept, again = run(worker, folder, tmp_path / "out")
    assert kept == [True, True, False, True, True, True] and again.equals(found)
    other = EmbedWorker(models["vectors"], prompt_name=None, precision="float32", **{**OWN, "prefix": "vector"})
    kept, renamed = run(other, folder, tmp_path / "out")  # other settings: made again
    assert not any(kept) and renamed.column_names == ["id", "text", "vector"]
    os.utime(folder / "1.parquet", (1, 1))  # written again
    assert run(other, folder, tmp_path / "out")[0] == [True, True, False, False, True, True]
    (tmp_path / "out" / "more.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"more\.parquet, which is no part of this run"):
        parts_of(folder, tmp_path / "out", 40)


def test_files_of_others_are_not_touched(models, tmp_path):
    folder, _ = source(tmp_path / "in", files=1)
    (folder / "0.parquet").rename(folder / "000000.parquet")
    for target in (folder, tmp_path / "copy"):  # in place; a file that happens to have a part's name
        if target != folder:
            shutil.copytree(folder, target)
        before = (target / "000000.parquet").read_bytes()
        with pytest.raises(ValueError, match=r"000000\.parquet, which is no part of this run"):
            parts_of(folder, target, 40)
        assert (target / "000000.parquet").read_bytes() == before
    worker = EmbedWorker(models["vectors"], prompt_name=None, precision="float32", **OWN)
    run(worker, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="which is no part of this run"):  # a chain in place
        parts_of(tmp_path / "out", tmp_path / "out", 40)


KINDS = {
    "classes": ({}, Predicting(top_k=2)),
    "several": ({}, Predicting(top_k=1)),
    "number": ({}, Predicting(prefix="grade")),
    "tags": ({}, Predicting(threshold=0.1)),
    "answers": ({"question": "other", "context": "text"}, Predicting(top_k=2, threshold=0.3)),
    "choices": ({"choices": ("text", "other")}, Predicting()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_predict(models, tmp_path, kind):
    reading, predicting = TaskReading(**KINDS[kind][0]), KINDS[kind][1]
    others = [" ".join(TEXTS[(11 * i + 1) % len(TEXTS)].split()[:2]) for i in range(50)]
    folder, texts = source(tmp_path / "in", rows=50, files=2, other=others)
    task = task_of(models[kind])
    worker = PredictWorker(models[kind], task, predicting, LOAD, reading=reading, skip_bad=False)
    _, found = run(worker, folder, tmp_path / "out")
    assert task in PREDICTED
    pipeline = light.pipeline(task, models[kind])
    pairs = list(zip(texts, others, strict=True))
    inputs = {
        "answers": [{"question": other, "context": text} for text, other in pairs],
        "choices": [{"text": text, "choices": [text, other]} for text, other in pairs],
    }.get(kind, texts)
    rows = dict(answered(pipeline, prepared_inputs(pipeline, inputs, predicting), predicting))
    for i, row in enumerate(found.to_pylist()):
        own = {f"{predicting.prefix}_{name}".rstrip("_"): value for name, value in rows[i].items()}
        if "prediction_top" in row and kind == "answers":  # a struct has all fields of all rows
            own["prediction_top"] = [{k: one.get(k) for k in row["prediction_top"][0]} for one in own["prediction_top"]]
        assert row == {"id": i, "text": texts[i], "other": others[i], **own}


def test_rerank(models, tmp_path):
    documents = [TEXTS[(7 * i) % len(TEXTS)] for i in range(60)]
    folder, texts = source(tmp_path / "in", rows=60, document=documents)
    reading = TaskReading(text="text", pair="document")
    _, found = run(RerankWorker(models["ranks"], **{**OWN, "reading": reading}), folder, tmp_path / "out")
    expected = light.CrossEncoder.from_pretrained(models["ranks"])(list(zip(texts, documents, strict=True)))
    assert found["embedding"].to_pylist() == expected


def test_other_settings_make_other_parts(models):
    def digest(**load):
        return RerankWorker(models["ranks"], **{**OWN, "load": {**LOAD, **load}}).digest

    assert digest() == digest() and len({digest(), digest(truncation=True), digest(quantize="int8")}) == 3


def test_bad_rows(models, tmp_path):
    pq.write_table(pa.table({"id": [0, 1, 2], "text": ["a cat", None, " "]}), tmp_path / "in.parquet")

    def worker(**changed):
        return EmbedWorker(models["vectors"], prompt_name=None, precision="float32", **{**OWN, **changed})

    _, found = run(worker(skip_bad=True), tmp_path / "in.parquet", tmp_path / "out")
    expected = light.TextEmbedder.from_pretrained(models["vectors"]).embed(["a cat"])
    assert found["embedding"].is_null().to_pylist() == [False, True, True]
    assert np.array_equal(np.array(found["embedding"][0].as_py(), np.float32), expected[0])
    tagging = PredictWorker(
        models["tags"], "token-classification", Predicting(), LOAD, reading=TaskReading(), skip_bad=True
    )
    assert tagging.extended(pa.table({"text": ["", None]}))["prediction"].to_pylist() == [None, None]
    for changed, message in (
        ({}, r"in.parquet: row 2 has an empty text; with skip_bad it gets null"),
        ({"reading": TaskReading(text="body")}, "in.parquet: no column 'body'; there are 'id', 'text'"),
        ({"prefix": "id"}, "in.parquet: there is a column 'id' already"),
    ):
        with pytest.raises(ValueError, match=message):
            run(worker(**changed), tmp_path / "in.parquet", tmp_path / "other")
        assert not list((tmp_path / "other").iterdir())
    with pytest.raises(FileNotFoundError, match="source: there is no"):
        parts_of(tmp_path / "missing", tmp_path / "other", 10)
    with pytest.raises(ValueError, match="it has no rows"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
        parts_of(tmp_path / "none.parquet", tmp_path / "other", 10)
