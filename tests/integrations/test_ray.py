"""Ray Data and Ray Serve on local workers: a killed one costs time only; the server's app answers."""

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

from fastbert import light
from fastbert.integrations.ray import deployment, embed, predict, rerank

ray = pytest.importorskip("ray")
TEXTS = [text for text in make_texts(60, longest=12) if text.strip() and len(text) < 200]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    require_native()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("ray") / "vectors")


def test_a_worker_is_killed(vectors, tmp_path):
    texts = [TEXTS[i % len(TEXTS)] for i in range(6000)]
    pq.write_table(pa.table({"id": range(6000), "text": texts}), tmp_path / "in.parquet", row_group_size=200)
    target, killed = tmp_path / "out", []

    def kill():
        """Kills an actor that has done some parts, and not all."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if not 3 <= len(list(target.glob("[0-9]*.parquet"))) < 20:
                time.sleep(0.005)
                continue
            for status in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if b"_Actor" in status.read_bytes():
                        os.kill(int(status.parent.name), signal.SIGKILL)
                        killed.append(status)
                        return
                except (FileNotFoundError, ProcessLookupError):
                    continue

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = embed(tmp_path / "in.parquet", target, vectors, workers=2, part_rows=200)
    killer.join()
    assert killed and (outcome.rows, outcome.parts) == (6000, 30)
    assert sorted(path.name for path in target.iterdir()) == [f"{i:06}.parquet" for i in range(30)]
    found = pa.concat_tables([pq.read_table(file) for file in sorted(target.iterdir())])
    assert found["id"].to_pylist() == list(range(6000)) and found["text"].to_pylist() == texts
    expected = light.TextEmbedder.from_pretrained(vectors).embed(texts)
    assert np.array_equal(np.array(found["embedding"].to_pylist(), np.float32), expected)
    assert embed(tmp_path / "in.parquet", target, vectors, workers=2, part_rows=200).kept == 30


@pytest.mark.slow
def test_predict_and_rerank(tmp_path):
    texts = TEXTS[:40]
    pq.write_table(pa.table({"text": texts, "query": texts[::-1]}), tmp_path / "in.parquet", row_group_size=10)
    kind = "ForSequenceClassification"
    classes = save(tmp_path / "classes", "bert", kind, **labels("bad", "good"))
    predict(tmp_path / "in.parquet", tmp_path / "classified", classes, workers=2, part_rows=10)
    found = pq.read_table(tmp_path / "classified")["prediction"].to_pylist()
    assert found == [answer["label"] for answer in light.TextClassifier.from_pretrained(classes)(texts)]
    ranks = save(tmp_path / "ranks", "bert", kind, num_labels=1)
    rerank(tmp_path / "in.parquet", tmp_path / "ranked", ranks, document="text", workers=2, part_rows=10)
    expected = light.CrossEncoder.from_pretrained(ranks)(list(zip(texts[::-1], texts, strict=True)))
    assert pq.read_table(tmp_path / "ranked")["score"].to_pylist() == expected


def test_wrong_arguments(vectors, tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in.parquet")
    for wrong, message in (
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"part_rows": 0}, "part_rows is 0"),
        ({"precision": "int8"}, "precision is 'int8'; it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(tmp_path / "in.parquet", tmp_path / "out", vectors, **wrong)
    with pytest.raises(ValueError, match="task is 'fill-mask'; it must be one of"):
        predict(tmp_path / "in.parquet", tmp_path / "out", vectors, task="fill-mask")
    with pytest.raises(Exception, match="no column 'body'; there are 'text'"):
        embed(tmp_path / "in.parquet", tmp_path / "out", vectors, column="body")


@pytest.mark.slow
def test_serve(vectors, tmp_path):
    serve = pytest.importorskip("ray.serve")
    from fastbert.serve.settings import ServeSettings

    classes = save(tmp_path / "classes", "bert", "ForSequenceClassification", **labels("bad", "good"))
    settings = ServeSettings(models=(f"vectors={vectors}", f"classes={classes}"))
    serve.start(http_options={"port": 8765})
    serve.run(deployment(settings, num_replicas=1, ray_actor_options={"num_cpus": 1}))
    try:
        found = httpx.post("http://127.0.0.1:8765/embed", json={"inputs": TEXTS[:3], "truncate": True}).json()
        expected = light.TextEmbedder.from_pretrained(vectors).embed(TEXTS[:3], normalize=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        answer = httpx.post("http://127.0.0.1:8765/predict", json={"inputs": "a cat"}).json()
        own = light.TextClassifier.from_pretrained(classes)("a cat", top_k=None)
        assert [one["label"] for one in answer] == [one["label"] for one in own]
    finally:
        serve.shutdown()
