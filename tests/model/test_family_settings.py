"""Settings of families that fastbert does not know, or that do not fit: one error naming field, value and limit."""

import pytest
import torch
import transformers
from test_families_live import CONFIGS, fallbacks, given, make, real, twins

import fastbert
from fastbert import BertConfig
from fastbert.families import FAMILIES
from fastbert.families.layer_kinds import FULL, LOCAL, layer_kinds

ROTARY = [name for name in CONFIGS if FAMILIES[name.partition(" ")[0]].rotary and " " not in name]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


def config(name, **changes):
    return BertConfig.from_dict({"model_type": name, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "nomic_bert",
            {"rope_parameters": YARN},
            "rope_parameters.rope_type is 'yarn'; fastbert knows 'default', 'linear'",
        ),
        ("gte", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type is 'dynamic'"),
        ("modernbert", {"rope_parameters": {LOCAL: YARN}}, "rope_parameters.sliding_attention.rope_type is 'yarn'"),
        ("eurobert", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0; it must be a number above 0"),
        ("eurobert", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; it must be a number above 0"),
        ("gte", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0; it must be a number above 0"),
        ("gte", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ("gte", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; fastbert knows 1"),
        ("modernbert", {"local_attention": 127}, "local_attention is 127; it must be an even number of at least 2"),
        ("modernbert", {"local_attention": 0}, "local_attention is 0; it must be an even number"),
        ("modernbert", {"local_attention": True}, "local_attention is True; it must be an even number"),
        ("modernbert", {"layer_types": [FULL]}, "layer_types is .*; it must be 22 of 'full_attention' and"),
        ("modernbert", {"layer_types": ["wide"] * 22}, "layer_types is .*; it must be 22 of"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0; it must be an integer"),
        ("eurobert", {"num_key_value_heads": 5}, "num_key_value_heads is 5; it must divide num_attention_heads, 12"),
        ("eurobert", {"head_dim": 32}, "head_dim is 32; it must be 64, hidden_size / num_attention_heads"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size is 0; it must be an integer of at least 1"),
        ("gte", {"rope_theta": 0}, "rope_theta is 0; it must be a number above 0"),
        ("nomic_bert", {"rotary_scaling_factor": 2}, "rotary_scaling_factor is 2; fastbert knows None only"),
        ("nomic_bert", {"prenorm": True}, "prenorm is True; fastbert knows False only"),
        ("electra", {"summary_type": "mean"}, "summary_type is 'mean'; fastbert knows 'first' only"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64; fastbert knows 32"),
        ("distilbert", {"dim": 770}, "dim 770 is not a multiple of n_heads 12"),
        ("modernbert", {"norm_eps": 2}, "norm_eps is 2"),
    ],
)
def test_a_setting_that_does_not_fit(name, changes, reason):
    with pytest.raises(ValueError, match=f"config: .*{reason}"):
        config(name, **changes)


def test_the_folder_is_named(tmp_path):
    make("nomic_bert").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"rope_type": "default"', '"rope_type": "yarn"'))
    with pytest.raises(ValueError, match=r"config\.json: config: rope_parameters\.rope_type is 'yarn'"):
        fastbert.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ROTARY)
def test_a_text_beyond_the_last_position(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    model = fastbert.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="input_ids has a sequence of 41 tokens; max_position_embeddings is 40"):
        model(torch.full((1, 41), 7))
    with pytest.raises(ValueError, match="position_ids holds 40; max_position_embeddings is 40"):
        model(torch.full((1, 4), 7), position_ids=torch.tensor([[0, 1, 2, 40]]))


@pytest.mark.parametrize(
    ("name", "rope"),
    [("nomic_bert", {"rope_type": "yarn", "factor": 2.0}), ("gte", {"rope_type": "dynamic", "factor": 2.0})],
)
def test_a_live_model_with_unknown_angles_keeps_its_code(name, rope):
    with pytest.warns(UserWarning, match=f"rope_parameters.rope_type is '{rope['rope_type']}'"):
        fast, original = twins(name, rope_parameters={**rope, "rope_theta": 1e4})
    inputs = given(original, "Model", "right")
    assert torch.equal(fast(**inputs).last_hidden_state, original(**inputs).last_hidden_state)


@pytest.mark.parametrize("name", ROTARY)
def test_older_and_newer_settings_are_those_of_transformers(name, tmp_path):
    """The base of the angles, and positions divided by a factor, live and own."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}
    if name == "modernbert":
        rope = {FULL: {**rope, "rope_theta": 555.0}, LOCAL: rope}
    fast, original = twins(name, rope_parameters=rope)
    original.save_pretrained(tmp_path)
    own = fastbert.AutoModel.from_pretrained(tmp_path)
    inputs = given(original, "Model", "right")
    for model in (fast, own):
        a, b = (real(m(**inputs).last_hidden_state, inputs, "Model") for m in (model, original))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert not fallbacks(fast)
    plain = make(name)(**inputs).last_hidden_state
    assert (plain - original(**inputs).last_hidden_state).abs().max() > 1e-4  # the setting counts


def test_the_kinds_of_modernberts_layers():
    kinds = layer_kinds(config("modernbert"), FAMILIES["modernbert"])
    theirs = transformers.ModernBertConfig()
    assert [kind.name for kind in kinds] == theirs.layer_types
    assert {kind.window for kind in kinds if kind.name == LOCAL} == {64}
    assert {(kind.name, kind.theta, kind.window) for kind in kinds if kind.name == FULL} == {(FULL, 160_000.0, None)}
    older = config("modernbert", global_rope_theta=1e5, local_rope_theta=5e3, global_attn_every_n_layers=2)
    kinds = layer_kinds(older, FAMILIES["modernbert"])
    assert [kind.theta for kind in kinds[:3]] == [1e5, 5e3, 1e5]


@pytest.mark.parametrize("change", ["written in place", "replaced"])
def test_angles_that_change_are_seen(change):
    fast, original = twins("nomic_bert")
    inputs = given(original, "Model", "right")
    before = fast(**inputs).last_hidden_state
    for model in (fast, original):
        if change == "replaced":
            model.rotary_emb.inv_freq = model.rotary_emb.inv_freq * 0.5
        else:
            model.rotary_emb.inv_freq.mul_(0.5)
    a, b = (real(m(**inputs).last_hidden_state, inputs, "Model") for m in (fast, original))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.equal(a, real(before, inputs, "Model"))


def test_bf16_keeps_the_angles_of_long_texts():
    """By `accelerate(dtype=...)`, whose model stays close to its own numbers in fp32 at positions far from 0."""
    original = make("nomic_bert", max_position_embeddings=4000)
    fast = fastbert.accelerate(make("nomic_bert", max_position_embeddings=4000), dtype=torch.bfloat16)
    assert (
        fast.rotary_emb.inv_freq.dtype == torch.float32
        and fast.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    )
    ids = torch.randint(5, 120, (1, 60), generator=torch.Generator().manual_seed(0))
    far = torch.arange(60)[None] * 60
    with torch.no_grad():
        a, b = (m(ids, position_ids=far).last_hidden_state.float() for m in (fast, original))
    assert (a - b).norm() < 0.05 * b.norm()
    assert not fallbacks(fast)


@pytest.mark.parametrize("name", ["modernbert", "nomic_bert", "eurobert"])
def test_long_texts(name):
    """Past where a window's parts are cut, and past the sizes that other tests have."""
    sizes = {"max_position_embeddings": 3000, "local_attention": 64} if name == "modernbert" else {}
    fast, original = twins(name, **{"max_position_embeddings": 3000, **sizes})
    ids = torch.randint(5, 120, (2, 2200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 1500:] = 0
    ids = ids.masked_fill(mask == 0, original.config.pad_token_id)
    with torch.no_grad():
        a, b = (m(ids, attention_mask=mask).last_hidden_state[mask == 1] for m in (fast, original))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert not fallbacks(fast)


def test_a_window_is_that_of_the_live_module():
    """A module whose window is not its config's keeps transformers' code."""
    fast, _ = twins("modernbert")
    fast.layers[1].attn.sliding_window = 9
    fast(torch.tensor([[5, 6, 7]]))
    assert "layers.1.attn.sliding_window is 9" in str(fallbacks(fast))


def test_the_older_names_of_nomic_bert():
    """Those of the files before transformers had the family; the newer ones count where both are."""
    older = {"n_embd": 96, "n_head": 6, "n_inner": 200, "n_layer": 3, "layer_norm_epsilon": 1e-5, "n_positions": 8192}
    found = config("nomic_bert", **older, rotary_emb_base=500, max_position_embeddings=2048)
    sizes = found.hidden_size, found.num_attention_heads, found.intermediate_size, found.num_hidden_layers
    assert sizes == (96, 6, 200, 3) and found.layer_norm_eps == 1e-5 and found.max_length == 8192
    assert layer_kinds(found, FAMILIES["nomic_bert"])[0].theta == 500
    assert config("nomic_bert", n_layer=3, num_hidden_layers=2).num_hidden_layers == 2
    again = BertConfig.from_dict(found.to_dict())
    assert again == found


def test_of_two_names_that_of_the_family_counts():
    for values in ({"norm_eps": 1e-3, "layer_norm_eps": 1e-6}, {"layer_norm_eps": 1e-6, "norm_eps": 1e-3}):
        assert config("modernbert", **values).layer_norm_eps == 1e-3


def test_positions_beyond_those_of_the_file(tmp_path):
    """NomicBERT's n_positions: live and own models compute them, as transformers does."""
    fast, original = twins("nomic_bert", n_positions=100)  # max_position_embeddings is 40
    ids = torch.randint(5, 100, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(ids).last_hidden_state
        torch.testing.assert_close(fast(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        assert not fallbacks(fast)
    original.save_pretrained(tmp_path)
    own = fastbert.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(own(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input_ids has a sequence of 101 tokens; max_position_embeddings is 100"):
        own(torch.full((1, 101), 7))


@pytest.mark.parametrize("grad", [False, True])
def test_a_row_of_roberta_may_be_longer_by_its_pads(grad, tmp_path):
    make("roberta").save_pretrained(tmp_path)
    model = fastbert.AutoModel.from_pretrained(tmp_path)
    room = model.config.max_length
    ids = torch.full((2, room + 6), model.config.pad_token_id)
    ids[:, :room] = 7
    mask = (ids == 7).long()
    with torch.set_grad_enabled(grad):
        states = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(states[:, :room], model(ids[:, :room]).last_hidden_state, rtol=1e-5, atol=1e-5)
        ids[0, room] = 7
        with pytest.raises(ValueError, match=f"a sequence of {room + 1} tokens; max_position_embeddings is"):
            model(ids, attention_mask=(ids == 7).long())
