"""A folder's truncate_dim: vectors as sentence-transformers gives them, or an error that names the file."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from fastbert.inference.embed import Embedder


@pytest.fixture
def folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    modules = [
        {"idx": int(n), "name": n, "path": p, "type": f"sentence_transformers.models.{k}"} for n, p, k in modules
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Normalize"):
        (tmp_path / name).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return tmp_path


def _write(folder, value):
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": value}))


def test_as_sentence_transformers(folder):
    _write(folder, 8)
    texts = ["a cat sat", "cat"]
    expected = SentenceTransformer(str(folder), device="cpu", truncate_dim=8).encode(texts)
    vectors = Embedder.from_pretrained(folder).embed(texts)
    assert vectors.shape == (2, 8)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("value", [0, -1, 33, "8", 8.0, True])
def test_what_is_no_width_is_refused(folder, value):
    _write(folder, value)
    with pytest.raises(ValueError, match=r"config_sentence_transformers\.json: truncate_dim is .*1 to 32"):
        Embedder.from_pretrained(folder)
