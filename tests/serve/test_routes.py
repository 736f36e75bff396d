"""Each route answers as the server that it follows, with the numbers of the library."""

import base64
import json
import shutil

import numpy as np
import pytest

import fastbert
from fastbert.light import TextEmbedder

TEXTS = ["the cat sat on the mat", "a dog", "the red dogs ran under a blue mat"]


@pytest.fixture(scope="module")
def expected(served):
    return TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS, normalize=True)


def close(found, expected):
    np.testing.assert_allclose(np.array(found, np.float32), expected, rtol=0, atol=1e-6)


def test_openai(start, served):
    client, plain = start(), TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS)
    answer = client.post("/v1/embeddings", json={"input": TEXTS, "model": "anything"}).json()
    assert answer["object"] == "list" and answer["model"] == "vectors"
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    close([one["embedding"] for one in answer["data"]], plain)
    tokens = sum(map(len, TextEmbedder.from_pretrained(served["vectors"]).tokenize(TEXTS)))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    one = client.post("/v1/embeddings", json={"input": TEXTS[0], "encoding_format": "base64"}).json()["data"][0]
    assert np.array_equal(np.frombuffer(base64.b64decode(one["embedding"]), "<f4"), plain[0])
    short = client.post("/v1/embeddings", json={"input": TEXTS[0], "dimensions": 5}).json()["data"][0]["embedding"]
    close(short, plain[0, :5])
    for path in ("/v1/models", "/models"):
        assert [one["id"] for one in client.get(path).json()["data"]] == list(served)


def test_tei_embed(start, served, expected):
    client = start()
    close(client.post("/embed", json={"inputs": TEXTS}).json(), expected)
    close(client.post("/embed", json={"inputs": TEXTS[0]}).json(), expected[:1])
    plain = client.post("/embed", json={"inputs": TEXTS, "normalize": False}).json()
    close(plain, TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS))
    short = np.array(client.post("/embed", json={"inputs": TEXTS, "dimensions": 7}).json())
    close(short, expected[:, :7] / np.linalg.norm(expected[:, :7], axis=1, keepdims=True))
    raw = client.post("/embed", json={"inputs": TEXTS}, headers={"Accept": "application/octet-stream"})
    assert raw.headers["x-shape"] == "3,48"
    assert np.array_equal(np.frombuffer(raw.content, "<f4").reshape(3, 48), expected)


def test_tei_long_texts(start, served):
    client, long = start("vectors"), "cat " * 100
    refused = client.post("/embed", json={"inputs": long})
    assert refused.status_code == 413 and refused.json()["error_type"] == "Validation"
    assert "more than 40 tokens" in refused.json()["error"]
    embedder = TextEmbedder.from_pretrained(served["vectors"])
    cut = client.post("/embed", json={"inputs": long, "truncate": True}).json()
    close(cut, embedder.embed([long], normalize=True))
    text = "dog " * 60 + "cat " * 38
    left = client.post("/embed", json={"inputs": text, "truncate": True, "truncation_direction": "Left"}).json()
    close(left, embedder.embed(["cat " * 38], normalize=True))


def test_tei_others(start, served, expected):
    client = start()
    states = client.post("/embed_all", json={"inputs": TEXTS[:2]}).json()
    rows = TextEmbedder.from_pretrained(served["vectors"]).tokenize(TEXTS[:2])
    assert [len(one) for one in states] == [len(one) for one in rows]
    vectors = TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS[:2])
    close([np.mean(one, axis=0) for one in states], vectors)
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}}
    close(client.post("/similarity", json=body).json(), expected[1:] @ expected[0])
    tokens = client.post("/tokenize", json={"inputs": TEXTS[0], "model": "vectors"}).json()[0]
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": 0, "stop": 0}
    assert tokens[2]["text"] == "cat" and TEXTS[0][tokens[2]["start"] : tokens[2]["stop"]] == "cat"
    info = client.get("/info").json()
    assert info["max_input_length"] == 40 and info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_predict_and_classify(start, served):
    client, pipeline = start(), fastbert.pipeline("text-classification", served["classes"], top_k=None)
    texts = ["a fox", "the quick brown fox jumps"]
    assert client.post("/predict", json={"inputs": [[text] for text in texts], "model": "classes"}).json() == pipeline(
        texts
    )
    pair = client.post("/predict", json={"inputs": [["a fox", "jumps"]], "model": "classes"}).json()
    assert pair == pipeline([("a fox", "jumps")])
    assert client.post("/predict", json={"inputs": ["a fox", "jumps"], "model": "classes"}).json() == pair[0]
    one = client.post("/predict", json={"inputs": texts[0], "raw_scores": True, "model": "classes"}).json()
    assert one == pipeline(texts[:1], function_to_apply="none")[0]
    answer = client.post("/classify", json={"input": texts}).json()
    for row, best in zip(answer["data"], pipeline(texts), strict=True):
        assert row["label"] == best[0]["label"] and row["num_classes"] == 3
        assert sorted(row["probs"], reverse=True) == [each["score"] for each in best]
    assert client.post("/infinity/classify", json={"input": texts}).json()["data"] == pipeline(texts)


def test_rerank(start, served):
    client, reranker = start(), fastbert.pipeline("rerank", served["ranks"])
    texts = ["a fox", "the lazy dog", "jumps over"]
    expected = reranker.rank("quick fox", texts)
    found = client.post("/rerank", json={"query": "quick fox", "texts": texts, "return_text": True}).json()
    assert [(row["index"], row["score"], row["text"]) for row in found] == [
        (row["corpus_id"], row["score"], texts[row["corpus_id"]]) for row in expected
    ]
    body = {"query": "quick fox", "documents": texts, "top_n": 2}
    cohere = client.post("/v2/rerank", json=body).json()
    assert cohere["results"] == [{"index": row["corpus_id"], "relevance_score": row["score"]} for row in expected[:2]]
    infinity = client.post("/rerank", json=body | {"return_documents": True}).json()
    assert [row["document"] for row in infinity["results"]] == [texts[row["corpus_id"]] for row in expected[:2]]
    scores = client.post("/score", json={"model": "ranks", "text_1": "quick fox", "text_2": texts}).json()["data"]
    assert [row["score"] for row in scores] == reranker([("quick fox", text) for text in texts])


def test_cohere_embed_and_vllm_pooling(start, served, expected):
    client = start()
    plain = TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS)
    body = {"texts": TEXTS, "model": "vectors", "input_type": "search_query", "embedding_types": ["float", "ubinary"]}
    found = client.post("/v2/embed", json=body).json()
    close(found["embeddings"]["float"], plain)
    bits = TextEmbedder.from_pretrained(served["vectors"]).embed(TEXTS, precision="ubinary")
    assert found["embeddings"]["ubinary"] == bits.tolist()
    close([row["data"] for row in client.post("/pooling", json={"input": TEXTS}).json()["data"]], plain)


def test_ner(start, served):
    texts = ["a fox jumps", "the lazy dog"]
    pipeline = fastbert.pipeline("token-classification", served["tags"], aggregation_strategy="first")
    found = start("tags").post("/ner", json={"inputs": texts, "aggregation_strategy": "first"}).json()
    for ours, theirs in zip(found, pipeline(texts), strict=True):
        assert ours == [{**row, "score": pytest.approx(float(row["score"]), abs=1e-6)} for row in theirs]


def test_question_answering(start, served):
    body = {"question": "who jumps?", "context": "The quick brown fox jumps over the lazy dog. " * 6}
    expected = fastbert.pipeline("question-answering", served["answers"])(**body, top_k=2)
    found = start("answers").post("/question-answering", json=body | {"top_k": 2}).json()
    assert [row["answer"] for row in found] == [row["answer"] for row in expected]
    assert [row["score"] for row in found] == [pytest.approx(row["score"], abs=1e-6) for row in expected]


def test_raw_scores_of_a_reranker_are_logits(start, served):
    client, reranker = start("ranks"), fastbert.pipeline("rerank", served["ranks"])
    texts = ["a fox", "the lazy dog", "jumps over"]
    logits = reranker([("quick fox", text) for text in texts], function_to_apply="none")
    assert logits != reranker([("quick fox", text) for text in texts])
    body = {"query": "quick fox", "texts": texts, "raw_scores": True}
    assert {row["index"]: row["score"] for row in client.post("/rerank", json=body).json()} == dict(enumerate(logits))
    pairs = [["quick fox", text] for text in texts]
    rows = client.post("/predict", json={"inputs": pairs, "raw_scores": True}).json()
    assert [row[0]["score"] for row in rows] == logits


def test_a_folder_with_fewer_dimensions(start, served, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(served["vectors"], folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    modules += [{"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (folder / "config_sentence_transformers.json").write_text('{"truncate_dim": 16}')
    served["short"] = str(folder)
    client, embedder = start("short"), TextEmbedder.from_pretrained(folder)
    del served["short"]
    close(client.post("/embed", json={"inputs": TEXTS}).json(), embedder.embed(TEXTS, normalize=True))
    rows = client.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
    close([row["embedding"] for row in rows], embedder.embed(TEXTS))


def test_methods_and_paths(start):
    client = start("vectors")
    wrong = client.get("/embed")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and "POST" in wrong.json()["error"]
    assert client.head("/health").status_code == client.head("/ready").status_code == 200
    assert client.get("/nowhere").json()["error"].startswith("there is no such path")
    described = client.get("/openapi.json").json()
    assert described["paths"]["/embed"]["post"]["requestBody"] and "/metrics" in described["paths"]
    assert "POST /question-answering" in client.get("/docs").text
