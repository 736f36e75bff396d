"""The training of embedders: exact gradients in parts, sentence-transformers' curve, its folders, and bad data."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_support import NAMES, PLACES, VOCAB, save_model, sentence, write_csv, write_jsonl

import fastbert
from fastbert.inference.embed import Embedder
from fastbert.training.finetune.examples import DataError, Reading
from fastbert.training.finetune.recipe import Recipe
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.trials import training_of
from fastbert.training.objective import Counts
from fastbert.training.vectors.model import TextEncoder

N = 24


def pairs(n=N):
    return [
        {"anchor": " ".join(sentence(i)), "positive": f"{NAMES[i % 8]} in {PLACES[i // 3 % 8]} . {VERB(i)}"}
        for i in range(n)
    ]


def VERB(i):
    return ["saw", "left", "loves", "hates", "found", "lost"][i % 6]


def triplets(n=N):
    """Their negatives are texts that no other example has."""
    return [row | {"negative": f"the {pairs(n)[(i + 5) % n]['positive']} today"} for i, row in enumerate(pairs(n))]


def scored(n=N):
    return [
        {"text": " ".join(sentence(i)), "pair": " ".join(sentence(i + 5)), "label": i * 7 % n / n} for i in range(n)
    ]


def classes(n=N):
    return [{"text": " ".join(sentence(i)), "label": NAMES[i % 8]} for i in range(n)]


def make(folder: Path, rows, task="embedding", model=None, processes=None, **settings):
    folder.mkdir(exist_ok=True, parents=True)
    model = model or save_model(folder / "model")
    data = write_jsonl(folder / "data.jsonl", rows)
    settings = {"epochs": 1, "batch_size": N, "lr": 2e-3, **settings}
    recipe = Recipe.read(FinetuneSettings(task=task, **settings), model, {"train": data, "dev": data})
    options = {} if processes is None else {"processes": processes}
    return training_of(recipe, recipe.fresh_model(model), folder / "out", **options)


def gradients(run):
    """Of the first step, by name."""
    run.model.train()
    run.model.zero_grad()
    batches = run.next_step()
    loss = run.backward(batches, sum((batch.counts for batch in batches), Counts()))
    return float(loss), {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def assert_close(mine, theirs):
    assert mine.keys() == theirs.keys()
    together = lambda found: torch.cat([found[name].flatten() for name in theirs])  # noqa: E731
    whole = together(theirs).norm()
    assert (together(mine) - together(theirs)).norm() <= 1e-6 * whole
    for name, gradient in theirs.items():
        if name.endswith("key.bias"):  # adds one number to all scores of a query: its gradient is rounding alone
            assert max(mine[name].norm(), gradient.norm()) < 1e-6 * whole
        else:  # the parts of a bias's sum cancel
            assert (mine[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A model with dropout."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder / "m", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_hidden_layers=3)


@pytest.mark.parametrize("loss", ["ranking", "symmetric-ranking"])
@pytest.mark.parametrize("tokens", [1, 17, 50, 128])
def test_parts_of_any_size_have_the_gradient_of_the_whole(tmp_path, dropping, loss, tokens):
    """With dropout: the masks of a part are those that its rows have in the whole."""
    whole_loss, whole = gradients(make(tmp_path / "whole", triplets(), model=dropping, loss=loss))
    run = make(tmp_path / "parts", triplets(), model=dropping, loss=loss, mini_batch_tokens=tokens)
    assert len(run._parts(run.next_step()[0])) > 3
    part_loss, parts = gradients(run)
    assert part_loss == pytest.approx(whole_loss, rel=1e-6)
    assert_close(parts, whole)


def test_dropout_is_on_and_another_in_each_step(tmp_path, dropping):
    run = make(tmp_path / "a", pairs(), model=dropping, epochs=3)
    first, _ = gradients(run)
    assert gradients(run)[0] == first  # a step's masks follow from its number
    run.step = 1
    run.plan[1] = run.plan[0]
    assert gradients(run)[0] != first
    still = make(tmp_path / "b", pairs(), model=dropping, dropout=0.0)
    assert abs(gradients(still)[0] - first) > 1e-3


def test_two_processes_have_the_gradient_of_one(tmp_path, dropping):
    """Over gloo, each with its part of the batch, and unlike numbers of tokens."""
    loss, whole = gradients(make(tmp_path / "one", triplets(23), model=dropping))
    script = Path(__file__).parent.parent / "vectors_driver.py"
    write_jsonl(tmp_path / "data.jsonl", triplets(23))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    subprocess.run([*command, str(script), str(dropping), str(tmp_path)], check=True, capture_output=True, timeout=300)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert found.pop("loss") * 2 == pytest.approx(loss, rel=1e-6)
        assert_close(found, whole)


def train_there(folder, batches, loss, dims=None, mini_batch=None):
    """The losses of sentence-transformers on the same batches, by the same optimizer."""
    st = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = st.SentenceTransformer(str(folder), device="cpu")
    kinds = {"ranking": losses.MultipleNegativesRankingLoss, "cosent": losses.CoSENTLoss}
    if mini_batch:
        criterion = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch)
    else:
        criterion = kinds[loss](model)
    if dims:
        criterion = losses.MatryoshkaLoss(model, criterion, list(dims))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    found = []
    for columns, labels in batches:
        features = [
            model.preprocess(texts) if hasattr(model, "preprocess") else model.tokenize(texts) for texts in columns
        ]
        value = criterion(features, labels)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize(
    "loss, dims, mini_batch",
    [("ranking", None, None), ("ranking", None, 5), ("cosent", None, None), ("ranking", (48, 16), None)],
    ids=["ranking", "cached", "cosent", "matryoshka"],
)
def test_a_hundred_steps_follow_sentence_transformers(tmp_path, loss, dims, mini_batch):
    model = save_model(tmp_path / "model")
    start = TextEncoder.from_pretrained(model)
    start.save_pretrained(tmp_path / "st")  # with modules.json
    fastbert.BertTokenizer(VOCAB, model_max_length=64).save_pretrained(tmp_path / "st")
    rows = scored() if loss == "cosent" else triplets()
    options = {"mini_batch_tokens": 40} if mini_batch else {}
    run = make(
        tmp_path / "own",
        rows,
        model=tmp_path / "st",
        loss=loss,
        dims=dims,
        batch_size=6,
        epochs=25,
        lr=1e-3,
        weight_decay=0.0,
        schedule="constant",
        warmup_share=0.0,
        evaluate_every=1000,
        **options,
    )
    own: list[float] = []
    backward = run.backward

    def noted(*args):
        own.append(float(backward(*args)))
        return torch.tensor([own[-1]])

    run.backward = noted
    run.run()
    names = ("text", "pair") if loss == "cosent" else ("anchor", "positive", "negative")
    batches = []
    for (places,) in run.plan:
        labels = torch.tensor([rows[i]["label"] for i in places]) if loss == "cosent" else None
        batches.append(([[rows[i][name] for i in places] for name in names], labels))
    theirs = train_there(tmp_path / "st", batches, loss, dims, mini_batch)
    assert len(own) == len(theirs) == 100
    np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rows, score, least",
    [
        (pairs, "mrr_at_10", 0.99),
        (triplets, "mrr_at_10", 0.99),
        (scored, "spearman", 0.95),
        (classes, "mrr_at_10", 0.95),
    ],
)
def test_examples_are_learned_by_heart(tmp_path, rows, score, least):
    run = make(tmp_path, rows(), epochs=60, batch_size=12, lr=5e-4, evaluate_every=1000)
    before = run.evaluate(run.recipe.dev).scores
    run.run()
    after = run.evaluate(run.recipe.dev).scores
    assert before[score] < least <= after[score], (before, after)


def test_the_command_writes_what_sentence_transformers_loads(tmp_path, capsys):
    st = pytest.importorskip("sentence_transformers")
    from fastbert.cli.main import main

    save_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    out = tmp_path / "out"
    command = ["finetune", "--task", "embedding", "--model", str(tmp_path / "model"), "--train", str(data)]
    command += ["--dev", str(data), "--epochs", "20", "--batch-size", "8", "--lr", "2e-3", "-o", str(out)]
    assert main([*command, "--dims", "48,16", "--mini-batch-tokens", "60", "--max-length", "20"]) == 0
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 20
    assert "ndcg_at_10" in capsys.readouterr().err
    texts = [row["anchor"] for row in pairs()]
    theirs = st.SentenceTransformer(str(out), device="cpu").encode(texts)
    mine = Embedder.from_pretrained(out).embed(texts)
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    report = json.loads((out / "report" / "metrics.json").read_text())
    assert {"ndcg_at_10", "mrr_at_10", "recall_at_10", "loss"} == report["dev"].keys()
    for picture in ("learning-curves.png", "similarities-dev.png"):
        assert (out / "report" / picture).read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
    assert not (out / "checkpoints").exists()


def test_modules_prompts_and_normalize_are_those_of_the_folder(tmp_path):
    """A Dense is trained, and saved where it was; the prompts stand before anchors and positives."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    save_model(tmp_path / "base")
    parts = [
        modules.Transformer(str(tmp_path / "base")),
        modules.Pooling(48, pooling_mode="cls"),
        modules.Dense(48, 20),
        modules.Normalize(),
    ]
    theirs = st.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "who ", "document": "where "})
    theirs.save(str(tmp_path / "st"))
    before = TextEncoder.from_pretrained(tmp_path / "st")
    run = make(tmp_path / "run", pairs(), model=tmp_path / "st", batch_size=12, evaluate_every=1000)
    assert run.recipe.settings.query_prompt == "who " and run.recipe.settings.document_prompt == "where "
    ids = [feature.sequences for feature in run.recipe.train.features]
    assert {VOCAB[of[0][0][1]] for of in ids} == {"who"} and {VOCAB[of[1][0][1]] for of in ids} == {"where"}
    run.run()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before.state_dict()[name])}
    assert {"rows.0.linear_weight", "rows.0.linear_bias"} <= moved
    run.model.save_pretrained(tmp_path / "out")
    run.tokenizer.save_pretrained(tmp_path / "out")
    texts = [row["anchor"] for row in pairs()]
    again = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(run.model.embed(texts), again.encode(texts), atol=1e-5)
    assert again.prompts["query"] == "who "


def test_a_prompt_that_the_pooling_leaves_out(tmp_path):
    save_model(tmp_path / "model")
    model = TextEncoder.from_pretrained(tmp_path / "model")
    model.files = {
        **model.files,
        "1_Pooling/config.json": json.dumps(
            {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True, "include_prompt": False}
        ),
    }
    model.save_pretrained(tmp_path / "st")
    fastbert.BertTokenizer(VOCAB, model_max_length=64).save_pretrained(tmp_path / "st")
    run = make(tmp_path / "run", pairs(), model=tmp_path / "st", query_prompt="who is ")
    feature = run.recipe.train.features[0]
    assert feature.skip == (3, 0)  # [CLS] and two words; the document has no prompt
    embedder = Embedder.from_pretrained(tmp_path / "st")
    text = pairs()[0]["anchor"]
    arguments = run.task.collate([feature])
    vectors = run.model.eval()(**arguments).detach().numpy()
    np.testing.assert_allclose(vectors[0], embedder.embed([text], prompt="who is ")[0], atol=1e-5)
    run.model.save_pretrained(tmp_path / "out")  # with the prompts that it was trained with
    run.tokenizer.save_pretrained(tmp_path / "out")
    again = Embedder.from_pretrained(tmp_path / "out")
    assert again.prompts == {"query": "who is ", "document": ""}
    np.testing.assert_allclose(again.embed([text], prompt_name="query"), vectors[:1], atol=1e-5)


@pytest.mark.parametrize("rows", [scored, classes])
def test_the_default_prompt_stands_before_texts_that_are_no_queries(tmp_path, rows):
    save_model(tmp_path / "model")
    model = TextEncoder.from_pretrained(tmp_path / "model")
    prompts = {"prompts": {"query": "who ", "all": "saw "}, "default_prompt_name": "all"}
    model.files = {**model.files, "config_sentence_transformers.json": json.dumps(prompts)}
    model.save_pretrained(tmp_path / "st")
    fastbert.BertTokenizer(VOCAB, model_max_length=64).save_pretrained(tmp_path / "st")
    for options, word in (({}, "saw"), ({"query_prompt": "left "}, "left")):
        run = make(tmp_path / word, rows(), model=tmp_path / "st", **options)
        first = {VOCAB[ids[1]] for feature in run.recipe.train.features for ids, _ in feature.sequences}
        assert first == {word}
    with pytest.raises(ValueError, match=r"document_prompt is 'x'; (pairs|texts) with a (score|class) have no doc"):
        make(tmp_path / "x", rows(), model=tmp_path / "st", document_prompt="x")


class Killed(Exception):
    pass


@pytest.mark.parametrize("task, rows", [("embedding", triplets), ("rerank", triplets)])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path, dropping, task, rows):
    options = {"epochs": 3, "batch_size": 6, "evaluate_every": 2, "task": task, "model": dropping}
    options |= {"mini_batch_tokens": 40, "dims": (48, 16)} if task == "embedding" else {"loss": "lambda"}
    whole = make(tmp_path / "a", rows(), **options)
    whole.run()
    killed = make(tmp_path / "b", rows(), **options)

    def kill(*_):
        if killed.step == 5:
            raise Killed

    killed.optimizer.register_step_pre_hook(kill)
    with pytest.raises(Killed):
        killed.run()
    again = make(tmp_path / "b", rows(), **options)
    again.resume(again.checkpoints.newest())
    assert again.step == 4
    again.run()
    for (name, p), q in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_command_that_is_killed_is_resumed_bit_for_bit(tmp_path, dropping):
    """By SIGKILL, at whatever it does."""
    data = write_jsonl(tmp_path / "data.jsonl", triplets())
    command = [sys.executable, "-m", "fastbert", "finetune", "--task", "embedding", "--model", str(dropping)]
    command += ["--train", str(data), "--dev", str(data), "--epochs", "30", "--batch-size", "6", "--save-every", "1"]
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "killed"
    with subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (out / "checkpoints" / "step-00000003").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (out / "config.json").exists()
    subprocess.run([*command, "-o", str(out), "--resume"], check=True, capture_output=True)
    for name in ("model.safetensors", "modules.json", "report/predictions-dev.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


GOOD = {"anchor": "anna saw rome", "positive": "bob left oslo"}
BAD = {
    "no positive": ({"anchor": "anna"}, "positive"),
    "empty text": ({**GOOD, "positive": " "}, "positive is ' '; it must be a text, not empty"),
    "equal": ({"anchor": "anna", "positive": "anna", "negative": "bob"}, "anchor and positive are equal, 'anna'"),
    "its own negative": ({**GOOD, "negative": GOOD["positive"]}, "positive is one of its negatives"),
    "a score without negatives": ({**GOOD, "label": 0.5}, "there is a label and no negative; a pair with a score"),
    "labels": ({**GOOD, "negative": "rome", "label": [1, 2, 3]}, "label has 3 numbers; it must have 1, a teacher's"),
    "other texts": ({**GOOD, "negative": "rome"}, "3 texts and no label"),
    "no columns": ({"a": "x"}, "there is no column 'anchor' and none 'text', but 'a'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_one_error_with_file_and_line(tmp_path, name):
    row, message = BAD[name]
    with pytest.raises(DataError, match=r"data\.jsonl:2: ") as error:
        make(tmp_path, [GOOD, row])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_scores_and_losses_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match=r"data.jsonl:1: the score is 3.5; loss 'cosine' takes -1 to 1"):
        make(tmp_path / "a", [{"text": "anna", "pair": "bob", "label": 3.5}] * 2, loss="cosine")
    with pytest.raises(DataError, match=r"data.jsonl:1: the examples are pairs or triplets without a label; loss 'cos"):
        make(tmp_path / "b", pairs(), loss="cosent")
    with pytest.raises(ValueError, match="loss is 'lambda'; embedding has the losses ranking"):
        make(tmp_path / "c", pairs(), loss="lambda")
    with pytest.raises(ValueError, match="dims holds 64; the model's vectors have 48 numbers"):
        make(tmp_path / "d", pairs(), dims=(48, 64))
    with pytest.raises(ValueError, match=r"dims is \(\); it must hold at least one width"):
        make(tmp_path / "d", pairs(), dims=())
    with pytest.raises(ValueError, match="batch_size is 1; loss 'ranking' compares the examples of a batch"):
        make(tmp_path / "d", pairs(), batch_size=1)
    make(tmp_path / "d", triplets(), batch_size=1)  # each has a negative of its own
    with pytest.raises(ValueError, match="scale is 5; loss 'cosine' has none"):
        make(tmp_path / "d", scored(), loss="cosine", scale=5.0)
    with pytest.raises(ValueError, match="accumulate is 2; a step of embedding is one batch"):
        make(tmp_path / "e", pairs(), accumulate=2)
    with pytest.raises(DataError, match=r"data.jsonl:1: the label is 2; loss 'binary' takes 0 to 1"):
        make(tmp_path / "f", [{"query": "a", "document": "b", "label": 2}] * 2, task="rerank")
    with pytest.raises(DataError, match=r"data.jsonl:1: the query has one document; loss 'lambda' compares several"):
        make(tmp_path / "g", [{"query": "a", "document": "b", "label": 1}], task="rerank", loss="lambda")


def test_csv_columns_by_name(tmp_path):
    from fastbert.training.finetune.pair_examples import read_ranked, read_vectors

    rows = [("q1", "d1", "n1"), ("q2", "d2", "n2")]
    path = write_csv(tmp_path / "t.csv", rows, header=("question", "passage", "wrong"))
    reading = Reading(anchor="question", positive="passage", negatives=("wrong",))
    assert [e.texts for e in read_vectors(path, reading)] == rows
    found = read_ranked(path, reading)
    assert [(e.query, e.documents, e.grades) for e in found] == [
        ("q1", ("d1", "n1"), (1.0, 0.0)),
        ("q2", ("d2", "n2"), (1.0, 0.0)),
    ]
    path = write_jsonl(tmp_path / "n.jsonl", [{**GOOD, "negative_2": "b", "negative_1": "a"}])
    assert read_vectors(path, Reading())[0].texts[2:] == ("a", "b")


def test_rows_of_a_query_are_one_example(tmp_path):
    """Mined triplets repeat the positive, which counts once; and stay on one side of a split."""
    from fastbert.training.finetune.pair_examples import read_ranked
    from fastbert.training.finetune.splits import Labelled

    rows = [{**GOOD, "negative": text} for text in ("a", "b", "c")]
    path = write_jsonl(tmp_path / "mined.jsonl", [*rows, {"anchor": "x", "positive": "y", "negative": "z"}])
    first, _ = read_ranked(path, Reading())
    assert (first.documents, first.grades) == ((GOOD["positive"], "a", "b", "c"), (1.0, 0.0, 0.0, 0.0))
    parts = Labelled.read(path, FinetuneSettings(task="embedding"), Reading()).split(0.5, seed=0)
    assert sorted(len({row["anchor"] for row in part.rows}) for part in parts.values()) == [1, 1]
    clash = [{"query": "q", "document": "d", "label": grade} for grade in (1, 0)]
    with pytest.raises(DataError, match=r"clash.jsonl:2: the label of 'd' is 0, and 1 before"):
        read_ranked(write_jsonl(tmp_path / "clash.jsonl", clash), Reading())


def test_what_does_not_go_together(tmp_path):
    model = save_model(tmp_path / "model")
    train, dev = write_jsonl(tmp_path / "train.jsonl", pairs()), write_jsonl(tmp_path / "dev.jsonl", scored())
    with pytest.raises(DataError, match=r"dev.jsonl:1: the examples are pairs with a score; loss 'ranking' learns"):
        Recipe.read(FinetuneSettings(task="embedding"), model, {"train": train, "dev": dev})
    with pytest.raises(ValueError, match="best is 'spearman', which pairs or triplets without a label do not have"):
        Recipe.read(FinetuneSettings(task="embedding", best="spearman"), model, {"train": train, "dev": train})
    with pytest.raises(DataError, match="from which sparse-embedding does not learn"):
        Recipe.read(FinetuneSettings(task="sparse-embedding"), model, {"train": dev, "dev": dev})
    found = fastbert.finetune(model, dev, task="embedding", epochs=1, batch_size=8, tries={"seed": [1, 2]})
    assert len(found.tried) == 2


def test_tuples_from_python(tmp_path):
    model = save_model(tmp_path / "model")
    rows = [(row["anchor"], row["positive"]) for row in pairs()]
    found = fastbert.finetune(model, rows, rows, task="embedding", epochs=2, batch_size=8)
    assert found.predict(["anna saw rome"]).shape == (1, 48)
    assert found.pipeline()(["anna", "bob"]).shape == (2, 2)
    graded = [(row["anchor"], row["positive"], 1) for row in pairs()]
    graded += [(row["anchor"], row["negative"], 0) for row in triplets()]
    found = fastbert.finetune(model, graded, task="rerank", epochs=2)
    assert found.pipeline().rank("anna saw rome", ["bob", "carl"])[0].keys() == {"corpus_id", "score"}
    assert {"ndcg_at_10", "mrr_at_10"} <= found.scores.keys()


def test_a_reranker_learns_and_cross_encoder_loads_it(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    save_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", triplets())
    found = fastbert.finetune(
        tmp_path / "model",
        data,
        data,
        task="rerank",
        loss="listnet",
        epochs=40,
        batch_size=8,
        lr=2e-3,
        output=tmp_path / "o",
    )
    assert found.scores["ndcg_at_10"] > 0.95
    texts = [(row["anchor"], row["positive"]) for row in triplets()]
    theirs = st.CrossEncoder(str(tmp_path / "o"), device="cpu").predict(texts)
    np.testing.assert_allclose(found.predict(texts), theirs, atol=1e-5)


def masked_model(folder):
    torch.manual_seed(0)
    from finetune_support import SIZES

    fastbert.BertForMaskedLM(fastbert.BertConfig(**SIZES)).save_pretrained(folder)
    fastbert.BertTokenizer(VOCAB, model_max_length=64).save_pretrained(folder)
    return folder


def test_a_sparse_encoder_goes_both_ways(tmp_path):
    """Trained here, loaded by sentence-transformers; and its folder trained here again."""
    st = pytest.importorskip("sentence_transformers")
    model = masked_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", pairs())
    options = {"task": "sparse-embedding", "epochs": 30, "batch_size": 8, "lr": 2e-3}
    found = fastbert.finetune(model, data, data, output=tmp_path / "one", **options)
    assert found.scores["mrr_at_10"] > 0.8
    texts = [row["anchor"] for row in pairs()]
    theirs = st.SparseEncoder(str(tmp_path / "one"), device="cpu")
    expected = theirs.encode(texts).to_dense().numpy()
    np.testing.assert_allclose(found.pipeline().matrix(texts).toarray(), expected, atol=1e-5)
    theirs.save(str(tmp_path / "theirs"))
    again = fastbert.finetune(tmp_path / "theirs", data, data, output=tmp_path / "two", **{**options, "epochs": 1})
    assert again.scores["mrr_at_10"] > 0.8
    st.SparseEncoder(str(tmp_path / "two"), device="cpu")


def test_a_dense_folder_is_no_sparse_encoder(tmp_path):
    save_model(tmp_path / "model")
    TextEncoder.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "st")
    fastbert.BertTokenizer(VOCAB, model_max_length=64).save_pretrained(tmp_path / "st")
    with pytest.raises(ValueError, match="holds Transformer, Pooling, the modules of an embedder; sparse vectors need"):
        make(tmp_path / "run", pairs(), model=tmp_path / "st", task="sparse-embedding")


def test_grades_of_people_and_scores_of_teachers(tmp_path):
    """Scores have no zero: the document with the highest is the relevant one. A query without any does not count."""
    from fastbert.training.finetune.pair_examples import RankExample
    from fastbert.training.finetune.pair_features import decode_ranked, score_ranked

    logits = [np.array([0.1, 0.9, 0.5]), np.array([3.0, 2.0, 1.0])]

    def scores(*grades):
        examples = [RankExample("x:1", "q", ("a", "b", "c"), of) for of in grades]
        return score_ranked(decode_ranked(examples, None, logits, None, None), [])

    graded = scores((0.0, 0.0, 1.0), (0.0, 0.0, 0.0))
    assert graded["mrr_at_10"] == 0.5 and graded["ndcg_at_10"] == pytest.approx(1 / np.log2(3))
    assert scores((-9.5, -2.0, 4.1), (-1.0, -0.5, -7.0)) == pytest.approx(
        {"mrr_at_10": 0.5, "ndcg_at_10": 1 / np.log2(3), "recall_at_10": 1.0}
    )


def test_a_larger_weight_makes_sparser_vectors(tmp_path):
    model = masked_model(tmp_path / "model")
    counts = []
    for weight in (0.0, 100.0):
        found = fastbert.finetune(
            model, [(r["anchor"], r["positive"]) for r in pairs()], [(r["anchor"], r["positive"]) for r in pairs()],
            task="sparse-embedding", epochs=20, batch_size=8, lr=2e-3, query_weight=weight, document_weight=weight,
        )  # fmt: skip
        counts.append(found.pipeline().matrix([r["anchor"] for r in pairs()]).nnz)
    assert counts[1] < 0.7 * counts[0], counts
