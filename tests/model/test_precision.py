"""precision= and quantize= through every entry: what they do, keep, refuse and say."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from cli_support import run
from support import TINY, mask_of, tokens
from tiny_bert import save_tiny

import fastbert
from fastbert import Embedder, FillMask
from fastbert.model.layer import Embeddings
from fastbert.precision import PRECISIONS, QUANTIZED, SPLIT

CLASSES = [n for n in fastbert.__all__ if n.startswith("BertFor")] + ["BertModel"]
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # wide enough to be rotated
TEXTS = ["the cat sat on the mat.", "a dog", "the red dogs ran under a blue mat."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"), fastbert.BertForPreTraining, **WIDE)


def given(setting):
    return {"quantize" if setting in QUANTIZED else "precision": setting}


def assert_close_not_equal(a, b, tolerance):
    assert not torch.equal(a, b)
    assert (a.float() - b.float()).norm() <= tolerance * b.float().norm(), (a.float() - b.float()).norm() / b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_takes_quantize(name, dtype, tiny):
    model = getattr(fastbert, name)
    torch.manual_seed(0)  # for heads that the checkpoint lacks
    plain = model.from_pretrained(tiny, dtype=dtype)
    torch.manual_seed(0)
    quantized = model.from_pretrained(tiny, dtype=dtype, quantize="int8")
    assert quantized.matmul_precision == "int8" and plain.matmul_precision is None
    a, b = quantized.state_dict(), plain.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    ids = tokens(vocab=20)[None] if name == "BertForMultipleChoice" else tokens(vocab=20)
    with torch.inference_mode():
        for x, y in zip(quantized(ids).to_tuple(), plain(ids).to_tuple(), strict=True):
            assert x.dtype == dtype
            assert_close_not_equal(x, y, 0.25)
    a = quantized.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("precision", SPLIT)
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_takes_precision(name, precision, tiny):
    torch.manual_seed(0)
    plain = getattr(fastbert, name).from_pretrained(tiny)
    torch.manual_seed(0)
    model = getattr(fastbert, name).from_pretrained(tiny, precision=precision)
    assert model.matmul_precision == precision
    ids = tokens(vocab=20)[None] if name == "BertForMultipleChoice" else tokens(vocab=20)
    with torch.inference_mode():
        for x, y in zip(model(ids).to_tuple(), plain(ids).to_tuple(), strict=True):
            assert (x - y).norm() <= (1e-4 if precision == "high" else 1e-5) * y.norm()


def test_every_setting_through_embedder_and_fill_mask(tiny):
    exact = Embedder.from_pretrained(tiny).embed(TEXTS)
    words = FillMask.from_pretrained(tiny)("the [MASK] sat")[0]
    for setting in PRECISIONS:
        embedder = Embedder.from_pretrained(tiny, **given(setting))
        assert embedder.model.matmul_precision == setting
        error = np.abs(embedder.embed(TEXTS) - exact).max()
        assert error <= (0.3 if setting in QUANTIZED else 1e-4) and (error > 1e-4) == (setting in QUANTIZED)
        fill = FillMask.from_pretrained(tiny, **given(setting))
        assert fill.model.matmul_precision == fill.model.bert.matmul_precision == setting
        assert fill("the [MASK] sat")[0][0].probability == pytest.approx(words[0].probability, rel=0.2)


ENTRIES = {
    "from_pretrained": lambda folder, **options: fastbert.BertForMaskedLM.from_pretrained(folder, **options),
    "Embedder": lambda folder, **options: Embedder.from_pretrained(folder, **options),
    "FillMask": lambda folder, **options: FillMask.from_pretrained(folder, **options),
    "accelerate": lambda folder, **options: fastbert.accelerate(
        transformers.BertModel(transformers.BertConfig(**TINY)).to(options.pop("device", "cpu")), **options
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "medium"}, "precision is 'medium'; it must be None, 'high' or 'highest'"),
        ({"precision": "int8"}, "precision is 'int8'; it must be None, 'high' or 'highest'"),
        ({"quantize": "int4"}, "quantize is 'int4'; it must be None or 'int8'"),
        ({"quantize": "fp8"}, "quantize is 'fp8'; it must be None or 'int8'"),
        ({"quantize": True}, "quantize is True; it must be None or 'int8'"),
        ({"precision": "high", "quantize": "int8"}, "precision is 'high' and quantize is 'int8'; at most one"),
        ({"precision": "high", "dtype": torch.bfloat16}, "precision is 'high' and the weights are bfloat16; it is for"),
        ({"precision": "highest", "dtype": torch.float64}, "precision is 'highest' and the weights are float64"),
        ({"quantize": "int8", "device": "meta"}, "quantize is 'int8' and the device is meta; it runs on cpu, cuda"),
    ],
)
def test_what_does_not_go_together(entry, options, message, tiny):
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](tiny, **options)


def test_precision_of_a_checkpoint_in_bfloat16(tiny, tmp_path):
    fastbert.BertModel.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weights are bfloat16; it is for float32 weights: give"):
        fastbert.BertModel.from_pretrained(tmp_path, precision="high")
    assert fastbert.BertModel.from_pretrained(tmp_path, precision="high", dtype=torch.float32).dtype == torch.float32


def test_a_model_that_moved_after_it_was_loaded(tiny):
    model = fastbert.BertModel.from_pretrained(tiny, precision="high").to(torch.bfloat16)
    with torch.no_grad(), pytest.raises(ValueError, match="precision is 'high' and the weights are bfloat16"):
        model(tokens(vocab=20))
    with pytest.raises(ValueError, match="matmul_precision is 'fast'; it must be None or one of high, highest, int8"):
        model.matmul_precision = "fast"
    model.matmul_precision = None
    model(tokens(vocab=20))


def test_one_models_setting_is_not_anothers(tiny):
    ids = tokens(vocab=20)
    plain, quantized = (fastbert.BertModel.from_pretrained(tiny, quantize=q) for q in (None, "int8"))
    with torch.inference_mode():
        alone = plain(ids)[0]
        int8 = quantized(ids)[0]
        for _ in range(2):
            assert torch.equal(plain(ids)[0], alone) and torch.equal(quantized(ids)[0], int8)
    assert not torch.equal(alone, int8)


def test_copies_keep_it_and_checkpoints_do_not(tiny, tmp_path):
    model = fastbert.BertForMaskedLM.from_pretrained(tiny, quantize="int8")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.matmul_precision == "int8"
    model.save_pretrained(tmp_path)
    assert fastbert.BertForMaskedLM.from_pretrained(tmp_path).matmul_precision is None
    assert "int8" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_states_and_attentions_of_a_quantized_model(kind, tiny):
    model = fastbert.BertModel.from_pretrained(tiny, quantize="int8")
    exact = fastbert.BertModel.from_pretrained(tiny)
    inputs = {"input_ids": tokens(vocab=20), "attention_mask": mask_of(kind)}
    with torch.inference_mode():
        plain = model(**inputs)
        states = model(**inputs, output_hidden_states=True)
        both = model(**inputs, output_hidden_states=True, output_attentions=True)
        wanted = exact(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(states.hidden_states) == 4 and len(both.attentions) == 3
    # A rounding that falls the other way moves a number by an eighth of a percent, so: as near as int8 is.
    for out in (states, both):
        for field in ("last_hidden_state", "pooler_output"):
            assert (out[field] - plain[field]).norm() <= 0.02 * plain[field].norm(), field
    torch.testing.assert_close(states.hidden_states[0], wanted.hidden_states[0])
    for got, want in zip(both.hidden_states[1:], wanted.hidden_states[1:], strict=True):
        assert_close_not_equal(got, want, 0.1)
    # A row that begins with a pad is pooled by a path of its own.
    first_is_pad = mask_of(kind)[:, 0] == 0
    for rows in (first_is_pad, ~first_is_pad):
        if rows.any():
            assert_close_not_equal(plain.pooler_output[rows], wanted.pooler_output[rows], 0.1)
    assert_close_not_equal(torch.stack(both.attentions), torch.stack(wanted.attentions), 0.1)


def test_a_text_does_not_depend_on_its_batch(tiny):
    embedder = Embedder.from_pretrained(tiny, quantize="int8")
    together, alone = embedder.embed(TEXTS), np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_a_gradient_of_int8_is_refused_before_anything_runs(tiny, monkeypatch):
    mine = fastbert.BertForSequenceClassification.from_pretrained(tiny, quantize="int8")
    theirs = fastbert.accelerate(transformers.BertModel(transformers.BertConfig(**TINY)), quantize="int8")
    for model, bert in ((mine, mine.bert), (theirs, theirs)):
        ran, embed = [], Embeddings.__call__
        monkeypatch.setattr(Embeddings, "__call__", lambda *call, r=ran, embed=embed: r.append(call) or embed(*call))
        for options in ({}, {"output_attentions": True}, {"output_hidden_states": True}):
            with pytest.raises(
                ValueError, match="quantize is 'int8', which has no gradient, and one is wanted: run the"
            ):
                model(tokens(vocab=20), **options)
        assert not ran
        with torch.no_grad():
            model(tokens(vocab=20), output_hidden_states=True)
        assert ran
        bert.requires_grad_(False)
        model(tokens(vocab=20))
        embeds = torch.randn(1, 4, bert.config.hidden_size)
        model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="no gradient"):
            model(inputs_embeds=embeds.requires_grad_())


def test_a_head_can_be_trained_on_a_frozen_int8_encoder(tiny):
    model = fastbert.BertForSequenceClassification.from_pretrained(tiny, quantize="int8")
    model.bert.requires_grad_(False)
    model(tokens(vocab=20), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("setting", PRECISIONS)
def test_autocast_has_the_last_word(setting, tiny):
    model = fastbert.BertModel.from_pretrained(tiny, **given(setting))
    exact = fastbert.BertModel.from_pretrained(tiny)
    ids = tokens(vocab=20)
    with torch.no_grad():
        wanted = exact(ids)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got = model(ids)[0]
    assert_close_not_equal(got, wanted, 0.1)


def test_a_wrapped_layer_is_called_as_it_is(tiny):
    model = fastbert.BertModel.from_pretrained(tiny, quantize="int8")
    seen = []
    model.encoder.layer[0].output.dense.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.inference_mode():
        plain = model(tokens(vocab=20))[0]
    assert len(seen) == 1 and plain.isfinite().all()


# accelerate.


def twins(name="BertModel"):
    torch.manual_seed(0)
    original = getattr(transformers, name)(transformers.BertConfig(**TINY)).eval()
    return copy.deepcopy(original), original


def test_accelerate_quantizes_as_from_pretrained_does(tmp_path):
    live, original = twins("BertForMaskedLM")
    original.save_pretrained(tmp_path)
    mine = fastbert.BertForMaskedLM.from_pretrained(tmp_path, quantize="int8")
    mask = mask_of("left")
    inputs = {"input_ids": tokens().masked_fill(mask == 0, 0), "attention_mask": mask}
    fastbert.accelerate(live, quantize="int8")
    copies = copy.deepcopy(live), pickle.loads(pickle.dumps(live))
    with torch.inference_mode():
        real = mask_of("left").bool()
        assert torch.equal(live.bert(**inputs)[0], mine.bert(**inputs)[0])
        assert_close_not_equal(live(**inputs).logits[real], original(**inputs).logits[real], 0.1)
        for other in (*copies, live):
            assert torch.equal(other(**inputs).logits, live(**inputs).logits)
    assert live.bert.forward.replicate().forward.matmul_precision == "int8"
    a, b = live.state_dict(), original.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_accelerate_again_and_restore(tiny):
    live, original = twins()
    with torch.no_grad():
        exact = original(tokens())[0]
        int8 = fastbert.accelerate(live, quantize="int8")(tokens())[0]
        assert not torch.allclose(int8, exact, atol=1e-5)
        torch.testing.assert_close(fastbert.accelerate(live)(tokens())[0], exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            fastbert.accelerate(live, precision="high")(tokens())[0], exact, rtol=1e-4, atol=1e-4
        )
        fastbert.accelerate(live, quantize="int8")
        assert torch.equal(fastbert.restore(live)(tokens())[0], exact)
        torch.testing.assert_close(fastbert.accelerate(live)(tokens())[0], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_accelerate_converts_all_of_the_model(name):
    live, original = twins(name)
    parameters = list(live.parameters())
    fastbert.accelerate(live, dtype=torch.bfloat16)
    assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(live.parameters(), parameters, strict=True))
    with torch.no_grad():
        got, wanted = live(tokens()).logits, original.to(torch.bfloat16)(tokens()).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted.float()).norm() <= 0.02 * wanted.float().norm()
    fastbert.restore(live)
    assert live.dtype == torch.bfloat16


def test_accelerate_that_fails_changes_nothing():
    live, _ = twins()
    for options, message in (
        ({"dtype": torch.int8}, "dtype is torch.int8; it must be a floating-point one"),
        ({"dtype": torch.bfloat16, "precision": "high"}, "precision is 'high' and the weights are bfloat16"),
        ({"dtype": torch.bfloat16, "quantize": "int9"}, "quantize is 'int9'"),
    ):
        with pytest.raises(ValueError, match=message):
            fastbert.accelerate(live, **options)
        assert live.dtype == torch.float32 and "forward" not in live.__dict__
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True))
    with pytest.warns(UserWarning, match="left the model as it was"):
        fastbert.accelerate(decoder, dtype=torch.bfloat16, quantize="int8")
    assert decoder.dtype == torch.float32


# explain.


@pytest.mark.parametrize("setting", PRECISIONS)
def test_explain_says_what_a_model_runs_in(setting, tiny):
    live, _ = twins()
    asked = f"float32, {next(iter(given(setting)))}='{setting}'"
    for model in (
        fastbert.BertModel.from_pretrained(tiny, **given(setting)),
        Embedder.from_pretrained(tiny, **given(setting)),
        fastbert.accelerate(live, **given(setting)),
    ):
        report = fastbert.explain(model)
        assert f"fastbert, in {asked}" in str(report)
        (linear,) = [row[3] for row in report.rows if row[0] == "linear" and row[3].startswith("yes")]
        assert linear.startswith(f"yes; {setting}: "), linear
    assert setting not in str(fastbert.explain(fastbert.restore(live)))


# The command line.


@pytest.mark.parametrize("setting", PRECISIONS)
def test_options_of_embed(setting, tiny, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    option = ["--device", "cpu", *(f"--{name}={value}" for name, value in given(setting).items())]
    out = tmp_path / "o.npy"
    assert run(capsys, "embed", tiny, tmp_path / "in.txt", "-o", out, "-q", *option)[0] == 0
    expected = Embedder.from_pretrained(tiny, **given(setting)).embed(TEXTS)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", PRECISIONS)
def test_options_of_fill_mask(setting, tiny, capsys):
    option = ["--device", "cpu", *(f"--{name}={value}" for name, value in given(setting).items())]
    code, out, err = run(capsys, "fill-mask", tiny, "the [MASK] sat", "--json", *option)
    assert (code, err) == (0, "")
    expected = FillMask.from_pretrained(tiny, **given(setting))("the [MASK] sat")[0]
    got = [candidate["probability"] for candidate in json.loads(out)["candidates"]]
    np.testing.assert_allclose(got, [candidate.probability for candidate in expected], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--precision", "high", "--quantize", "int8"],
            2,
            "argument --quantize: not allowed with argument --precision",
        ),
        (["--precision", "int8"], 2, "argument --precision: invalid choice: 'int8'"),
        (["--quantize", "int4"], 2, "argument --quantize: invalid choice: 'int4'"),
        (["--precision", "high", "--dtype", "bfloat16"], 1, "precision is 'high' and the weights are bfloat16"),
    ],
)
@pytest.mark.parametrize("command", ["embed", "fill-mask"])
def test_options_that_do_not_go_together(command, options, code, message, tiny, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a text\n")
    got, out, err = run(capsys, command, tiny, "none.txt" if command == "fill-mask" else tmp_path / "in.txt", *options)
    assert (got, out) == (code, "") and message in err


def test_a_file_is_of_one_precision(tiny, tmp_path, capsys):
    source, out = tmp_path / "in.txt", tmp_path / "o.npy"
    source.write_text("".join(f"{text}\n" for text in [*TEXTS * 5, ""]))
    args = ["embed", tiny, source, "-o", out, "-q", "--window", 4, "--device", "cpu"]
    assert run(capsys, *args, "--precision", "high")[0] == 1  # at the empty line
    for options, message in (
        ([], "precision was 'high' and is None now"),
        (["--precision", "highest"], "precision was 'high' and is 'highest' now"),
        (["--quantize", "int8"], "precision was 'high' and is None now"),
    ):
        code, _, err = run(capsys, *args, *options, "--resume")
        assert code == 1 and message in err, err
    source.write_text("".join(f"{text}\n" for text in TEXTS * 5))
    assert run(capsys, *args, "--precision", "high", "--resume")[0] == 0


def test_fingerprints_differ(tiny):
    prints = {Embedder.from_pretrained(tiny, **given(setting)).fingerprint() for setting in PRECISIONS}
    assert len({*prints, Embedder.from_pretrained(tiny).fingerprint()}) == 4


def test_doctor_says_what_each_setting_comes_to(capsys):
    code, out, _ = run(capsys, "doctor")
    lines = out.split("products of a model's layers\n")[1].splitlines()
    assert code == 0 and all(": " in line for line in lines)
    asked = ["float32  ", "float32, precision='high'", "float32, precision='highest'", "float32, quantize='int8'"]
    assert all(any(line.startswith(f"  {a}") and "cpu: " in line for line in lines) for a in [*asked, "bfloat16"])
