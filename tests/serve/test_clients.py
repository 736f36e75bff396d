"""The clients of other servers, unchanged, against the command `fastbert serve` in a process of its own."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from serve_support import running

from fastbert.light import TextEmbedder

TEXTS = ["the cat sat on the mat", "a dog"]


@pytest.fixture(scope="module")
def address(served):
    with running(*(f"{name}={path}" for name, path in served.items())) as (address, _, _):
        yield address


@pytest.fixture(scope="module")
def vectors(served):
    return TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS)


def close(found, expected):
    np.testing.assert_allclose(np.array(found, np.float32), expected, rtol=0, atol=1e-6)


def test_openai(address, vectors):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        found = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, **encoding)
        if encoding.get("encoding_format") != "base64":
            close([one.embedding for one in found.data], vectors)
        assert found.usage.total_tokens > 0
    assert [model.id for model in client.models.list()] == ["vectors", "classes", "tags", "ranks", "answers"]
    with pytest.raises(openai.UnprocessableEntityError, match="dimensions is 1000"):
        client.embeddings.create(model="vectors", input=TEXTS, dimensions=1000)


def test_cohere(address, vectors):
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=address)
    found = client.embed(
        texts=TEXTS, model="vectors", input_type="search_document", embedding_types=["float", "ubinary"]
    )
    close(found.embeddings.float_, vectors)
    ranked = client.rerank(model="ranks", query="a fox", documents=["jumps", "the lazy dog"], top_n=2)
    assert sorted(one.index for one in ranked.results) == [0, 1]
    assert ranked.results[0].relevance_score >= ranked.results[1].relevance_score


def test_the_client_of_text_embeddings_inference(address, vectors):
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=address)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    close(client.feature_extraction(TEXTS[0]), unit[:1])
    close(client.feature_extraction(TEXTS[0], normalize=False, truncate=True), vectors[:1])
    close(client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:]), unit[1:] @ unit[0])


def test_the_client_of_infinity(address, vectors):
    infinity = pytest.importorskip("infinity_client")
    from infinity_client.api.default import classify, embeddings, rerank
    from infinity_client.models import ClassifyInput, OpenAIEmbeddingInputText, RerankInput

    client = infinity.Client(base_url=f"{address}/infinity")
    with client as client:
        found = embeddings.sync(client=client, body=OpenAIEmbeddingInputText.from_dict({"input": TEXTS, "model": "v"}))
        close([one.embedding for one in found.data], vectors)
        body = RerankInput.from_dict({"query": "a fox", "documents": TEXTS, "model": "ranks"})
        assert len(rerank.sync(client=client, body=body).results) == 2
        body = ClassifyInput.from_dict({"input": ["a fox"], "model": "classes"})
        assert len(classify.sync(client=client, body=body).data[0]) == 3


def test_many_clients_at_once(address, served):
    """No answer is lost or another's, whatever comes and goes meanwhile."""
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "red", "blue"]
    texts = [" ".join(words[(i * 7 + j) % 11] for j in range(1 + i % 9)) for i in range(400)]
    expected = TextEmbedder.from_pretrained(served["vectors"]).embed(texts, normalize=True)

    async def one(client, text):
        return (await client.post("/embed", json={"inputs": text}, timeout=60)).json()[0]

    async def vanish(client):
        with pytest.raises(httpx.TimeoutException):
            await client.post("/embed", json={"inputs": ["a " * 30] * 300}, timeout=0.001)

    async def all_of_them():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=address, limits=limits) as client:
            gone = [vanish(client) for _ in range(5)]
            found = await asyncio.gather(*(one(client, text) for text in texts), *gone)
        return found[: len(texts)]

    close(asyncio.run(all_of_them()), expected)


def raw(address, data, seconds=5):
    """What the server answers to these bytes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        connection.settimeout(seconds)
        try:
            return connection.recv(4096)
        except (TimeoutError, ConnectionResetError):
            return b""


def test_broken_requests_do_no_harm(address):
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert b" 400 " in raw(address, b"nonsense\r\n\r\n")
    flood = head + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(2000)) + b"\r\n"
    try:
        answer = raw(address, flood)
    except (BrokenPipeError, ConnectionResetError):
        answer = b""
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert b" 413 " in raw(address, head + b"Content-Length: 10000000\r\n\r\n" + b"x")
    assert b" 400 " in raw(address, head + b"Content-Length: x\r\n\r\n")
    assert raw(address, head + b"Content-Length: 100\r\n\r\n{", seconds=1) == b""  # a slow client waits for itself
    assert httpx.post(f"{address}/embed", json={"inputs": "a"}).status_code == 200


def test_a_shutdown_by_sigterm(served):
    with running(f"vectors={served['vectors']}") as (address, process, lines):
        bodies = [{"inputs": ["a cat sat on the mat " * 4] * 500}] * 4  # long enough to be there at the signal
        found = []
        threads = [
            threading.Thread(target=lambda b=body: found.append(httpx.post(f"{address}/embed", json=b, timeout=60)))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.6)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(30) == 0
        assert [len(answer.json()) for answer in found] == [500] * 4, lines
        assert "cat" not in "".join(lines)


def test_processes_share_a_socket_and_the_weights(served, tmp_path):
    options = ("--processes", "2", "--cache", str(tmp_path / "kept"))
    with running(f"vectors={served['vectors']}", *options) as (address, process, lines):
        assert len(list((tmp_path / "kept").iterdir())) == 1
        children = [int(line) for line in subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()]
        workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        for pid in workers:
            for _ in range(300):  # until it has loaded, too
                if "fbpack" in Path(f"/proc/{pid}/maps").read_text():
                    break
                time.sleep(0.1)
            assert "fbpack" in Path(f"/proc/{pid}/maps").read_text()
        os.kill(workers[0], signal.SIGKILL)
        expected = TextEmbedder.from_pretrained(served["vectors"]).embed(["a cat"], normalize=True)
        answered = 0
        for _ in range(100):
            try:
                found = httpx.post(f"{address}/embed", json={"inputs": "a cat"})
            except httpx.TransportError:  # it had been accepted by the one that was killed
                continue
            if found.status_code == 200:  # 503 by one that has just been started
                close(found.json(), expected)
                answered += 1
            time.sleep(0.02)
        assert answered > 50 and any("started again" in line for line in lines)
        text = httpx.get(f"{address}/metrics").text
        assert 'fastbert_requests_total{route="/embed",status="200"}' in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_sigterm_while_processes_start_ends_them(served, tmp_path):
    command = [sys.executable, "-m", "fastbert", "serve", served["vectors"], "--port", "0", "--processes", "3"]
    process = subprocess.Popen([*command, "--cache", str(tmp_path)], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_what_cannot_be_served_is_one_line(served, tmp_path):
    def fails(*arguments, env=None):
        command = [sys.executable, "-m", "fastbert", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | (env or {}))
        assert done.returncode == 1, done.stderr
        return done.stderr.splitlines()[-1]

    assert "there is no model to serve" in fails("--port", "0")
    assert f"no folder '{tmp_path}/none'" in fails(f"{tmp_path}/none", "--port", "0")
    assert "two models are called 'a'" in fails(f"a={served['vectors']}", f"a={served['tags']}", "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in fails(served["vectors"], "--port", port)
    assert "FASTBERT_SERVE_PORT is 'x'" in fails(served["vectors"], env={"FASTBERT_SERVE_PORT": "x"})
