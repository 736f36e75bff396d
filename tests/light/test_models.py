"""The models of fastbert.light: the answers of the torch path, bit for bit, in a process that never imports torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from support import require_native
from tasks_support import labels, make_texts, save
from tiny_bert import save_tiny

import fastbert
from fastbert.light import CrossEncoder, TextClassifier, TextEmbedder, TokenClassifier

TEXTS = make_texts(40)
WIDTH = 48


@pytest.fixture(autouse=True)
def _native():
    require_native()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def same_vectors(folder, **options):
    dtype = options.pop("dtype", None)
    ours = fastbert.Embedder.from_pretrained(folder, dtype=dtype and getattr(torch, dtype), **options)
    light = TextEmbedder.from_pretrained(folder, dtype=dtype, **options)
    assert (light.width, light.max_length, light.pooling) == (ours.width, ours.max_length, ours.pooling)
    for given in ({}, {"prompt": "the red cat "}, {"long": "mean"}, {"max_tokens": 60}, {"precision": "int8"}):
        a, b = light.embed(TEXTS, **given), ours.embed(TEXTS, **given)
        assert a.dtype == b.dtype and np.array_equal(a, b), given
    assert light.embed([]).shape == (0, ours.width)


@pytest.mark.parametrize(
    "pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "pooler", ["cls", "mean"]], ids=str
)
def test_poolings(tiny, pooling):
    same_vectors(tiny, pooling=pooling, normalize=True)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"truncate_dim": 7}], ids=str)
def test_precisions_and_dims(tiny, options):
    same_vectors(tiny, **options)


CHAINS = {
    "dense": lambda: [st.Pooling(WIDTH), st.Dense(WIDTH, 20), st.Normalize()],
    "residuals and a norm": lambda: [
        *(st.Pooling(WIDTH, "max"), st.Dense(WIDTH, 7, activation_function=torch.nn.GELU(), use_residual=True)),
        *(st.LayerNorm(7), st.Dense(7, 7, activation_function=torch.nn.Identity(), use_residual=True)),
    ],
    "of tokens": lambda: [
        st.Dense(WIDTH, 13, activation_function=torch.nn.ReLU(), module_input_name="token_embeddings"),
        st.Pooling(13),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_folders_of_sentence_transformers(tiny, chain, tmp_path):
    torch.manual_seed(1)
    modules = [st.Transformer(str(tiny)), *CHAINS[chain]()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    same_vectors(tmp_path)


def test_an_activation_that_needs_torch_says_so(tiny, tmp_path):
    modules = [st.Transformer(str(tiny)), st.Pooling(WIDTH), st.Dense(WIDTH, 5, activation_function=torch.nn.Mish())]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    with pytest.raises(ImportError, match=r"2_Dense/config\.json: Mish needs torch.*fastbert-engine\[torch\]"):
        TextEmbedder.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_classifiers(kind, tmp_path):
    folder = save(tmp_path, kind, "ForSequenceClassification", **labels("bad", "good", "neither"))
    ours, light = fastbert.pipeline("text-classification", folder), TextClassifier.from_pretrained(folder)
    short = [text for text in TEXTS if len(text) < 60]
    pairs = [{"text": text, "text_pair": short[-1 - i]} for i, text in enumerate(short)]
    for given in (TEXTS, pairs):
        assert light(given, top_k=None) == ours(given, top_k=None)
    assert light("a cat") == ours("a cat")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_tags(kind, tmp_path):
    names = labels("O", "B-PER", "I-PER", "B-LOC")
    folder = save(tmp_path, kind, "ForTokenClassification", **names)
    ours = fastbert.pipeline("token-classification", folder, aggregation_strategy="simple")
    light = TokenClassifier.from_pretrained(folder, aggregation_strategy="simple")
    assert light(TEXTS) == ours(TEXTS)


def test_rerankers(tmp_path):
    folder = save(tmp_path, "bert", "ForSequenceClassification", num_labels=1)
    ours, light = fastbert.pipeline("rerank", folder), CrossEncoder.from_pretrained(folder)
    assert light.rank("a fox", TEXTS, top_k=5) == ours.rank("a fox", TEXTS, top_k=5)
    pairs = [("a fox", text) for text in TEXTS]
    scores = light.predict(pairs)
    assert scores.dtype == np.float32 and scores.tolist() == [np.float32(score) for score in ours(pairs)]


def test_torch_is_never_imported(tiny, tmp_path):
    """Nor transformers, nor what else takes long; the vectors are those of this process."""
    save(tmp_path, "bert", "ForSequenceClassification", **labels("bad", "good"))
    code = f"""
import json, sys
from fastbert.light import TextClassifier, TextEmbedder
vectors = TextEmbedder.from_pretrained({str(tiny)!r}).embed(["the cat sat", "a dog"])
answer = TextClassifier.from_pretrained({str(tmp_path)!r})("a cat")
taken = [name for name in ("torch", "transformers", "huggingface_hub", "scipy", "pandas") if name in sys.modules]
print(json.dumps([vectors.tolist(), answer, taken]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    vectors, answer, taken = json.loads(done.stdout)
    assert taken == []
    expected = fastbert.Embedder.from_pretrained(tiny).embed(["the cat sat", "a dog"])
    assert np.array_equal(np.array(vectors, np.float32), expected)
    assert answer[0]["label"] in ("bad", "good")


def test_bad_arguments(tiny, tmp_path):
    for options, message in (
        ({"dtype": "float16"}, r"dtype is 'float16'; it must be one of 'float32', 'bfloat16', or None"),
        ({"quantize": "int4"}, r"quantize is 'int4'; it must be None or 'int8'"),
        ({"pooling": "median"}, r"pooling is 'median'"),
        ({"truncate_dim": 99}, r"truncate_dim is 99; it must be 1 to 48"),
    ):
        with pytest.raises(ValueError, match=message):
            TextEmbedder.from_pretrained(tiny, **options)
    embedder = TextEmbedder.from_pretrained(tiny)
    with pytest.raises(ValueError, match=r"input_ids holds 999; vocab_size is 20, so 0 to 19 are valid"):
        embedder.encoder(np.array([2, 999]), np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match=r"a sequence of 41 tokens; max_position_embeddings is 40"):
        embedder.encoder(np.full(41, 5), np.array([0, 41], np.int32))
    other = tmp_path / "other"
    save_tiny(other, hidden_size=64)
    (other / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* has shape .*; the config makes it"):
        TextEmbedder.from_pretrained(other)


def test_pickled_weights_need_torch(tiny, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(fastbert.BertModel.from_pretrained(tiny).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ImportError, match=r"pytorch_model\.bin, a pickled checkpoint, needs torch"):
        TextEmbedder.from_pretrained(folder)
