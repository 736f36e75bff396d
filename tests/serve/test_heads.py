"""Heads on one encoder: it runs once for all of them, and is held once. Masked-language models; models by torch."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers
from pretended_graphs import PretendedGraphs, as_on_a_gpu
from support import require_native
from tasks_support import KINDS, labels, make_texts, same, save, save_head

import fastbert
from fastbert import light
from fastbert.inference.cuda_graphs import CompiledModel
from fastbert.light.encoder import Encoder
from fastbert.serve.heads import Heads, grouped
from fastbert.serve.models import load
from fastbert.serve.settings import ServeSettings
from fastbert.tasks.names import task_of
from fastbert.tokenizer.auto import AutoTokenizer

TEXTS = make_texts(12)
HEADS = {
    "topic": ("ForSequenceClassification", labels("sport", "news", "art")),
    "mood": ("ForSequenceClassification", labels("good", "bad")),
    "names": ("ForTokenClassification", labels("O", "B-PER", "I-PER")),
}


@pytest.fixture(scope="module", params=KINDS)
def several(request, tmp_path_factory):
    """The paths of a model for each of HEADS, on one encoder, and of one on another."""
    require_native()
    kind, home = request.param, tmp_path_factory.mktemp(request.param)
    base = fastbert.AutoModel.from_pretrained(save(home / "base", kind, "Model")).state_dict()
    paths = {
        name: save_head(home / name, kind, head, base, seed, **settings)
        for seed, (name, (head, settings)) in enumerate(HEADS.items())
    }
    first = next(iter(base))
    other = {**base, first: base[first] * 2}
    return paths, save_head(home / "other", kind, "ForSequenceClassification", other, 0, **labels("a", "b"))


def test_each_alone_bit_for_bit(several):
    paths, _ = several
    alone = {name: light.pipeline(task_of(path), path) for name, path in paths.items()}
    (heads,) = grouped({name: light.pipeline(one.task, paths[name]) for name, one in alone.items()})
    windows = alone["topic"].runner.windows(TEXTS)
    names = [("topic", "mood"), ("names",), ("mood",), ("topic", "mood", "names")]
    works = [(window, names[i % 4]) for i, window in enumerate(windows)]
    for chosen in (works, [work for work in works if "names" not in work[1]]):  # the second reads first tokens alone
        found = heads.run(chosen)
        for name, one in alone.items():
            expected = one.run([window for window, wanted in chosen if name in wanted])
            rows = [row[name] for row in found if name in row]
            assert len(rows) == len(expected) == sum(name in wanted for _, wanted in chosen)
            assert all(np.array_equal(row, own) for row, own in zip(rows, expected, strict=True))


def test_held_once(several):
    paths, other = several
    pipelines = {name: light.pipeline(task_of(path), path) for name, path in paths.items()}
    groups = grouped({**pipelines, "other": light.pipeline("text-classification", other)})
    assert [list(group.pipelines) for group in groups] == [list(paths), ["other"]]
    arrays = [one.runner.model.encoder.arrays for one in pipelines.values()]
    assert all(own["0.qkv"] is arrays[0]["0.qkv"] and own["word"] is arrays[0]["word"] for own in arrays)
    assert isinstance(groups[1], Heads)


def test_other_precisions_are_not_joined(several):
    paths, _ = several
    made = {
        "a": light.pipeline("text-classification", paths["topic"]),
        "b": light.pipeline("text-classification", paths["mood"], quantize="int8"),
        "c": light.pipeline("text-classification", paths["mood"], dtype="bfloat16"),
    }
    assert len(grouped(made)) == 3


def test_other_tokenizers_are_not_joined(several, tmp_path):
    paths, _ = several
    shutil.copytree(paths["mood"], tmp_path / "mood")
    settings = json.loads((tmp_path / "mood" / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Lowercase"} if settings["normalizer"] is None else None
    (tmp_path / "mood" / "tokenizer.json").write_text(json.dumps(settings))
    settings = json.loads((tmp_path / "mood" / "tokenizer_config.json").read_text())
    settings["do_lower_case"] = not settings.get("do_lower_case", True)  # BERT's normalizer is made of it
    (tmp_path / "mood" / "tokenizer_config.json").write_text(json.dumps(settings))
    made = {"a": light.pipeline("text-classification", paths["topic"])}
    assert len(grouped({**made, "b": light.pipeline("text-classification", tmp_path / "mood")})) == 2


def test_heads_in_one_request(several, start_paths, monkeypatch):
    paths, other = several
    client, calls = start_paths(**paths, other=other), []
    run = Encoder.__call__

    def counted(self, ids, *rest, **more):
        calls.append(len(ids))
        return run(self, ids, *rest, **more)

    monkeypatch.setattr(Encoder, "__call__", counted)
    found = client.post("/heads", json={"inputs": TEXTS[:4], "models": list(paths)}).json()
    assert len(calls) == 1
    assert list(found) == list(paths)
    for name in ("topic", "mood"):
        same(found[name], light.TextClassifier.from_pretrained(paths[name])(TEXTS[:4], top_k=None))
    expected = light.TokenClassifier.from_pretrained(paths["names"])(TEXTS[:4], aggregation_strategy="simple")
    same(found["names"], expected)
    assert list(client.post("/heads", json={"inputs": "a cat"}).json()) == [*paths, "other"]
    refused = client.post("/heads", json={"inputs": "a cat", "models": ["mood", "nobody"]})
    assert refused.status_code == 404 and "nobody" in refused.json()["error"]
    one = client.post("/predict", json={"inputs": TEXTS[0], "model": "mood"}).json()
    same(one, found["mood"][0])


def test_heads_of_many_clients_run_together(several, start_paths):
    paths, _ = several
    client, found = start_paths(**paths), {}

    def ask(i):
        name = list(paths)[i % 2]
        found[i] = client.post("/predict", json={"inputs": TEXTS[i % len(TEXTS)], "model": name}).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {name: light.TextClassifier.from_pretrained(paths[name]) for name in ("topic", "mood")}
    for i, answer in found.items():
        same(answer, alone[list(paths)[i % 2]](TEXTS[i % len(TEXTS)], top_k=None))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    require_native()
    return save(tmp_path_factory.mktemp("masked"), "bert", "ForMaskedLM")


@pytest.mark.parametrize("precision", [None, "high"])  # by the light engine; by torch
def test_masked_language_models(start_paths, masked, precision):
    client = start_paths(masked, precision=precision)
    texts = ["the [MASK] sat on the mat", "a [MASK] [MASK] ran"]
    expected = fastbert.pipeline("fill-mask", masked, precision=precision)
    same(client.post("/fill-mask", json={"inputs": texts, "top_k": 3}).json(), expected(texts, top_k=3))
    same(client.post("/fill-mask", json={"inputs": texts[0]}).json(), expected(texts[0]))
    targets = client.post("/fill-mask", json={"inputs": texts[0], "targets": ["cat", "dog"]}).json()
    same(targets, expected(texts[0], targets=["cat", "dog"]))
    long = client.post("/fill-mask", json={"inputs": "a [MASK] " * 100})
    assert long.status_code == 413 and "tokens; the model takes" in long.json()["error"]
    assert client.post("/heads", json={"inputs": "a cat"}).status_code == 404  # there are none
    assert "no [MASK]" in client.post("/fill-mask", json={"inputs": "a cat"}).json()["error"]
    sparse = client.post("/embed_sparse", json={"inputs": texts}).json()
    same(sparse, fastbert.pipeline("sparse-embedding", masked, precision=precision)(texts))
    vectors = client.post("/embed", json={"inputs": texts, "normalize": False}).json()
    own = fastbert.Embedder.from_pretrained(masked, precision=precision).embed(texts)
    np.testing.assert_allclose(vectors, own, rtol=0, atol=1e-6)
    listed = client.get("/v1/models").json()["data"]
    assert [one["capabilities"] for one in listed] == [["embedding", "sparse-embedding", "fill-mask"]]
    assert client.post("/tokenize", json={"inputs": "a cat"}).status_code == 200
    assert client.get("/info").json()["model_dtype"] == "float32"


def test_a_folder_of_sparse_vectors(masked, start_paths, tmp_path):
    folder = tmp_path / "splade"
    shutil.copytree(masked, folder)
    kinds = ("MLMTransformer", ""), ("SpladePooling", "1_SpladePooling")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.sparse_encoder.models.{name}"}
        for i, (name, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_SpladePooling").mkdir()
    settings = {"pooling_strategy": "max", "activation_function": "relu"}
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(settings))
    client = start_paths(str(folder))
    expected = fastbert.pipeline("sparse-embedding", masked)(TEXTS[:3])
    same(client.post("/embed_sparse", json={"inputs": TEXTS[:3]}).json(), expected)
    same(client.post("/", json={"inputs": TEXTS[:3]}).json(), expected)
    assert client.get("/info").json()["model_type"] == {"embedding": {"pooling": "splade"}}
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps({**settings, "pooling_strategy": "sum"}))
    with pytest.raises(ValueError, match="pooling_strategy is 'sum'; it must be 'max'"):
        load(ServeSettings(models=(str(folder),)), lambda name, batch: None)


def test_a_tokenizer_without_a_mask(masked, start_paths, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(masked, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": None}))
    assert AutoTokenizer.from_pretrained(folder).mask_token is None
    client = start_paths(str(folder))
    assert [model.kind for model in client.app.state.serve.models] == ["embedding", "sparse-embedding"]


def test_what_waits_is_counted_once(several, start_paths, masked):
    paths, _ = several
    client = start_paths(**paths, masked=masked)
    state = client.app.state.serve
    for model, tokens in ((state.models[0], 7), (state.models[-1], 5)):
        model.batcher.waiting += tokens
    state.models[len(paths)].batcher.waiting += 2  # masked's vectors
    try:
        lines = client.get("/metrics").text.splitlines()
        found = {
            line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith("fastbert_queue_tokens{")
        }
        assert found == {**dict.fromkeys(paths, 0.0), next(iter(paths)): 7.0, "masked": 7.0}
    finally:
        for model in (state.models[0], state.models[len(paths)], state.models[-1]):
            model.batcher.waiting = 0


@pytest.mark.parametrize("way", ["light", "torch", "live"])
def test_sparse_vectors_are_splade(masked, way):
    made = {
        "light": lambda: light.pipeline("sparse-embedding", masked),
        "torch": lambda: fastbert.pipeline("sparse-embedding", masked),
        "live": lambda: fastbert.pipeline(
            "sparse-embedding", transformers.AutoModelForMaskedLM.from_pretrained(masked), tokenizer=masked
        ),
    }
    texts, pipeline = TEXTS[:5], made[way]()
    model = transformers.AutoModelForMaskedLM.from_pretrained(masked).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked)
    for text, found in zip(texts, pipeline(texts), strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=40)).logits[0]
        expected = torch.log1p(torch.relu(logits)).amax(0)
        if len(tokenizer(text).input_ids) <= 40:
            assert [one["index"] for one in found] == expected.nonzero().flatten().tolist()
            np.testing.assert_allclose([one["value"] for one in found], expected[expected > 0], rtol=1e-4, atol=1e-5)


def test_a_head_without_weights_is_not_served(start_paths, masked, tmp_path):
    encoder = fastbert.AutoModel.from_pretrained(masked, add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(masked).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(masked)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path)
    client = start_paths(str(tmp_path))
    assert [model.kind for model in client.app.state.serve.models] == ["embedding"]


def test_by_torch(served, start_paths):
    client = start_paths(**served, precision="high")
    assert all(type(model).__module__ == "fastbert.serve.models" for model in client.app.state.serve.models)
    assert isinstance(client.app.state.serve.models[0].embedder, fastbert.Embedder)
    vectors = client.post("/embed", json={"inputs": TEXTS[:3]}).json()
    own = fastbert.Embedder.from_pretrained(served["vectors"], precision="high").embed(TEXTS[:3], normalize=True)
    np.testing.assert_allclose(vectors, own, rtol=0, atol=1e-6)
    states = client.post("/embed_all", json={"inputs": "a cat"}).json()
    plain = light.TextEmbedder.from_pretrained(served["vectors"])
    np.testing.assert_allclose(states[0], plain.states(plain.tokenize(["a cat"]))[0], rtol=0, atol=1e-4)
    found = client.post("/predict", json={"inputs": TEXTS[0], "model": "classes"}).json()
    same(found, fastbert.pipeline("text-classification", served["classes"], precision="high")(TEXTS[0], top_k=None))


def test_by_cuda_graphs(served, monkeypatch):
    """What a server asks for on a GPU, with graphs in name."""

    def compiled(model, **limits):
        made.append(CompiledModel(model, PretendedGraphs(model), max_tokens=4096, max_graphs=8, max_bytes=1 << 30))
        return made[-1]

    made = []
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr("fastbert.inference.cuda_graphs.compile", compiled)
    for pooling in ("mean", "cls"):
        embedder = fastbert.Embedder.from_pretrained(served["vectors"], pooling=pooling)
        expected, batch = embedder.embed(TEXTS[:5]), embedder.tokenize(TEXTS[:5])
        states = embedder.states(batch)
        embedder.compile()
        np.testing.assert_allclose(embedder.embed(TEXTS[:5]), expected, rtol=0, atol=1e-6)
        for own, before in zip(embedder.states(batch), states, strict=True):
            np.testing.assert_allclose(own, before, rtol=0, atol=1e-6)
        assert sum(graph[2] for graph in made[-1].report().graphs) == 2 and not made[-1].outside
    pipeline = fastbert.pipeline("text-classification", served["classes"])
    expected = pipeline(TEXTS[:5], top_k=None)
    pipeline.runner.compile()
    same(pipeline(TEXTS[:5], top_k=None), expected)
    assert sum(graph[2] for graph in made[-1].report().graphs) == 1
