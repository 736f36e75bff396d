"""Models loaded with inference_only=True: the same numbers, without the memory of weights that no one reads."""

import copy
import weakref

import pytest
import torch
from support import TINY, mask_of, require_native, tokens

import fastbert
from fastbert.model.layer import Products
from fastbert.model.plan import EncoderPlan, encoder_plan


@pytest.fixture
def folder(tmp_path):
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**TINY | {"hidden_dropout_prob": 0.1}))
    model.init_weights()
    model.save_pretrained(tmp_path)
    return tmp_path


SETTINGS = [{}, {"dtype": torch.bfloat16}, {"precision": "high"}, {"quantize": "int8"}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_same_numbers(folder, setting):
    """Also where every layer is run by itself, and without a no_grad around it."""
    require_native()
    plain = fastbert.BertForMaskedLM.from_pretrained(folder, **setting)
    lean = fastbert.BertForMaskedLM.from_pretrained(folder, inference_only=True, **setting)
    inputs = {"input_ids": tokens(), "attention_mask": mask_of("right")}
    with torch.no_grad():
        wanted, all_states = plain(**inputs), plain(**inputs, output_hidden_states=True)
    assert torch.equal(lean(**inputs).logits, wanted.logits)
    for a, b in zip(lean(**inputs, output_hidden_states=True).hidden_states, all_states.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert lean.dtype == plain.dtype and lean.device == plain.device
    assert not any(p.requires_grad for p in lean.parameters())


def test_the_weights_have_no_memory(folder):
    require_native()
    lean = fastbert.BertForMaskedLM.from_pretrained(folder, inference_only=True)
    layer = lean.bert.encoder.layer[0]
    for linear in (
        layer.attention.self.query,
        layer.attention.output.dense,
        layer.intermediate.dense,
        layer.output.dense,
    ):
        assert linear.weight.is_meta and not linear.bias.is_meta
    assert not lean.bert.embeddings.word_embeddings.weight.is_meta
    lean(input_ids=tokens())
    plan = encoder_plan(lean.bert, Products(lean.config.hidden_act))
    width, inner = lean.config.hidden_size, lean.config.intermediate_size
    matrices = lean.config.num_hidden_layers * (4 * width + 2 * inner) * width * 4
    assert matrices <= plan.nbytes() <= 1.5 * matrices


def test_a_layer_lets_go_of_its_weights_before_the_next_one_is_loaded(folder, monkeypatch):
    require_native()
    release, left = EncoderPlan.release, []

    def released(plan, index):
        weights = [weakref.ref(w) for p in plan.layers[index].projections for w in p.weight.weights]
        release(plan, index)
        left.append(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(EncoderPlan, "release", released)
    fastbert.BertForMaskedLM.from_pretrained(folder, inference_only=True)
    assert left == [0] * TINY["num_hidden_layers"]


def test_what_such_a_model_cannot_do(folder, tmp_path, monkeypatch):
    require_native()
    lean = fastbert.BertForMaskedLM.from_pretrained(folder, inference_only=True)
    with pytest.raises(ValueError, match="BertForMaskedLM was loaded with inference_only=True; load it without"):
        lean.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    message = "loaded with inference_only=True runs in the dtype, precision and backend"
    for run in (
        lambda: copy.deepcopy(lean)(tokens()),
        lambda: lean.to(torch.bfloat16)(tokens()),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    lean = fastbert.BertForMaskedLM.from_pretrained(folder, inference_only=True)
    with fastbert.use_backend("reference"), pytest.raises(ValueError, match=message):
        lean(tokens())
    lean.bert.matmul_precision = "int8"
    with pytest.raises(ValueError, match=message):
        lean(tokens())
    lean.bert.matmul_precision = None
    lean(tokens())


def test_a_backend_that_reads_the_parameters_leaves_them(folder):
    with fastbert.use_backend("reference"):
        model = fastbert.BertForMaskedLM.from_pretrained(folder, inference_only=True)
        model(tokens())
    assert not any(p.is_meta for p in model.parameters())
    model.save_pretrained(folder / "again")


def test_of_embedder_and_fill_mask(minilm, antiberty):
    for kind, path, run in (
        (fastbert.Embedder, minilm, lambda m: torch.from_numpy(m.embed(["A man is playing a guitar.", "Ok"]))),
        (fastbert.BertModel, antiberty, lambda m: m(tokens(vocab=20))[0]),
    ):
        with torch.no_grad():
            wanted = run(kind.from_pretrained(path))
            assert torch.equal(run(kind.from_pretrained(path, inference_only=True)), wanted)
    with pytest.raises(ValueError, match="loaded with inference_only=True and has no weights left to hash"):
        fastbert.Embedder.from_pretrained(minilm, inference_only=True).fingerprint()
