"""Ray Data and Ray Serve, on two local workers: the same rows, order and bits as the library alone."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import require_native
from tasks_support import labels, make_texts, save
from tiny_bert import save_tiny

import fastbert
from fastbert import light
from fastbert.tasks.predict import PREDICTED, Predicting, answered, prepared_inputs
from fastbert.tasks.rows import TaskReading

ray = pytest.importorskip("ray")
from fastbert.integrations import ray as on_ray  # noqa: E402

TEXTS = [text for text in make_texts(60, longest=12) if text.strip()]
ROWS = 600


@pytest.fixture(scope="module", autouse=True)
def cluster():
    require_native()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    return {
        "vectors": save_tiny(folder / "vectors"),
        "classes": save(folder / "classes", "bert", "ForSequenceClassification", **labels("bad", "good", "neither")),
        "tags": save(folder / "tags", "bert", "ForTokenClassification", **labels("O", "B-PER", "I-PER")),
        "answers": save(folder / "answers", "bert", "ForQuestionAnswering"),
        "ranks": save(folder / "ranks", "bert", "ForSequenceClassification", num_labels=1),
        "several": save(
            folder / "several",
            "bert",
            "ForSequenceClassification",
            problem_type="multi_label_classification",
            **labels("a", "b"),
        ),
        "number": save(folder / "number", "bert", "ForSequenceClassification", problem_type="regression", num_labels=1),
        "choices": save(folder / "choices", "bert", "ForMultipleChoice"),
    }


def written(folder, rows=ROWS, files=6, **columns):
    """Parquet files of rows with ids, in the order of their names."""
    texts = [TEXTS[i % len(TEXTS)] for i in range(rows)]
    table = pa.table({"id": range(rows), "text": texts, **columns})
    folder.mkdir()
    for k in range(files):
        pq.write_table(
            table.slice(k * rows // files, (k + 1) * rows // files - k * rows // files), folder / f"{k}.parquet"
        )
    return ray.data.read_parquet(str(folder)), texts


def read(folder):
    return pa.concat_tables([pq.read_table(file) for file in sorted(Path(folder).glob("*.parquet"))])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_embed(models, tmp_path, quantize):
    dataset, texts = written(tmp_path / "in")
    load = {"quantize": quantize, "cache": str(tmp_path / "packed")}
    on_ray.embed(dataset, models["vectors"], workers=2, batch_size=64, load=load).write_parquet(str(tmp_path / "out"))
    found = read(tmp_path / "out")
    assert found["id"].to_pylist() == list(range(ROWS)) and found["text"].to_pylist() == texts
    assert found.column_names == ["id", "text", "embedding"]
    expected = light.TextEmbedder.from_pretrained(models["vectors"], quantize=quantize).embed(texts)
    assert np.array_equal(np.array(found["embedding"].to_pylist(), np.float32), expected)


def test_a_worker_is_killed(models, tmp_path):
    dataset, texts = written(tmp_path / "in", rows=4000, files=8)
    killed = []

    def kill():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            for status in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if b"ray::MapWorker" in status.read_bytes() and (tmp_path / "begun").exists():
                        os.kill(int(status.parent.name), signal.SIGKILL)
                        killed.append(int(status.parent.name))
                        return
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.01)

    def mark(table):  # when the workers have had a part of the rows
        if table["id"][0].as_py() >= 500:
            (tmp_path / "begun").touch()
        return table

    killer = threading.Thread(target=kill)
    killer.start()
    made = on_ray.embed(dataset, models["vectors"], workers=2, batch_size=16)
    made.map_batches(mark, batch_format="pyarrow", batch_size=16, num_cpus=0).write_parquet(str(tmp_path / "out"))
    killer.join()
    assert killed
    found = read(tmp_path / "out")
    assert found["id"].to_pylist() == list(range(4000)) and found["text"].to_pylist() == texts
    expected = light.TextEmbedder.from_pretrained(models["vectors"]).embed(texts)
    assert np.array_equal(np.array(found["embedding"].to_pylist(), np.float32), expected)


def test_rerank(models, tmp_path):
    documents = [TEXTS[(7 * i) % len(TEXTS)] for i in range(ROWS)]
    dataset, texts = written(tmp_path / "in", document=documents)
    found = on_ray.rerank(dataset, models["ranks"], query="text", workers=2).take_all()
    expected = light.CrossEncoder.from_pretrained(models["ranks"])(list(zip(texts, documents, strict=True)))
    assert [row["id"] for row in found] == list(range(ROWS))
    assert [row["score"] for row in found] == expected


KINDS = {
    "classes": ({}, Predicting(top_k=2)),
    "several": ({}, Predicting()),
    "number": ({}, Predicting(prefix="grade")),
    "tags": ({}, Predicting(threshold=0.1)),
    "answers": ({"question": "text", "context": "other"}, Predicting(top_k=2)),
    "choices": ({"choices": ("text", "other")}, Predicting()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_predict(models, tmp_path, kind):
    reading, predicting = TaskReading(**KINDS[kind][0]), KINDS[kind][1]
    others = [TEXTS[(11 * i + 1) % len(TEXTS)] for i in range(50)]
    dataset, texts = written(tmp_path / "in", rows=50, files=2, other=others)
    made = on_ray.predict(dataset, models[kind], reading=reading, predicting=predicting, workers=2, batch_size=16)
    made.write_parquet(str(tmp_path / "out"))
    found = read(tmp_path / "out").to_pylist()
    pipeline = light.pipeline(fastbert.tasks.names.task_of(models[kind]), models[kind])
    assert pipeline.task in PREDICTED
    inputs = {
        "answers": [{"question": t, "context": o} for t, o in zip(texts, others, strict=True)],
        "choices": [{"text": t, "choices": [t, o]} for t, o in zip(texts, others, strict=True)],
    }.get(kind, texts)
    rows = dict(answered(pipeline, prepared_inputs(pipeline, inputs, predicting), predicting))
    for i, row in enumerate(found):
        own = {f"{predicting.prefix}_{name}".rstrip("_"): value for name, value in rows[i].items()}
        assert row == {"id": i, "text": texts[i], "other": others[i], **own}


def test_bad_rows(models, tmp_path):
    table = pa.table({"id": [0, 1, 2], "text": ["a cat", None, " "]})
    dataset = ray.data.from_arrow(table)
    found = on_ray.embed(dataset, models["vectors"], skip_bad=True, output="v").take_all()
    assert [row["v"] is None for row in found] == [False, True, True]
    assert np.array_equal(
        np.array(found[0]["v"], np.float32), light.TextEmbedder.from_pretrained(models["vectors"]).embed(["a cat"])[0]
    )
    found = on_ray.predict(ray.data.from_arrow(table.slice(1)), models["classes"], skip_bad=True).take_all()
    assert [(row["prediction"], row["prediction_score"]) for row in found] == [(None, None)] * 2
    for wrong, message in (
        ({}, "row 1 of a batch has an empty text"),
        ({"column": "body"}, "no column 'body'; there are 'id', 'text'"),
        ({"output": "id"}, "has a column 'id' already"),
    ):
        with pytest.raises(Exception, match=message):
            on_ray.embed(dataset, models["vectors"], **wrong).materialize()
    with pytest.raises(ValueError, match="workers is 0"):
        on_ray.embed(dataset, models["vectors"], workers=0)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        on_ray.embed(dataset, models["vectors"], precision="int8")
    with pytest.raises(ValueError, match="task is 'fill-mask'"):
        on_ray.predict(dataset, models["vectors"], task="fill-mask")


def test_serve(models):
    serve = pytest.importorskip("ray.serve")
    from fastbert.serve.settings import ServeSettings

    settings = ServeSettings(models=(f"vectors={models['vectors']}", f"classes={models['classes']}"), threads=1)
    app = on_ray.deployment(settings, num_replicas=1, ray_actor_options={"num_cpus": 1})
    serve.start(http_options={"port": 8765})
    serve.run(app)
    try:
        found = httpx.post("http://127.0.0.1:8765/embed", json={"inputs": TEXTS[:3], "truncate": True}).json()
        expected = light.TextEmbedder.from_pretrained(models["vectors"]).embed(TEXTS[:3], normalize=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        answer = httpx.post("http://127.0.0.1:8765/predict", json={"inputs": "a cat"}).json()
        own = light.TextClassifier.from_pretrained(models["classes"])("a cat", top_k=None)
        assert [one["label"] for one in answer] == [one["label"] for one in own]
    finally:
        serve.shutdown()
