"""Packed weights on disk: the same arrays, made again where anything that they depend on has changed."""

import os
import shutil

import numpy as np
import pytest
import torch
from support import force_isa, require_native
from tiny_bert import save_tiny

import fastbert
from fastbert import native
from fastbert.light import TextClassifier, TextEmbedder, cache, loading

TEXTS = ["the cat sat on the mat", "a dog", ""]


@pytest.fixture(autouse=True)
def _native():
    require_native()


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def packed(monkeypatch):
    """The number of times that weights were packed."""
    counts = []
    real = loading.pack_encoder

    def counting(*args, **options):
        counts.append(1)
        return real(*args, **options)

    monkeypatch.setattr(loading, "pack_encoder", counting)
    return counts


def embed(folder, kept, **options):
    return TextEmbedder.from_pretrained(folder, cache=kept, **options).embed(TEXTS)


def files(folder):
    return sorted(folder.glob("*.fbpack"))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"pooling": "pooler"}], ids=str)
def test_the_second_time_they_are_mapped(tiny, tmp_path, packed, options):
    expected = TextEmbedder.from_pretrained(tiny, **options).embed(TEXTS)
    for times in (2, 2):  # once without a cache, once for it
        assert np.array_equal(embed(tiny, tmp_path / "kept", **options), expected)
        assert len(packed) == times
    assert len(files(tmp_path / "kept")) == 1


def test_each_precision_has_a_file_of_its_own(tiny, tmp_path, packed):
    for options in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"}) * 2:
        embed(tiny, tmp_path / "kept", **options)
    assert len(packed) == 3 == len(files(tmp_path / "kept"))


def test_an_instruction_set_has_a_file_of_its_own(tiny, tmp_path, packed, monkeypatch):
    names = native.real_isas()[:2]
    for name in names * 2:
        force_isa(monkeypatch, name)
        embed(tiny, tmp_path / "kept")
    native.extension.chosen_isa.cache_clear()
    assert len(packed) == len(names) == len(files(tmp_path / "kept"))


def test_other_weights_are_packed_anew(tiny, tmp_path, packed):
    kept = tmp_path / "kept"
    embed(tiny, kept)
    torch.manual_seed(1)
    save_tiny(tiny)  # of the same size
    assert np.array_equal(embed(tiny, kept), fastbert.Embedder.from_pretrained(tiny).embed(TEXTS))
    assert len(packed) == 2 and len(files(kept)) == 1


def test_another_time_of_the_same_weights_is_none(tiny, tmp_path, packed):
    embed(tiny, tmp_path / "kept")
    os.utime(tiny / "model.safetensors", (1, 1))
    embed(tiny, tmp_path / "kept")
    assert len(packed) == 1


def test_another_config_is_packed_anew(tiny, tmp_path, packed):
    embed(tiny, tmp_path / "kept")
    config = tiny / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05'))
    assert np.array_equal(embed(tiny, tmp_path / "kept"), fastbert.Embedder.from_pretrained(tiny).embed(TEXTS))
    assert len(packed) == 2


@pytest.mark.parametrize("harm", ["cut", "a bit", "the magic", "the header", "a digit", "empty"])
def test_a_damaged_file_is_made_anew(tiny, tmp_path, packed, harm):
    expected = embed(tiny, tmp_path / "kept")
    (file,) = files(tmp_path / "kept")
    data = bytearray(file.read_bytes())
    harmed = {
        "cut": lambda: data[:-1],
        "a bit": lambda: data[:-700] + bytes([data[-700] ^ 1]) + data[-699:],
        "the magic": lambda: b"x" + data[1:],
        "the header": lambda: data[:20] + b"\xff" + data[21:],
        "a digit": lambda: data.replace(b'"place": 0', b'"place": 1', 1),
        "empty": lambda: b"",
    }[harm]()
    file.write_bytes(bytes(harmed))
    for _ in range(2):
        assert np.array_equal(embed(tiny, tmp_path / "kept"), expected)
        assert len(packed) == 2
    assert file.read_bytes() == bytes(data)


def test_weights_that_are_replaced_while_they_are_packed(tiny, tmp_path, monkeypatch):
    """What was mapped is kept, and found to be another at the next start."""
    kept, other = tmp_path / "kept", tmp_path / "other"
    torch.manual_seed(1)
    save_tiny(other)
    expected, real = fastbert.Embedder.from_pretrained(tiny).embed(TEXTS), loading.pack_encoder

    def replacing(*args, **options):
        os.replace(other / "model.safetensors", tiny / "model.safetensors")
        monkeypatch.setattr(loading, "pack_encoder", real)
        return real(*args, **options)

    monkeypatch.setattr(loading, "pack_encoder", replacing)
    assert np.array_equal(embed(tiny, kept), expected)
    changed = fastbert.Embedder.from_pretrained(tiny).embed(TEXTS)
    assert not np.array_equal(changed, expected) and np.array_equal(embed(tiny, kept), changed)


def test_another_version_packs_anew(tiny, tmp_path, packed, monkeypatch):
    embed(tiny, tmp_path / "kept")
    monkeypatch.setattr(cache, "__version__", "another")
    embed(tiny, tmp_path / "kept")
    assert len(packed) == 2


def test_a_failed_write_leaves_nothing(tiny, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setattr(cache, "_first_page", lambda length: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(tiny, kept)
    assert list(kept.iterdir()) == []


def test_heads_are_kept_too(tmp_path, packed):
    torch.manual_seed(0)
    folder = save_tiny(tmp_path / "tiny", fastbert.BertForSequenceClassification)
    answers = [TextClassifier.from_pretrained(folder, cache=tmp_path / "kept")(TEXTS, top_k=None) for _ in range(2)]
    assert answers[0] == answers[1] == fastbert.pipeline("text-classification", str(folder))(TEXTS, top_k=None)
    assert len(packed) == 1


def test_the_default_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    embed(tiny, True)
    assert len(files(tmp_path / "home" / "fastbert" / "packed")) == 1
    shutil.rmtree(tmp_path / "home")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    embed(tiny, True)
    assert len(files(tmp_path / "home" / ".cache" / "fastbert" / "packed")) == 1
