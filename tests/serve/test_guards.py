"""What a server refuses, and how: one message, no text in the log, and the next request is answered."""

import asyncio
import json
import logging
import threading
import time

import numpy as np
import pytest

from fastbert.light import TextEmbedder
from fastbert.serve import processes
from fastbert.serve.batcher import Batcher
from fastbert.serve.settings import ServeSettings, read_settings

SECRET = "a secret text that no log may hold"


def works(client):
    return client.post("/embed", json={"inputs": "a cat"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "JSON"),
        (b"", "JSON|required|missing"),
        (b"[]", "dictionary|object|valid"),
        (b'{"inputs": 3}', "inputs"),
        (b'{"inputs": [1, 2]}', "inputs"),
        (b'{"inputs": []}', "inputs"),
        (b'{"inputs": {"a": 1}}', "inputs"),
        (b'{"inputs": null}', "inputs"),
        (b"{}", "inputs"),
        (b'{"inputs": "a", "normalize": "yes"}', "normalize"),
        (b'{"inputs": "a", "dimensions": 0}', "dimensions is 0; it must be 1 to 48"),
        (b'{"inputs": "a", "dimensions": 1.5}', "dimensions"),
        (b'{"inputs": "a", "prompt_name": "none such"}', "prompt_name is 'none such'"),
        (b'{"inputs": "a", "truncation_direction": "up"}', "truncation_direction"),
        (b'{"inputs": "\\ud800"}', "JSON|surrogate|str|inputs|unicode"),
        (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON|recursion|depth"),
        (b'{"inputs": "' + b"\xff\xfe" + b'"}', "JSON|UTF"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_wrong_body_is_one_message(start, body, message):
    import re

    client = start("vectors")
    answer = client.post("/embed", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error_type"] == "Validation" and re.search(message, answer.json()["error"]), answer.text
    assert works(client)


def test_too_much(start):
    client = start("vectors", max_texts=3, max_body_bytes=1000)
    many = client.post("/embed", json={"inputs": ["a"] * 4})
    assert many.status_code == 422 and many.json()["error"] == "the request has 4 texts; it must have at most 3"
    large = client.post("/embed", json={"inputs": "a" * 1000})
    assert large.status_code == 413 and large.json()["error"] == "the body is larger than 1000 bytes"
    streamed = client.post("/embed", content=iter([b"a" * 600, b"a" * 600]))  # without a length
    assert streamed.status_code == 413
    assert works(client)


def test_a_task_that_is_not_served(start):
    client = start("vectors")
    answer = client.post("/classify", json={"input": "a"})
    assert answer.status_code == 404 and answer.json()["error"] == "no model here is for text-classification"
    assert client.get("/none").status_code == 404


def test_a_token(start):
    client = start("vectors", api_key="right")
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Basic right"}):
        answer = client.post("/embed", json={"inputs": "a"}, headers=header)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert client.post("/embed", json={"inputs": "a"}, headers={"Authorization": "Bearer right"}).status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        assert client.get(path).status_code == 200
    assert client.get("/info").status_code == 401


def test_logs_hold_no_text(start, caplog):
    caplog.set_level(logging.DEBUG)
    client = start("vectors")
    client.post("/embed", json={"inputs": SECRET})
    client.post("/embed", json={"inputs": [SECRET, 3]})
    client.post(f"/{SECRET}", json={})
    own = [record.getMessage() for record in caplog.records if record.name.startswith("fastbert")]
    assert SECRET not in "".join(own) and len(own) == 3
    assert json.loads(own[0]).keys() == {"route", "method", "status", "bytes", "seconds"}
    assert json.loads(own[2])["route"] == "other"


def test_metrics(start):
    client = start("vectors")
    for _ in range(3):
        assert works(client)
    client.post("/embed", content=b"{")
    text = client.get("/metrics").text
    assert 'fastbert_requests_total{route="/embed",status="200"} 3.0' in text
    assert 'fastbert_requests_total{route="/embed",status="422"} 1.0' in text
    assert 'fastbert_tokens_total{model="vectors"} 12.0' in text
    for name in (
        "request_seconds_bucket",
        "batch_fill_bucket",
        "queue_seconds_sum",
        "queue_tokens",
        "requests_in_flight",
    ):
        assert f"fastbert_{name}" in text


def slowed(client, seconds):
    """Makes each batch of a client's model take longer; `begun` is set when one has begun."""
    model = client.app.state.serve.models[0]
    real, model.begun = model.batcher._run, threading.Event()

    def run(works):
        model.begun.set()
        time.sleep(seconds)
        return real(works)

    model.batcher._run = run
    return model


def together(client, bodies):
    """The answers to requests that are sent at once."""
    found = [None] * len(bodies)

    def send(i):
        found[i] = client.post("/embed", json=bodies[i])

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_requests_run_together_and_are_not_mixed_up(start, served):
    client = start("vectors")
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "red", "blue"]
    texts = [" ".join(words[(i + j) % 11] for j in range(1 + i % 7)) for i in range(60)]
    model = slowed(client, 0.02)
    batches = []
    real = model.batcher._told
    model.batcher._told = lambda batch: (batches.append(batch), real(batch))
    answers = together(client, [{"inputs": text} for text in texts])
    expected = TextEmbedder.from_pretrained(served["vectors"]).embed(texts, normalize=True)
    for answer, vector in zip(answers, expected, strict=True):
        assert answer.status_code == 200
        np.testing.assert_allclose(np.array(answer.json()[0], np.float32), vector, rtol=0, atol=1e-6)
    assert sum(batch.items for batch in batches) == 60 and len(batches) < 30


def test_a_full_queue_is_told(start):
    client = start("vectors", max_queue_tokens=8)
    slowed(client, 0.2)
    answers = together(client, [{"inputs": "a cat"}] * 12)
    codes = sorted(answer.status_code for answer in answers)
    assert codes[0] == 200 and codes[-1] == 429 and set(codes) == {200, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1 and full.json()["error_type"] == "Overloaded"
    assert works(client)


def test_too_many_requests_at_a_time(start):
    client = start("vectors", max_concurrent_requests=2)
    slowed(client, 0.2)
    codes = sorted(answer.status_code for answer in together(client, [{"inputs": "a cat"}] * 8))
    assert codes.count(200) >= 2 and codes.count(429) >= 1
    assert works(client)


def test_one_text_fails_no_others(start):
    """Those that run in its batch are answered."""
    client = start("vectors")
    model = slowed(client, 0.05)
    real = model.batcher._run

    def run(works):
        if any(len(ids) == 5 for ids, _ in works):
            raise ValueError(SECRET)
        return real(works)

    model.batcher._run = run
    texts = ["a cat", "a cat sat", "a", "the cat", "dog"] * 4  # the second one has five tokens
    codes = [answer.status_code for answer in together(client, [{"inputs": text} for text in texts])]
    assert codes == [200, 424, 200, 200, 200] * 4


def test_a_cancelled_queue_is_passed_over():
    async def run():
        batcher = Batcher(slow, max_batch_tokens=10, max_latency=1.0, max_queue_tokens=1000)
        first = asyncio.create_task(batcher.submit([("first", 1)]))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher.submit([(i, 1), (i, 1)])) for i in range(5)]
        await asyncio.sleep(0)
        for task in others:
            task.cancel()
        assert await first == ["first"]
        assert await asyncio.wait_for(batcher.submit([("last", 1)]), 10) == ["last"]
        assert batcher.waiting == 0
        batcher.close()

    def slow(works):
        time.sleep(0.2)
        return works

    asyncio.run(run())


def test_a_client_that_goes_leaves_the_queue(start):
    client = start("vectors")
    app, model = client.app, slowed(client, 0.2)
    body = b'{"inputs": ["a cat", "a dog"]}'
    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "query_string": b"", "app": app}

    async def run():
        sent, ran = [], []
        real = model.batcher._run
        model.batcher._run = lambda works: (ran.extend(works), real(works))[1]
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        await app(scope | {"state": {}}, receive, send)
        return sent, ran

    busy = threading.Thread(target=client.post, args=("/embed",), kwargs={"json": {"inputs": "a"}})
    busy.start()
    assert model.begun.wait(10)
    sent, _ = asyncio.run(run())
    busy.join()
    assert sent == [] and works(client) and model.batcher.waiting == 0


def test_a_slow_body_is_ended(start):
    client = start("vectors", max_body_seconds=0.2)
    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "query_string": b"", "app": client.app}

    async def run():
        sent = []

        async def receive():
            await asyncio.sleep(30)

        async def send(message):
            sent.append(message)

        await client.app(scope | {"state": {}}, receive, send)
        return sent

    sent = asyncio.run(run())
    assert sent[0]["status"] == 408 and b"the body took more than 0.2 s" in sent[1]["body"]
    assert works(client) and client.app.state.serve.in_flight == 0


def test_a_failed_batch_is_told_and_the_next_one_runs(start):
    client = start("vectors")
    model = client.app.state.serve.models[0]
    real = model.batcher._run
    model.batcher._run = lambda works: 1 / 0
    failed = client.post("/embed", json={"inputs": "a"})
    assert failed.status_code == 424 and failed.json()["error"] == "the model failed"
    model.batcher._run = real
    assert works(client)


def test_what_no_one_foresaw_is_one_message(start, monkeypatch, caplog):
    client = start("vectors")

    async def fails(*args, **options):
        raise RuntimeError(SECRET)

    monkeypatch.setattr(client.app.state.serve.models[0], "embed", fails)
    answer = client.post("/embed", json={"inputs": "a"})
    assert answer.status_code == 500 and answer.json()["error"] == "the server failed"
    monkeypatch.undo()
    assert works(client)
    own = "".join(record.getMessage() for record in caplog.records if record.name.startswith("fastbert"))
    assert "a request failed: RuntimeError at " in own and SECRET not in own


def test_a_shutdown_finishes_what_was_accepted(start):
    client = start("vectors")
    model = slowed(client, 0.3)
    found = []
    thread = threading.Thread(target=lambda: found.append(client.post("/embed", json={"inputs": "a cat"})))
    thread.start()
    assert model.begun.wait(10)
    model.batcher.close()
    thread.join()
    assert found[0].status_code == 200
    assert client.post("/embed", json={"inputs": "a"}).status_code == 503


def test_settings(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('models = ["a=b"]\nport = 1\nmax_latency = 1\nhost = "of the file"\n')
    environment = {"FASTBERT_SERVE_PORT": "2", "FASTBERT_SERVE_MODELS": "x=y z", "HOME": "elsewhere"}
    found = read_settings({"port": None, "host": "of the flag"}, environment, file)
    assert (found.port, found.models, found.host, found.max_latency) == (2, ("x=y", "z"), "of the flag", 1)
    for text, message in (
        ("prot = 1", "prot: there is no such setting"),
        ('port = "x"', "port is 'x'; it must be an integer"),
        ("models = 3", "models is 3; it must be a list of strings"),
        ("port = ", "serve.toml: "),
        ("port = true", "port is True; it must be an integer"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_settings({}, {}, file)
    with pytest.raises(ValueError, match=r"FASTBERT_SERVE_PORT is 'x'; it must be an integer"):
        read_settings({}, {"FASTBERT_SERVE_PORT": "x"})
    with pytest.raises(ValueError, match=r"FASTBERT_SERVE_PROT: there is no such setting"):
        read_settings({}, {"FASTBERT_SERVE_PROT": "1"})
    assert read_settings({}, {"FASTBERT_SERVE_MAX_LATENCY": "0.05"}).max_latency == 0.05
    for values, message in (
        ({"port": 70000}, "port is 70000; it must be at most 65535"),
        ({"max_texts": 0}, "max_texts is 0; it must be at least 1"),
        ({"max_latency": 0.0}, "max_latency is 0.0; it must be above 0"),
        ({"api_key": ""}, "api_key is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeSettings(**values)


def test_each_process_has_cores_of_its_own(monkeypatch):
    """Whatever numbers the system has given to the two processors of a core."""
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("fastbert.light.loading._siblings", lambda cpu: str(cpu % 4))
    assert processes._shares(2) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert processes._shares(1) == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert processes._shares(5)[4] == processes._shares(5)[0] == [0, 4]
