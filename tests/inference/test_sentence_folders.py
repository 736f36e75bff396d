"""Folders of sentence-transformers: the Embedder's vectors are those of `SentenceTransformer.encode`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from tiny_bert import VOCAB, save_tiny

import fastbert
from fastbert.inference import Embedder, device_pooling
from fastbert.inference.pooling import pool
from fastbert.inference.sentence_settings import ACTIVATIONS

TEXTS = ["the cat sat on the mat.", "", "a dog", "the red dogs ran under a blue mat, the cats sat. " * 5, "zebra"]
WIDTH = 48
POOLINGS = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def transformer(tiny):
    return st.Transformer(str(tiny))


@pytest.fixture
def saved(transformer, tmp_path):
    """Saves modules behind the tiny Transformer, as sentence-transformers does; returns model and folder."""

    def save(*modules, **options):
        model = SentenceTransformer(modules=[transformer, *modules], device="cpu", **options)
        model.save_pretrained(str(tmp_path), create_model_card=False)
        return model, tmp_path

    return save


def edit(file, **fields):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not ...}))


def assert_same(folder, expected, texts=TEXTS, **options):
    vectors = Embedder.from_pretrained(folder).embed(texts, max_tokens=60, **options)
    assert vectors.shape == expected.shape
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [*POOLINGS, POOLINGS, ["max", "cls"]], ids=str)
def test_poolings(saved, mode):
    model, folder = saved(st.Pooling(WIDTH, mode))
    assert_same(folder, model.encode(TEXTS))
    prompt = "the red cat "
    expected = model.encode(TEXTS, prompt=prompt)
    assert_same(folder, expected, prompt=prompt)
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    model.set_pooling_include_prompt(False)
    without = model.encode(TEXTS, prompt=prompt)
    assert_same(folder, without, prompt=prompt)
    assert mode == "lasttoken" or np.abs(without - expected).max() > 1e-2


@pytest.mark.parametrize("switches", [[], ["cls_token"], ["lasttoken", "mean_tokens", "max_tokens"]])
def test_switches_of_older_pooling_files(saved, switches):
    _, folder = saved(st.Pooling(WIDTH, "weightedmean"))
    old = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False}
    old |= {f"pooling_mode_{name}": True for name in switches}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert expected.shape == (len(TEXTS), WIDTH * max(1, len(switches)))
    assert_same(folder, expected)


def on_a_device(states, lengths, modes, **options):
    found = device_pooling.pool(torch.from_numpy(states), torch.from_numpy(lengths), modes, **options)
    return found.numpy()


@pytest.mark.parametrize("pool", [pool, on_a_device])
def test_a_prompt_longer_than_its_text_leaves_nothing_to_pool(pool):
    states, lengths = np.arange(1, 13, dtype=np.float32).reshape(6, 2), np.array([3, 0, 2, 1])
    nothing = {mode: pool(states, lengths, [mode], skip=3) for mode in POOLINGS}
    for mode in POOLINGS[1:]:
        assert not nothing[mode].any(), mode
    np.testing.assert_array_equal(nothing["cls"], states[[0, 0, 3, 5]] * np.array([1, 0, 1, 1])[:, None])
    kept = pool(states, lengths, ["weightedmean", "max", "lasttoken", "cls"], skip=1)
    weighted = (2 * states[1] + 3 * states[2]) / 5
    np.testing.assert_allclose(kept[0], np.concatenate([weighted, states[2], states[2], states[1]]), rtol=1e-6)
    np.testing.assert_array_equal(kept[2, :2], states[4])


def test_poolings_on_a_device_are_the_same():
    rng = np.random.default_rng(0)
    lengths = np.array([5, 0, 1, 300, 17])
    states = rng.standard_normal((lengths.sum(), 6)).astype(np.float32)
    for skip in (0, 1, 4):
        np.testing.assert_allclose(
            on_a_device(states, lengths, POOLINGS, skip=skip), pool(states, lengths, POOLINGS, skip=skip), rtol=1e-6
        )


def dense(inputs, outputs, activation="Tanh", **options):
    return st.Dense(inputs, outputs, activation_function=getattr(torch.nn, activation)(), **options)


def layer_norm(width):
    norm = st.LayerNorm(width)
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    return norm


TOKENS = {"module_input_name": "token_embeddings"}
CHAINS = {
    "dense": lambda: [st.Pooling(WIDTH), dense(WIDTH, 20)],
    "dense without bias, normalised": lambda: [st.Pooling(WIDTH), dense(WIDTH, 63, bias=False), st.Normalize()],
    "residual": lambda: [st.Pooling(WIDTH), dense(WIDTH, WIDTH, "GELU", use_residual=True)],
    "projected residual": lambda: [st.Pooling(WIDTH, "cls"), dense(WIDTH, 7, "ReLU", use_residual=True)],
    "layer norm": lambda: [st.Pooling(WIDTH, ["cls", "max"]), layer_norm(2 * WIDTH)],
    "normalised in between": lambda: [
        *(st.Pooling(WIDTH), st.Normalize(), dense(WIDTH, 30, "Identity"), layer_norm(30), st.Dropout(0.5)),
        *(dense(30, 11, "SiLU"), st.Normalize()),
    ],
    "normalised before": lambda: [st.Normalize(), st.Pooling(WIDTH)],  # there is no vector yet
    "of tokens": lambda: [dense(WIDTH, 13, **TOKENS), st.Normalize("token_embeddings"), st.Pooling(13, "max")],
    "of tokens too late": lambda: [st.Pooling(WIDTH), st.Normalize("token_embeddings"), dense(WIDTH, 5, **TOKENS)],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains(saved, chain):
    model, folder = saved(*CHAINS[chain]())
    expected = model.encode(TEXTS)
    assert_same(folder, expected)
    assert Embedder.from_pretrained(folder).embed([]).shape == (0, expected.shape[1])


def test_activations(saved):
    theirs = [dense(WIDTH, WIDTH, activation) for activation in ACTIVATIONS]
    torch.nn.init.constant_(theirs[ACTIVATIONS.index("PReLU")].activation_function.weight, -1.5)
    _, folder = saved(st.Pooling(WIDTH), *theirs)
    x = torch.randn(20, WIDTH) * 3
    for name, module, their in zip(ACTIVATIONS, Embedder.from_pretrained(folder).modules, theirs, strict=True):
        assert module.activation == name
        expected = their({"sentence_embedding": x})["sentence_embedding"].detach()
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_dense_weights_in_an_older_file(saved):
    module = dense(WIDTH, 9, "ReLU")
    model, folder = saved(st.Pooling(WIDTH), module)
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save(module.state_dict(), folder / "2_Dense" / "pytorch_model.bin")
    edit(folder / "2_Dense" / "config.json", module_output_name=..., module_input_name=...)
    assert_same(folder, model.encode(TEXTS))


@pytest.mark.parametrize("name", ["0_BERT", "0_Transformer"])
def test_folders_before_2_0(saved, name):
    """The Transformer in a folder of its own, with its tokenizer and settings; decoys where it is today."""
    model, folder = saved(st.Pooling(WIDTH), st.Normalize())
    expected = model.encode(TEXTS)
    edit(folder / "sentence_bert_config.json", max_seq_length=9, do_lower_case=False)
    old_style(folder, name)
    (folder / "config_sentence_transformers.json").unlink()
    short = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(short - expected).max() > 1e-3
    save_tiny(folder)  # must not be read
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    assert_same(folder, short)
    assert Embedder.from_pretrained(folder, pooling="cls", normalize=False).max_length == 9


def old_style(folder, name, kind="Transformer"):
    (folder / name).mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(file, folder / name / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"path": name, "type": f"sentence_transformers.models.{kind}"}
    (folder / "modules.json").write_text(json.dumps(modules))


def test_the_first_transformer_module_counts_no_special_tokens(saved):
    _, folder = saved(st.Pooling(WIDTH))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": null}')
    expected = Embedder.from_pretrained(folder, max_length=11).embed(TEXTS)
    old_style(folder, "0_BERT", "BERT")
    assert Embedder.from_pretrained(folder).max_length == 11
    assert_same(folder, expected)


def test_the_transformers_path_may_not_lead_out(saved, tmp_path_factory):
    _, folder = saved(st.Pooling(WIDTH))
    old_style(folder, "0_BERT")
    outside = tmp_path_factory.mktemp("outside") / "model"
    shutil.move(folder / "0_BERT", outside)
    with pytest.raises(FileNotFoundError, match=r"modules\.json: no folder '0_BERT' in"):
        Embedder.from_pretrained(folder)
    (folder / "0_BERT").symlink_to(outside)
    leads_out = r"modules\.json names '{}', a link that leads out of the folder"
    with pytest.raises(ValueError, match=leads_out.format(r"0_BERT/sentence_bert_config\.json")):
        Embedder.from_pretrained(folder)
    (outside / "sentence_bert_config.json").unlink()
    with pytest.raises(ValueError, match=leads_out.format("0_BERT")):
        Embedder.from_pretrained(folder)
    for path in ("../model", str(outside), "a//b", ".", "0_BERT\\x"):
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ValueError, match=r"modules\.json names .*; it must lie in the folder of modules\.json"):
            Embedder.from_pretrained(folder)


PROMPTS = {"query": "the cat ", "passage": "a red dog, ", "none": None}


def test_prompts(saved):
    model, folder = saved(st.Pooling(WIDTH, include_prompt=False), prompts=PROMPTS, default_prompt_name="passage")
    embedder = Embedder.from_pretrained(folder)
    assert embedder.prompt == "a red dog, "
    calls = [{}, {"prompt_name": "query"}, {"prompt_name": "document"}, {"prompt_name": "none"}, {"prompt": "mat "}]
    calls += [{"prompt": ""}, {"prompt": "zebra"}, {"prompt": "under"}, {"prompt": "the dog " * 30}, {"prompt": " "}]
    found = [embedder.embed(TEXTS, max_tokens=60, **call) for call in calls]
    for call, vectors in zip(calls, found, strict=True):
        np.testing.assert_allclose(vectors, model.encode(TEXTS, **call), rtol=0, atol=1e-5, err_msg=str(call))
    assert np.abs(found[0] - found[1]).max() > 1e-2 and np.array_equal(found[2], found[3])
    with pytest.warns(UserWarning, match="prompt is given, so prompt_name 'query' is not used"):
        assert np.array_equal(embedder.embed(TEXTS, prompt="mat ", prompt_name="query", max_tokens=60), found[4])
    with pytest.raises(ValueError, match="prompt_name is 'q'; it must be one of 'query', 'document', 'none', 'pa"):
        embedder.embed(TEXTS, prompt_name="q")
    with pytest.raises(TypeError, match="prompt is a list; it must be a str"):
        embedder.embed(TEXTS, prompt=["a"])


def test_prompt_names_of_a_folder_without_prompts(tiny):
    embedder, model = Embedder.from_pretrained(tiny), SentenceTransformer(str(tiny), device="cpu")
    expected = model.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(embedder.embed(TEXTS, prompt_name="query"), expected, rtol=0, atol=1e-5)
    for encode in (embedder.embed, model.encode):
        with pytest.raises(ValueError, match="passage"):
            encode(TEXTS, prompt_name="passage")
    own = Embedder(embedder.model, embedder.tokenizer)
    with pytest.raises(ValueError, match="prompt_name is 'query'; it must be None, as there are no prompts"):
        own.embed(TEXTS, prompt_name="query")


def test_truncate_dim(saved):
    model, folder = saved(st.Pooling(WIDTH), dense(WIDTH, 20), st.Normalize(), truncate_dim=12)
    assert_same(folder, model.encode(TEXTS))
    embedder = Embedder.from_pretrained(folder, truncate_dim=20)
    assert embedder.width == 20
    np.testing.assert_allclose(embedder.embed(TEXTS), model.encode(TEXTS, truncate_dim=20), rtol=0, atol=1e-5)
    for value in (0, 21, 8.0, "8", True):
        with pytest.raises(ValueError, match=r"truncate_dim is .*; it must be 1 to 20, or None"):
            Embedder.from_pretrained(folder, truncate_dim=value)
    edit(folder / "config_sentence_transformers.json", truncate_dim=21)
    with pytest.raises(ValueError, match=r"config_sentence_transformers\.json: truncate_dim is 21; it must be 1 to 20"):
        Embedder.from_pretrained(folder)


def test_max_seq_length_overrides_the_tokenizers(saved):
    _, folder = saved(st.Pooling(WIDTH))
    edit(folder / "tokenizer_config.json", model_max_length=7)
    short = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert_same(folder, short)
    edit(folder / "sentence_bert_config.json", max_seq_length=15)
    longer = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(longer - short).max() > 1e-3
    assert_same(folder, longer)


@pytest.mark.parametrize("cased", [True, False])
def test_do_lower_case(tmp_path, cased):
    texts = ["The CAT sat [MASK] ON", "the cat sat [MASK] on", "A caté ΣΑΣ", "[mask] the"]
    save_tiny(tmp_path, vocab_size=len(VOCAB) + 2)
    fastbert.BertTokenizer([*VOCAB, "caté", "cate"], do_lower_case=not cased).save_pretrained(tmp_path)
    SentenceTransformer(str(tmp_path), device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    plain = Embedder.from_pretrained(tmp_path).embed(texts)
    edit(tmp_path / "sentence_bert_config.json", do_lower_case=True)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    assert_same(tmp_path, expected, texts)
    assert (np.abs(plain - expected).max() > 1e-3) == cased
    embedder = Embedder.from_pretrained(tmp_path)
    if cased:  # a saved tokenizer is read back as it is
        embedder.tokenizer.save_pretrained(tmp_path / "again")
        again = fastbert.BertTokenizer.from_pretrained(tmp_path / "again")
        assert again(texts)["input_ids"] == embedder.tokenizer(texts)["input_ids"]


def test_given_pooling_and_normalize_replace_the_folders(saved):
    model, folder = saved(st.Pooling(WIDTH, ["mean", "cls"]), dense(2 * WIDTH, 10), st.Normalize())
    load = lambda **options: Embedder.from_pretrained(folder, **options)  # noqa: E731
    assert load().pooling == ("mean", "cls") and load().normalize and load().width == 10
    expected = torch.nn.functional.normalize(torch.from_numpy(load(normalize=False).embed(TEXTS)), dim=1)
    np.testing.assert_allclose(expected, model.encode(TEXTS), rtol=0, atol=1e-5)
    assert load(pooling=["max", "cls"]).pooling == ("max", "cls")
    with pytest.raises(ValueError, match=r"2_Dense/config\.json: in_features is 96; the rows before it have 48"):
        load(pooling="max")
    assert load(pooling="max", normalize=True).width == WIDTH


def test_the_fingerprint_follows_each_module(saved):
    _, folder = saved(st.Pooling(WIDTH), dense(WIDTH, WIDTH), layer_norm(WIDTH), prompts=PROMPTS)
    prints = [Embedder.from_pretrained(folder).fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    embedder = Embedder.from_pretrained(folder)
    embedder.modules[0].tensors["linear.bias"][3] += 1e-3
    prints.append(embedder.fingerprint())
    changes = [("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.ReLU"})]
    changes += [("2_Dense/config.json", {"use_residual": True}), ("1_Pooling/config.json", {"include_prompt": False})]
    changes += [("1_Pooling/config.json", {"pooling_mode": "max"})]
    changes += [("config_sentence_transformers.json", {"default_prompt_name": "query"})]
    for name, fields in changes:
        edit(folder / name, **fields)
        prints.append(Embedder.from_pretrained(folder).fingerprint())
    assert len(set(prints)) == len(prints) - 1


def test_half_precision_keeps_modules_in_float32(saved):
    _, folder = saved(st.Pooling(WIDTH), dense(WIDTH, 20, "Identity"), layer_norm(20))
    exact = Embedder.from_pretrained(folder).embed(TEXTS)
    vectors = Embedder.from_pretrained(folder, dtype=torch.bfloat16).embed(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, exact, rtol=0, atol=0.2)
