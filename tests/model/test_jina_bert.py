"""JinaBERT v2, which transformers has not: against a reference written from the papers on ALiBi and gated products."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support import mask_of

import fastbert
from fastbert.engine.positions import alibi_bias, alibi_slopes

SIZES = {
    **{"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 40},
    **{"vocab_size": 120, "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu"},
    **{"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0},
}
CONFIG = {
    **SIZES,
    **{"model_type": "bert", "position_embedding_type": "alibi", "feed_forward_type": "geglu"},
    **{"architectures": ["JinaBertForMaskedLM"], "emb_pooler": "mean"},
}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    E, inner, V = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]

    def normal(*shape):
        return (0.15 * torch.randn(shape, generator=generator)).to(dtype)

    def linear(name, rows, columns, bias=True):
        return {f"{name}.weight": normal(rows, columns), **({f"{name}.bias": normal(rows)} if bias else {})}

    def norm(name):
        return {f"{name}.weight": 1 + normal(E), f"{name}.bias": normal(E)}

    state = {"embeddings.word_embeddings.weight": normal(V, E), "embeddings.token_type_embeddings.weight": normal(2, E)}
    state |= norm("embeddings.LayerNorm") | linear("pooler.dense", E, E)
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            state |= linear(f"{layer}.attention.self.{part}", E, E)
        state |= linear(f"{layer}.attention.output.dense", E, E) | norm(f"{layer}.attention.output.LayerNorm")
        state |= linear(f"{layer}.mlp.gated_layers", 2 * inner, E, bias=False) | linear(f"{layer}.mlp.wo", E, inner)
        state |= norm(f"{layer}.mlp.layernorm")
    head = linear("cls.predictions.transform.dense", E, E) | norm("cls.predictions.transform.LayerNorm")
    head |= {"cls.predictions.decoder.bias": normal(V)}
    return state, head


def slopes_of_the_paper(heads):
    """Press et al., 2022, section 3: a geometric sequence from 2^(-8/n), which is also its ratio, for a power of two;
    for others, as its authors' code has it, every second slope of twice the power below follows."""
    power = 2 ** (heads.bit_length() - 1)
    first = [(2 ** (-8 / power)) ** (i + 1) for i in range(power)]
    return first if power == heads else [*first, *slopes_of_the_paper(2 * power)[0::2][: heads - power]]


def reference(state, ids, mask, types):
    """The states of every column (B, S, E)."""
    heads, (B, S) = SIZES["num_attention_heads"], ids.shape

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], SIZES["layer_norm_eps"])

    tables = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
    x = norm(state[tables[0]][ids] + state[tables[1]][types], "embeddings.LayerNorm")
    places = torch.arange(S)
    distance = (places[:, None] - places).abs().to(x.dtype)
    bias = -torch.tensor(slopes_of_the_paper(heads), dtype=x.dtype)[:, None, None] * distance
    bias = bias + torch.where(mask == 1, 0.0, -1e30)[:, None, None, :].to(x.dtype)
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").view(B, S, heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        context = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        x = norm(linear(context, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        gate, up = linear(x, f"{layer}.mlp.gated_layers").chunk(2, -1)
        x = norm(linear(F.gelu(gate) * up, f"{layer}.mlp.wo") + x, f"{layer}.mlp.layernorm")
    return x


def masked_lm(state, head, x):
    """The logits (..., V) of states (..., E)."""
    x = F.gelu(F.linear(x, *(head[f"cls.predictions.transform.dense.{p}"] for p in ("weight", "bias"))))
    norm = (head[f"cls.predictions.transform.LayerNorm.{p}"] for p in ("weight", "bias"))
    x = F.layer_norm(x, x.shape[-1:], *norm, SIZES["layer_norm_eps"])
    return F.linear(x, state["embeddings.word_embeddings.weight"], head["cls.predictions.decoder.bias"])


@pytest.fixture
def folder(tmp_path):
    state, head = weights()
    save_file({**{f"bert.{name}": x for name, x in state.items()}, **head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def inputs(kind):
    ids = torch.randint(5, 120, (3, 8), generator=torch.Generator().manual_seed(1))
    types = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).expand(3, 8).contiguous()
    mask = mask_of(kind)
    mask = torch.ones_like(ids) if mask is None else mask
    return ids.masked_fill(mask == 0, 0), mask, types


@pytest.mark.parametrize("kind", ["absent", "right", "holes"])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs(folder, kind, grad):
    model = fastbert.AutoModel.from_pretrained(folder)
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 0], [1] * 8])
    ids, mask, types = inputs("absent" if kind == "holes" else kind)
    mask = holes if kind == "holes" else mask
    state, _ = weights()
    with torch.set_grad_enabled(grad):
        got = model(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    torch.testing.assert_close(got[mask == 1], reference(state, ids, mask, types)[mask == 1], rtol=1e-5, atol=2e-5)


def test_gradients(folder):
    model = fastbert.AutoModel.from_pretrained(folder)
    ids, mask, types = inputs("right")
    state = {name: x.double().requires_grad_() for name, x in weights()[0].items()}
    for states in (
        model(ids, attention_mask=mask, token_type_ids=types).last_hidden_state,
        reference(state, ids, mask, types),
    ):
        states[mask == 1].square().sum().backward()
    total = sum(x.grad.norm() ** 2 for x in state.values() if x.grad is not None).sqrt()
    for name, parameter in model.named_parameters():
        if "pooler" not in name:  # 1e-5 of all: a key's bias has a gradient of zero
            assert (parameter.grad - state[name].grad).norm() <= 1e-5 * total, name


def test_the_masked_language_model(folder):
    model = fastbert.AutoModelForMaskedLM.from_pretrained(folder)
    ids, mask, types = inputs("right")
    state, head = weights()
    logits = masked_lm(state, head, reference(state, ids, mask, types))
    got = model(ids, attention_mask=mask, token_type_ids=types).logits
    torch.testing.assert_close(got[mask == 1], logits[mask == 1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("setting", [{"quantize": "int8"}, {"dtype": torch.bfloat16}])
def test_lower_precisions(folder, setting):
    ids, mask, types = inputs("right")
    exact = reference(weights()[0], ids, mask, types)[mask == 1]
    with torch.no_grad():
        got = fastbert.AutoModel.from_pretrained(folder, **setting)(ids, mask, types).last_hidden_state[mask == 1]
    assert (got.float() - exact).norm() < 0.05 * exact.norm()


def test_the_folder_stays_its_own(folder, tmp_path):
    model = fastbert.AutoModelForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: saved[name] for name in CONFIG} == CONFIG
    again = fastbert.AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_slopes():
    for heads in (1, 2, 6, 8, 12, 16, 20):
        assert alibi_slopes(heads) == pytest.approx(slopes_of_the_paper(heads))
    bias = torch.from_numpy(alibi_bias(2, 4))
    assert bias.shape == (2, 7) and torch.equal(bias, bias.flip(1)) and bias[0, 3] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"feed_forward_type": "original"}, "feed_forward_type is 'original'; fastbert knows 'geglu' only"),
        ({"use_qk_norm": True}, "use_qk_norm is True; fastbert knows False only"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; fastbert knows"),
        ({"model_type": "roberta"}, "position_embedding_type is 'alibi'; fastbert knows 'absolute'"),
    ],
)
def test_what_is_not_known_is_named(change, reason):
    with pytest.raises(ValueError, match=reason):
        fastbert.BertConfig.from_dict({**CONFIG, **change})


def test_a_text_beyond_the_last_position(folder):
    model = fastbert.AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="a sequence of 65 tokens; max_position_embeddings is 64"):
        model(torch.full((1, 65), 7))
