"""Embedder and FillMask: against sentence-transformers, transformers and plain arithmetic."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from tiny_bert import VOCAB, save_tiny

import fastbert
from fastbert import Embedder, FillMask
from fastbert.inference.batching import token_budget_batches
from fastbert.model import pretrained

TEXTS = [
    "the cat sat on the mat.",
    "",
    "a dog",
    "the red dogs ran under a blue mat, the cats sat on a red mat. " * 5,
    "zebra",
    "a dog",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny_lm"), fastbert.BertForMaskedLM)


def test_batches_hold_the_budget_and_each_text_once():
    lengths = torch.randint(1, 90, (500,), generator=torch.Generator().manual_seed(3)).tolist()
    batches = token_budget_batches(lengths, 200)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(sum(lengths[i] for i in batch) <= 200 for batch in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    # No batch could have taken the first text of the next.
    for batch, following in itertools.pairwise(batches):
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > 200


def test_batches_of_odd_lengths():
    assert token_budget_batches([], 10) == []
    assert token_budget_batches([50, 3, 60, 3], 10) == [[2], [0], [1, 3]]
    assert token_budget_batches([0] * 5, 2) == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="max_tokens is 0"):
        token_budget_batches([1], 0)


def test_embedder_equals_sentence_transformers(minilm, stsb):
    from sentence_transformers import SentenceTransformer

    with open(stsb / "sts-test.csv", encoding="utf-8") as file:
        texts = [line.rstrip("\n").split("\t")[5] for line in file][:40]
    texts += ["", "  ", "Ünïcödé ☃ 漢字", "word " * 400]
    embedder = Embedder.from_pretrained(minilm)
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("mean", True, 256)
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    vectors = embedder.embed(texts, max_tokens=512)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_pooling_equals_transformers(tiny, pooling, normalize):
    from transformers import BertModel, BertTokenizer

    theirs, tokenizer = BertModel.from_pretrained(tiny).eval(), BertTokenizer.from_pretrained(tiny)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**inputs)
    mask = inputs["attention_mask"][..., None].float()
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    expected = {"mean": mean, "cls": output.last_hidden_state[:, 0], "pooler": output.pooler_output}[pooling]
    if normalize:
        expected = torch.nn.functional.normalize(expected, dim=1)
    embedder = Embedder.from_pretrained(tiny, pooling=pooling, normalize=normalize)
    for max_tokens in (7, 50, 10_000):
        vectors = embedder.embed(TEXTS, max_tokens=max_tokens)
        np.testing.assert_allclose(vectors, expected.numpy(), rtol=0, atol=1e-5)


def test_half_precision_is_pooled_in_float32(tiny):
    exact = Embedder.from_pretrained(tiny).embed(TEXTS)
    embedder = Embedder.from_pretrained(tiny, dtype=torch.bfloat16)
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32 and embedder.model.dtype == torch.bfloat16
    assert not np.array_equal(vectors, torch.tensor(vectors).bfloat16().float().numpy())
    np.testing.assert_allclose(vectors, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_empty_batches_and_texts_without_tokens(tiny, pooling):
    embedder = Embedder.from_pretrained(tiny, pooling=pooling, normalize=True)
    assert embedder.embed([]).shape == (0, 48)
    assert embedder.embed_tokens([]).shape == (0, 48)
    alone, between = embedder.embed_tokens([[2, 5, 3]]), embedder.embed_tokens([[], [2, 5, 3], []])
    assert not between[[0, 2]].any()
    torch.testing.assert_close(between[1:2], alone, rtol=0, atol=1e-6)


def test_progress_is_called_with_texts_and_tokens(tiny, capsys):
    embedder = Embedder.from_pretrained(tiny)
    calls = []
    embedder.embed(TEXTS, max_tokens=20, progress=lambda *done: calls.append(done))
    lengths = [len(ids) for ids in embedder.tokenize(TEXTS)]
    assert [sum(column) for column in zip(*calls, strict=True)] == [len(TEXTS), sum(lengths)]
    assert max(lengths) == 40 and len(calls) > 2
    embedder.embed(TEXTS, progress=True)
    assert "tokens/s" in capsys.readouterr().err


def test_embedder_errors(tiny, tiny_lm, tmp_path):
    for pooling in ("median", ["mean", "median"], [], 3, ""):
        with pytest.raises(ValueError, match=r"pooling is .*; it must be one of cls, max, mean"):
            Embedder.from_pretrained(tiny, pooling=pooling)
    with pytest.raises(ValueError, match=r"max_length is 41; .* 40"):
        Embedder.from_pretrained(tiny, max_length=41)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight"):
        Embedder.from_pretrained(tiny_lm, pooling="pooler")
    embedder = Embedder.from_pretrained(tiny)
    for texts in ("a cat", b"a cat", {"a": "cat"}, {"a cat"}, (text for text in TEXTS)):
        with pytest.raises(TypeError, match=f"texts is a {type(texts).__name__}; it must be a list of str"):
            embedder.embed(texts)
    with pytest.raises(TypeError, match=r"texts\[1\] is a int; it must be a str"):
        embedder.embed(["a cat", 1])
    with pytest.raises(FileNotFoundError, match="no file"):
        Embedder.from_pretrained(tmp_path)


def test_fingerprint_follows_weights_and_settings(tiny, tiny_lm):
    first = Embedder.from_pretrained(tiny).fingerprint()
    assert Embedder.from_pretrained(tiny).fingerprint() == first
    changed = Embedder.from_pretrained(tiny)
    with torch.no_grad():
        changed.model.encoder.layer[1].output.dense.bias[3] += 1e-3
    others = [
        changed,
        Embedder.from_pretrained(tiny, pooling="cls"),
        Embedder.from_pretrained(tiny, normalize=True),
        Embedder.from_pretrained(tiny, max_length=9),
        Embedder.from_pretrained(tiny, dtype=torch.bfloat16),
        Embedder.from_pretrained(tiny, tokenizer=fastbert.BertTokenizer(VOCAB, do_lower_case=False)),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 7


def sentence_folder(folder, *, modules=("Transformer", "Pooling"), pooling=None, transformer=None, prompts=None):
    """Dresses a folder as sentence-transformers would."""
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(modules)]
    kinds = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(modules, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer or {}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts or {}))
    return folder


def test_sentence_transformers_settings_are_read(tmp_path):
    sentence_folder(
        save_tiny(tmp_path),
        modules=("Transformer", "Pooling", "Normalize"),
        pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        transformer={"max_seq_length": 9, "do_lower_case": True},
        prompts={"prompts": {"query": "a cat "}, "default_prompt_name": "query"},
    )
    embedder = Embedder.from_pretrained(tmp_path)
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("cls", True, 9)
    assert embedder.lower_case and embedder.prompt == "a cat "
    plain = Embedder.from_pretrained(tmp_path, pooling="mean", normalize=False, max_length=20)
    assert (plain.pooling, plain.normalize, plain.max_length) == ("mean", False, 20)
    assert embedder.tokenize(["SAT on"]) == plain.tokenizer(["a cat sat on"])["input_ids"]

    sentence_folder(tmp_path, pooling={"pooling_mode": "mean"}, transformer={"max_seq_length": 512})
    embedder = Embedder.from_pretrained(tmp_path)
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("mean", False, 40)


def assert_fills_like_transformers(ours, folder, tokenizer, texts, top_k):
    from transformers import BertForMaskedLM, pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = BertForMaskedLM.from_pretrained(folder)
        fill = pipeline("fill-mask", model=theirs, tokenizer=tokenizer, device="cpu")
    for text in texts:
        expected = fill(text, top_k=top_k)
        expected = [expected] if isinstance(expected[0], dict) else expected
        got = ours(text, top_k=top_k)
        assert len(got) == len(expected) == text.count("[MASK]")
        for candidates, rows in zip(got, expected, strict=True):
            assert [c.token for c in candidates] == [row["token_str"] for row in rows]
            assert [c.sequence for c in candidates] == [row["sequence"] for row in rows]
            np.testing.assert_allclose(
                [c.probability for c in candidates], [row["score"] for row in rows], rtol=1e-4, atol=1e-7
            )


def test_fill_mask_equals_transformers(tiny_lm):
    from transformers import BertTokenizer

    texts = ["the [MASK] sat on the mat.", "[MASK] dogs ran under a [MASK] , the [MASK]", "[MASK]"]
    ours = FillMask.from_pretrained(tiny_lm)
    assert_fills_like_transformers(ours, tiny_lm, BertTokenizer.from_pretrained(tiny_lm), texts, top_k=6)


def test_fill_mask_on_a_real_model(antiberty):
    from transformers import BertTokenizer

    sequence = list("EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKG")
    texts = []
    for places in ([10], [20, 35], [3, 4, 5]):
        masked = ["[MASK]" if i in places else letter for i, letter in enumerate(sequence)]
        texts.append(" ".join(masked))
    vocab = str(antiberty / "vocab.txt")
    ours = FillMask.from_pretrained(antiberty, tokenizer=fastbert.BertTokenizer(vocab, do_lower_case=False))
    assert ours(texts[0])[0][0].token == sequence[10]
    assert_fills_like_transformers(ours, antiberty, BertTokenizer(vocab, do_lower_case=False), texts, top_k=5)


def test_fill_mask_errors(tiny, tiny_lm):
    with pytest.raises(ValueError, match="no masked-language-model head"):
        FillMask.from_pretrained(tiny)
    fill = FillMask.from_pretrained(tiny_lm)
    with pytest.raises(TypeError, match="text is a list; it must be a str"):
        fill(["a [MASK]"])
    assert len(fill("[MASK]", top_k=1000)[0]) == len(VOCAB)
    with pytest.raises(ValueError, match=r"no \[MASK\]: 'a cat'"):
        fill("a cat")
    with pytest.raises(ValueError, match="42 tokens; the model takes 40"):
        fill("[MASK] " * 40)
    with pytest.raises(ValueError, match="top_k is 0"):
        fill("[MASK]", top_k=0)


@pytest.fixture
def collections():
    """Generations that were collected, in a process that collects after every few objects; all is put back."""
    seen, before = [], (gc.isenabled(), gc.get_threshold())
    callback = lambda phase, info: seen.append(info["generation"]) if phase == "start" else None  # noqa: E731
    gc.enable()
    gc.set_threshold(10, 1, 1)
    gc.callbacks.append(callback)
    yield seen
    gc.callbacks.remove(callback)
    gc.set_threshold(*before[1])
    (gc.enable if before[0] else gc.disable)()


@pytest.mark.parametrize("kind", [Embedder, FillMask, fastbert.BertForMaskedLM])
def test_loading_collects_little_garbage(kind, tiny_lm, tmp_path, collections, monkeypatch):
    def count():
        collections.clear()
        kind.from_pretrained(tiny_lm)
        return len(collections)

    at_rest = count()
    assert gc.isenabled()
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "collector_at_rest", contextlib.nullcontext)
        assert at_rest < 0.7 * count()
    with pytest.raises((FileNotFoundError, ValueError)):
        kind.from_pretrained(tmp_path)
    assert gc.isenabled()
    gc.disable()
    kind.from_pretrained(tiny_lm)
    assert not gc.isenabled()


def test_the_first_tokenizer_of_a_process_collects_no_garbage(tiny):
    """It imports the library."""
    program = """if True:
        import gc, sys, fastbert
        fastbert.BertTokenizer, seen = fastbert.BertTokenizer, []
        gc.set_threshold(10, 1, 1)
        gc.callbacks.append(lambda phase, info: seen.append("tokenizers.models" in sys.modules))
        fastbert.BertTokenizer.from_pretrained(sys.argv[1])
        print(seen.count(False), seen.count(True))
    """
    done = subprocess.run([sys.executable, "-c", program, str(tiny)], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before + after < 60
