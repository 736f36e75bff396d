"""fill-mask, feature-extraction, similarity, search, rerank, multiple-choice and summaries."""

import json

import numpy as np
import pytest
import torch
import transformers
from tasks_support import KINDS, LENGTH, make_texts, same, save

import fastbert
from fastbert.tasks import fill_mask
from fastbert.tasks.fill_mask import _best
from fastbert.tasks.summarization import sentences_of
from fastbert.tasks.vector_search import similarity

TEXTS = [text for text in make_texts(60) if len(text) < 1000]


@pytest.fixture(scope="module", params=KINDS)
def masked(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), request.param, "ForMaskedLM")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"), "bert", "Model")


def with_masks(tokenizer, texts):
    return [
        " ".join((tokenizer.mask_token if i in (1, 3) else word) for i, word in enumerate(text.split()))
        for text in texts
        if len(text.split()) > 1
    ]


@pytest.mark.parametrize("way", ["own", "live"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["fox", "dog", "nonsense"], "top_k": 3}], ids=str)
def test_fill_mask(masked, way, options):
    theirs = transformers.pipeline("fill-mask", masked, device="cpu")
    ours = fastbert.pipeline("fill-mask", masked)
    if way == "live":
        model = transformers.AutoModelForMaskedLM.from_pretrained(masked)
        ours = fastbert.pipeline("fill-mask", model, tokenizer=transformers.AutoTokenizer.from_pretrained(masked))
    texts = with_masks(ours.tokenizer, TEXTS)
    assert len(texts) > 30
    cut = {"tokenizer_kwargs": {"truncation": True}}
    kept = [text for text in texts if len(ours.tokenizer(text)["input_ids"]) <= LENGTH]
    same(ours(kept, **options), theirs(kept, **options, **cut))
    same(ours(kept[0], **options), theirs(kept[0], **options))
    same(ours(kept[:1], **options), theirs(kept[:1], **options))


@pytest.mark.parametrize("size", [40, 1000])
@pytest.mark.parametrize("count", [1, 3, 10, 40, 50, 300])
def test_the_best_are_those_of_a_whole_sort(count, size):
    generator = np.random.default_rng(count)
    for scores in (generator.integers(0, 6, size).astype(np.float32), generator.random(size, dtype=np.float32)):
        scores[3] = scores[17]
        assert _best(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()
    assert len(_best(np.full(size, np.nan, np.float32), count)) == min(count, size)


def test_masks_decoded_in_parts_are_as_one_by_one(masked, monkeypatch):
    ours = fastbert.pipeline("fill-mask", masked)
    mask = ours.tokenizer.mask_token
    texts = [f"a {mask}", f"{mask} the {mask}", f"the {mask} ran", f"{mask} {mask} {mask}", f"{mask}."] * 3
    together = ours(texts)
    assert [len(answer[0]) if isinstance(answer[0], list) else 1 for answer in together] == [1, 5, 1, 5, 1] * 3
    monkeypatch.setattr(fill_mask, "DECODED", 12)  # two texts of five tokens
    assert ours(texts) == together == [ours(text) for text in texts]


def test_fill_mask_refuses(masked):
    ours = fastbert.pipeline("fill-mask", masked)
    mask = ours.tokenizer.mask_token
    with pytest.raises(ValueError, match=f"the text has no {mask.replace('[', '.').replace(']', '.')}: 'cat'"):
        ours("cat")
    with pytest.raises(ValueError, match=r"has \d+ tokens; the model takes 64"):
        ours(f"{mask} " + make_texts()[8])
    with pytest.raises(ValueError, match="top_k is 0"):
        ours(f"a {mask}", top_k=0)


def test_feature_extraction(bert):
    theirs = transformers.pipeline("feature-extraction", bert, device="cpu")
    ours = fastbert.pipeline("feature-extraction", bert)
    texts = TEXTS[:20]
    for mine, wanted in zip(ours(texts, truncation=True), theirs(texts, truncation=True), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)
    assert torch.is_tensor(ours("cat", return_tensors=True))
    text = make_texts()[8]
    assert np.shape(ours(text)) == (1, len(ours.tokenizer(text)["input_ids"]), 32)


def test_similarity(bert):
    ours = fastbert.pipeline("similarity", bert)
    vectors = ours.embedder.embed(TEXTS[:5])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(ours(TEXTS[:5]), unit @ unit.T, atol=1e-6)
    np.testing.assert_allclose(
        ours(TEXTS[:2], TEXTS[:5], score_function="dot_score"), vectors[:2] @ vectors.T, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["cos_sim", "dot_score", "euclidean", "manhattan"])
def test_similarities_are_sentence_transformers(kind):
    from sentence_transformers import util

    a, b = (np.random.default_rng(seed).standard_normal((n, 8)).astype(np.float32) for seed, n in ((0, 5), (1, 7)))
    name = {"euclidean": "euclidean_sim", "manhattan": "manhattan_sim"}.get(kind, kind)
    np.testing.assert_allclose(similarity(a, b, kind), getattr(util, name)(a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cos_sim", "dot_score", "euclidean"])
def test_search_is_exact(tmp_path, kind):
    """The ten best of 100,000, from a mapped file in blocks: brute force's, ties by place."""
    draw = np.random.default_rng(0)
    corpus = draw.standard_normal((100_000, 16)).astype(np.float32)
    corpus[50_000] = corpus[7] = corpus[99_999]
    corpus[11] = np.nan
    queries = np.concatenate([draw.standard_normal((20, 16)).astype(np.float32), corpus[7:8]])
    np.save(tmp_path / "corpus.npy", corpus)
    found = fastbert.search(queries, tmp_path / "corpus.npy", 10, score_function=kind, block=30_000)
    scores = similarity(queries, corpus, kind)
    scores[:, 11] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    assert [[hit["corpus_id"] for hit in hits] for hits in found] == best.tolist()
    assert kind == "dot_score" or [hit["corpus_id"] for hit in found[-1][:3]] == [7, 50_000, 99_999]
    np.testing.assert_allclose(
        [[hit["score"] for hit in hits] for hits in found], np.take_along_axis(scores, best, 1), rtol=1e-5, atol=1e-5
    )
    few = fastbert.search(queries[0], corpus[9:13], 10, score_function=kind)
    assert sorted(hit["corpus_id"] for hit in few[0]) == [0, 1, 3]


@pytest.mark.parametrize("kind", ["cos_sim", "dot_score"])
def test_faiss_finds_the_same(kind):
    draw = np.random.default_rng(0)
    corpus, queries = (draw.standard_normal((n, 16)).astype(np.float32) for n in (2000, 9))
    exact, faiss = (fastbert.search(queries, corpus, 7, score_function=kind, index=i) for i in ("exact", "faiss"))
    same(faiss, exact)
    with pytest.raises(ValueError, match="score_function is 'euclidean'; index 'faiss' knows cos_sim and dot_score"):
        fastbert.search(queries, corpus, score_function="euclidean", index="faiss")


def test_search_is_sentence_transformers():
    from sentence_transformers import util

    draw = np.random.default_rng(0)
    corpus, queries = (draw.standard_normal((n, 16)).astype(np.float32) for n in (500, 9))
    same(fastbert.search(queries, corpus, 7), util.semantic_search(queries, corpus, top_k=7))
    many = draw.standard_normal((600, 16)).astype(np.float32)  # in several blocks of queries
    for name in (util.dot_score, "dot"):
        found = fastbert.search(many, corpus, 3, score_function=name)
        same(found, util.semantic_search(many, corpus, top_k=3, score_function=util.dot_score))
    assert fastbert.search(np.empty((0, 16), np.float32), corpus) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"score_function": "near"}, "score_function is 'near'; it must be one of cos_sim, dot_score"),
        ({"corpus": np.zeros((3, 5), np.float32)}, "queries have 4 numbers, the corpus 5"),
        (
            {"corpus": np.full((3, 4), "a")},
            r"corpus has shape \(3, 4\) and dtype <U1; it must be \(N, E\) of numbers",
        ),
        ({"index": "tree"}, "index is 'tree'; it must be 'exact' or 'faiss'"),
    ],
)
def test_search_refuses(given, message):
    vectors = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        fastbert.search(**{"queries": vectors, "corpus": vectors, **given})


def test_rerank(tmp_path):
    from sentence_transformers import CrossEncoder

    folder = save(tmp_path, "bert", "ForSequenceClassification", num_labels=1)
    theirs = CrossEncoder(folder, device="cpu")
    documents = [text for text in TEXTS if text]
    wanted = theirs.rank("the lazy dog", documents, return_documents=True)
    found = fastbert.rerank("the lazy dog", documents, model=folder, return_documents=True, truncation=True)
    same([hit["score"] for hit in found], [float(hit["score"]) for hit in wanted])
    same({hit["corpus_id"]: hit for hit in found}, {hit["corpus_id"]: hit for hit in wanted})
    ranker = fastbert.pipeline("rerank", folder)
    with pytest.raises(TypeError, match="documents is a str"):
        ranker.rank("a", "one document")
    with pytest.raises(TypeError, match="top_k2 is given, but model is a pipeline already"):
        fastbert.rerank("a", ["b"], model=ranker, top_k2=3)
    assert len(ranker.rank("a", (text for text in documents[:3]))) == 3
    assert len(ranker.rank("the lazy dog", documents, top_k=3)) == 3 and ranker.rank("a", []) == []
    long = make_texts()[8]
    parts = [ranker(("dog", long[i : i + 150])) for i in range(0, 1500, 150)]
    assert ranker(("dog", long)) >= min(parts)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match="the model has 3 labels; a reranker has one"):
        fastbert.pipeline("rerank", model, tokenizer=folder)(("a", "b"))


def test_multiple_choice(tmp_path):
    folder = save(tmp_path, "bert", "ForMultipleChoice")
    model = transformers.AutoModelForMultipleChoice.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    items = [
        {"text": a, "choices": [b, c, "the fox"][: 2 + i % 2]}
        for i, (a, b, c) in enumerate(zip(TEXTS[9:20], TEXTS[20:31], TEXTS[31:42], strict=True))
    ]
    for item, answer in zip(items, fastbert.pipeline("multiple-choice", folder)(items, truncation=True), strict=True):
        pairs = [(item["text"], choice) for choice in item["choices"]]
        inputs = tokenizer(pairs, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            scores = model(**{name: x[None] for name, x in inputs.items()}).logits[0].softmax(-1)
        same(answer, {"label": int(scores.argmax()), "score": float(scores.max()), "scores": scores.tolist()})


def test_summary(bert):
    text = " ".join(
        f"{word} {TEXTS[20 + i]} and the end of it."
        for i, word in enumerate(["One", "Two", "Three", "Four", "Five", "Six"])
    )
    ours = fastbert.pipeline("summarization", bert, min_length=1)
    sentences = sentences_of(text)
    found = ours(text, num_sentences=3, return_as_list=True)
    places = [sentences.index(sentence) for sentence in found]
    assert len(found) == 3 and places == sorted(places) and places[0] == 0
    assert ours(text, num_sentences=3, return_indices=True) == places
    assert ours(text, num_sentences=3) == " ".join(found)
    assert ours([text, ""], num_sentences=1) == [sentences[0], ""]
    assert len(ours(text, ratio=0.5, return_as_list=True)) == round(len(sentences) / 2)
    with pytest.raises(ValueError, match="ratio is 2; it must be above 0"):
        ours(text, ratio=2)


def test_sentences():
    text = 'He said "Stop!" Then he left. 中文。没有空格！A number 3.14 stays.\n\nA new part'
    assert sentences_of(text) == [
        'He said "Stop!"',
        "Then he left.",
        "中文。",
        "没有空格！",
        "A number 3.14 stays.",
        "A new part",
    ]


@pytest.mark.parametrize("where", ["sentence_transformers", "older"])
@pytest.mark.parametrize("name", ["Identity", "Sigmoid", "Tanh"])
def test_a_rerankers_activation_is_its_folders(tmp_path, name, where):
    folder = save(tmp_path, "bert", "ForSequenceClassification", num_labels=1)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    function = f"torch.nn.modules.activation.{name}" if name != "Identity" else "torch.nn.modules.linear.Identity"
    if where == "older":
        config["sbert_ce_default_activation_function"] = function
    else:
        config["sentence_transformers"] = {"activation_fn": function}
    path.write_text(json.dumps(config))
    ranker = fastbert.pipeline("rerank", folder)
    if name == "Tanh":
        with pytest.raises(ValueError, match=r"the activation 'torch.*Tanh'; it must be one of Sigmoid, Identity"):
            ranker(("a", "b"))
        return
    logit = fastbert.pipeline("text-classification", folder, function_to_apply="none")(("a", "b"))["score"]
    assert ranker(("a", "b")) == pytest.approx(logit if name == "Identity" else 1 / (1 + np.exp(-logit)), abs=1e-6)


def test_similarity_takes_lists(bert):
    ours = fastbert.pipeline("similarity", bert)
    with pytest.raises(TypeError, match="first is a str; it must be a list of texts"):
        ours("a text")
    long = make_texts()[8]
    halves = ours.embedder.embed([long], long="mean")
    expected = similarity(halves, ours.embedder.embed(["cat"]))[0, 0]
    assert ours([long], ["cat"])[0, 0] == pytest.approx(expected, abs=1e-6)


def test_vectors_of_live_models(bert):
    """An encoder of fastbert, and a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    expected = fastbert.pipeline("similarity", bert)(TEXTS[:5])
    own = fastbert.AutoModel.from_pretrained(bert)
    np.testing.assert_allclose(fastbert.pipeline("similarity", own, tokenizer=bert)(TEXTS[:5]), expected, atol=1e-6)
    live = SentenceTransformer(bert, device="cpu")
    np.testing.assert_allclose(fastbert.pipeline("similarity", live)(TEXTS[:5]), expected, atol=1e-5)
    article = " ".join(f"{text}." for text in TEXTS if len(text) > 40)
    assert fastbert.pipeline("summarization", live, num_sentences=2)(article)
    with pytest.raises(TypeError, match="model is a BertModel; for vectors it must be a folder"):
        fastbert.pipeline("similarity", transformers.AutoModel.from_pretrained(bert))


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary", "float32"])
def test_vectors_in_fewer_bits(bert, precision):
    from sentence_transformers.util import quantize_embeddings

    embedder = fastbert.Embedder.from_pretrained(bert)
    vectors = embedder.embed(TEXTS[:20], truncate_dim=16, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    made = embedder.embed(TEXTS[:20], truncate_dim=16, normalize=True, precision=precision)
    expected = quantize_embeddings(vectors, precision)
    assert made.dtype == expected.dtype and np.array_equal(made, expected)
    if precision in ("int8", "uint8"):
        hits = fastbert.search(made[:3], made, 1, score_function="euclidean")
        assert [hit["corpus_id"] for (hit,) in hits] == [0, 1, 2]
    with pytest.raises(ValueError, match="precision is 'int4'; it must be one of float32, int8"):
        embedder.embed(["a"], precision="int4")
    with pytest.raises(ValueError, match="truncate_dim is 99; it must be 1 to 32"):
        embedder.embed(["a"], truncate_dim=99)
