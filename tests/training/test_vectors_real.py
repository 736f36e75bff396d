"""Embedders and a reranker trained from MiniLM on real pairs, against sentence-transformers: minutes each, so slow."""

from __future__ import annotations

import csv
import json
import time

import finetune_data
import numpy as np
import pytest
import torch
from assets import AssetUnavailable, fetch
from finetune_support import write_jsonl
from pairs_data import pairs_of, write_pairs

import fastbert
from fastbert.cli.main import main
from fastbert.inference.embed import Embedder
from fastbert.tasks.mining import Mining, mine
from fastbert.tasks.vector_search import search
from fastbert.training.finetune import metrics
from fastbert.training.finetune.examples import Reading
from fastbert.training.finetune.recipe import Recipe
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.trials import training_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]
st = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
TRAIN, DEV, BATCH, RATE = 2000, 500, 64, 5e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    try:
        return write_pairs(tmp_path_factory.mktemp("pairs"), train=TRAIN, dev=DEV)
    except AssetUnavailable as reason:
        pytest.skip(str(reason))


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def retrieval(data, embedder):
    """nDCG@10 and MRR@10 of the held-out questions among all passages of their articles; and what each finds."""
    corpus = (data / "corpus.txt").read_text(encoding="utf-8").splitlines()
    rows = rows_of(data / "dev.jsonl")
    hits = search(embedder.embed([row["anchor"] for row in rows]), embedder.embed(corpus), 20)
    found = [[corpus[hit["corpus_id"]] for hit in of] for of in hits]
    grades = [[float(t == row["positive"]) for t in texts[:10]] for texts, row in zip(found, rows, strict=True)]
    return metrics.ranking(grades, [[1.0]] * len(rows)), found


def by_sentence_transformers(folder, run, columns, labels, criterion_of):
    """Its model and loss on the batches of a run, with torch's AdamW and the run's schedule; and the seconds."""
    model = st.SentenceTransformer(folder, device="cpu")
    criterion = criterion_of(model)
    plain = ("bias", "LayerNorm.weight")
    named = [(n, p) for n, p in model.named_parameters() if "pooler" not in n]
    groups = [
        {"params": [p for n, p in named if not n.endswith(plain)], "weight_decay": 0.01},
        {"params": [p for n, p in named if n.endswith(plain)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    model.train()
    torch.manual_seed(0)
    start = time.perf_counter()
    for step, (places,) in enumerate(run.plan):
        for group in optimizer.param_groups:
            group["lr"] = run.schedule(step)
        features = [model.preprocess([column[i] for i in places]) for column in columns]
        loss = criterion(features, None if labels is None else torch.tensor([labels[i] for i in places]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
    return model.eval(), time.perf_counter() - start


def started(folder, train, dev, out, reading=None, **settings):
    given = FinetuneSettings(task="embedding", epochs=1, batch_size=BATCH, lr=RATE, **settings)
    recipe = Recipe.read(given, folder, {"train": train, "dev": dev}, reading or Reading())
    run = training_of(recipe, recipe.fresh_model(folder), out)
    run.evaluate_heldout = lambda: ({"loss": 0.0}, [])  # what is timed is training
    run.heldout_loss = None
    return run


def test_questions_find_their_passages(minilm, data, tmp_path, capsys):
    """One epoch gains as much as sentence-transformers' with the same recipe, in at most half its time."""
    run = started(str(minilm), data / "train.jsonl", data / "dev.jsonl", tmp_path / "run")
    before, _ = retrieval(data, Embedder.from_pretrained(minilm))
    start = time.perf_counter()
    run.run()
    own_seconds = time.perf_counter() - start
    run.model.save_pretrained(tmp_path / "own")
    run.tokenizer.save_pretrained(tmp_path / "own")
    rows = rows_of(data / "train.jsonl")
    columns = [[row[name] for row in rows] for name in ("anchor", "positive")]
    model, their_seconds = by_sentence_transformers(
        str(minilm), run, columns, None, losses.MultipleNegativesRankingLoss
    )
    model.save(str(tmp_path / "theirs"))
    own, _ = retrieval(data, Embedder.from_pretrained(tmp_path / "own"))
    theirs, _ = retrieval(data, Embedder.from_pretrained(tmp_path / "theirs"))
    name = "ndcg_at_10"
    with capsys.disabled():
        print(f"\n{name}: start {before[name]:.4f}, own {own[name]:.4f}, theirs {theirs[name]:.4f}")
        print(f"seconds: own {own_seconds:.0f}, theirs {their_seconds:.0f}: {own_seconds / their_seconds:.2f}")
    assert own[name] - before[name] >= theirs[name] - before[name] - 0.005
    assert own_seconds < 0.5 * their_seconds


def test_cosent_on_sts(minilm, tmp_path, capsys):
    try:
        folder = finetune_data.write_task("stsb", tmp_path)
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    parts = {}
    for name in ("train", "dev", "test"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        parts[name] = [
            {"text": row["sentence1"], "pair": row["sentence2"], "label": float(row["score"]) / 5} for row in rows
        ]
    train, dev = (write_jsonl(tmp_path / f"{name}.jsonl", parts[name]) for name in ("train", "dev"))
    run = started(str(minilm), train, dev, tmp_path / "run")
    run.run()
    columns = [[row[name] for row in parts["train"]] for name in ("text", "pair")]
    labels = [row["label"] for row in parts["train"]]
    model, _ = by_sentence_transformers(str(minilm), run, columns, labels, losses.CoSENTLoss)

    def spearman(embed):
        a, b = (embed([row[name] for row in parts["test"]]) for name in ("text", "pair"))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return 100 * metrics.regression([row["label"] for row in parts["test"]], cosines.tolist())["spearman"]

    run.model.eval()
    before, own, theirs = (
        spearman(Embedder.from_pretrained(minilm).embed),
        spearman(run.model.embed),
        spearman(model.encode),
    )
    with capsys.disabled():
        print(f"\nSpearman on STS-B's test: start {before:.2f}, own {own:.2f}, theirs {theirs:.2f}")
    assert own >= theirs - 0.3


def test_a_reranker_on_mined_negatives_beats_the_embedder(minilm, data, tmp_path, capsys):
    """Both see the same questions; the reranker puts the embedder's twenty best in order."""
    mined = tmp_path / "mined.jsonl"
    corpus = tmp_path / "train-passages.txt"
    passages = dict.fromkeys(row["positive"] for row in rows_of(data / "train.jsonl"))
    corpus.write_text("".join(f"{passage}\n" for passage in passages), encoding="utf-8")
    command = ["mine", str(minilm), str(corpus), str(data / "train.jsonl"), "-o", str(mined)]
    assert main([*command, "--num-negatives", "4", "--output-format", "labeled-list"]) == 0
    found = fastbert.finetune(
        minilm, mined, task="rerank", loss="binary", epochs=2, lr=1e-4, batch_size=8, max_length=192, dev_share=0.05
    )
    scores, texts = retrieval(data, Embedder.from_pretrained(minilm))
    rows, ranking = rows_of(data / "dev.jsonl"), found.pipeline()
    pairs = [(row["anchor"], text) for row, of in zip(rows, texts, strict=True) for text in of]
    logits = np.array(ranking(pairs, truncation=True)).reshape(len(rows), -1)
    order = np.argsort(-logits, axis=1, kind="stable")
    grades = [[float(texts[i][j] == row["positive"]) for j in order[i][:10]] for i, row in enumerate(rows)]
    after = metrics.ranking(grades, [[1.0]] * len(rows))
    with capsys.disabled():
        print(f"\nMRR@10: embedder {scores['mrr_at_10']:.4f}, reranker {after['mrr_at_10']:.4f}")
    assert after["mrr_at_10"] > scores["mrr_at_10"]


def test_mining_of_many_passages_equals_brute_force(minilm, tmp_path):
    """20,000 passages, by exact search and by FAISS."""
    try:
        rows = rows_of(write_pairs(tmp_path, train=200, dev=10) / "train.jsonl")
        passages = dict.fromkeys(p for _, p in pairs_of(fetch("squad") / "train-v1.1.json"))
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    sentences = [s for passage in passages for s in passage.split(". ") if len(s) > 20]
    corpus = list(dict.fromkeys(s[:120] for s in sentences))[:20_000]
    assert len(corpus) == 20_000
    embedder = Embedder.from_pretrained(minilm, max_length=32)
    pairs = [(row["anchor"], row["positive"]) for row in rows]
    every = list(dict.fromkeys([*corpus, *(p for _, p in pairs)]))
    vectors, queries = embedder.embed(every), embedder.embed([q for q, _ in pairs])
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    scores = unit(queries) @ unit(vectors).T
    for index in ("exact", "faiss"):
        mined = mine(pairs, corpus, embedder, Mining(num_negatives=5, index=index))
        for i, one in enumerate(mined):
            own = {p for q, p in pairs if q == one.query}
            best = [j for j in np.argsort(-scores[i], kind="stable") if every[j] not in own][:5]
            assert [s for _, s in one.negatives] == pytest.approx(scores[i][best].tolist(), abs=1e-5)
            assert [t for t, _ in one.negatives] == [every[j] for j in best] or index == "faiss"
