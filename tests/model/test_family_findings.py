"""What a plan of a family depends on in addition to its weights, and the corners where families differ."""

import pytest
import torch
from test_families_live import CONFIGS, FAMILIES, fallbacks, given, make, real, twins

import fastbert
from fastbert import ops
from fastbert.config import BertConfig
from fastbert.inference.graph_calls import read_call
from fastbert.training.distill.student import make_student

HOLES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1, 1], [1] * 8])


def same(fast, original, **arguments):
    inputs = {**given(original, "Model", "right"), **arguments}
    with torch.no_grad():
        a, b = (real(m(**inputs).last_hidden_state, inputs, "Model") for m in (fast, original))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


CHANGES = {
    "window": ("modernbert", lambda m: setattr(m.config, "local_attention", 2)),
    "kind of a layer": ("modernbert", lambda m: setattr(m.layers[1], "attention_type", "full_attention")),
    "number of layers": ("eurobert", lambda m: setattr(m.config, "num_hidden_layers", 2)),
    "scale of the angles": ("nomic_bert", lambda m: setattr(m.rotary_emb, "attention_scaling", 1.3)),
    "scale of a kind": ("modernbert", lambda m: setattr(m.rotary_emb, "full_attention_attention_scaling", 1.5)),
    "angles by .data": ("nomic_bert", lambda m: m.rotary_emb.inv_freq.data.mul_(0.5)),
    "eps of the last norm": ("modernbert", lambda m: setattr(m.final_norm, "eps", 5.0)),
    "eps of the last RMSNorm": ("eurobert", lambda m: setattr(m.norm, "variance_epsilon", 5.0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "between calls"])
def test_what_a_call_reads_is_seen(change, when):
    name, run = CHANGES[change]
    fast, original = twins(name)
    if when == "between calls":
        same(fast, original)
    for model in (fast, original):
        run(model)
    for _ in range(2):
        same(fast, original)


def test_more_positions_than_before(tmp_path):
    for name in ("modernbert", "nomic_bert", "eurobert"):
        fast, original = twins(name, max_position_embeddings=8)
        original.save_pretrained(tmp_path / name)
        own = fastbert.AutoModel.from_pretrained(tmp_path / name)
        ids = torch.randint(5, 120, (2, 60), generator=torch.Generator().manual_seed(2))
        for model in (fast, own):
            with torch.no_grad():
                model(ids[:, :8])
                model.config.max_position_embeddings = 64
                states = model(ids).last_hidden_state
                torch.testing.assert_close(states, original(ids).last_hidden_state, rtol=1e-5, atol=2e-5)


def test_a_replaced_forward_of_a_norms_class(monkeypatch):
    fast, original = twins("eurobert")
    same(fast, original)
    kind = type(original.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x: x * 0.5)
    fast2, original2 = fast, original
    with torch.no_grad():
        inputs = given(original2, "Model", "right")
        torch.testing.assert_close(fast2(**inputs).last_hidden_state, original2(**inputs).last_hidden_state)


def test_another_module_in_place_of_an_own_norm(tmp_path):
    class HalfRMSNorm(torch.nn.Module):
        def forward(self, x):
            return x * 0

    make("eurobert").save_pretrained(tmp_path)
    own = fastbert.AutoModel.from_pretrained(tmp_path)
    own.norm = HalfRMSNorm()
    with torch.no_grad():
        assert not own(torch.tensor([[5, 6, 7]])).last_hidden_state.any()


@pytest.mark.parametrize("name", ["eurobert", "nomic_bert"])  # transformers refuses a ModernBERT without layers
@pytest.mark.parametrize("captured", [False, True])
def test_no_layers(name, captured):
    fast, original = twins(name, num_hidden_layers=0)
    inputs = given(original, "Model", "right")
    with torch.no_grad():
        a, b = (m(**inputs, output_hidden_states=captured).last_hidden_state for m in (fast, original))
    torch.testing.assert_close(real(a, inputs, "Model"), real(b, inputs, "Model"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mpnet", "modernbert"])
def test_masked_positions_between_tokens_are_pads_of_own_models(name, tmp_path):
    make(name, "ForTokenClassification").save_pretrained(tmp_path / "tokens")
    model = fastbert.AutoModelForTokenClassification.from_pretrained(tmp_path / "tokens")
    ids = torch.randint(5, 120, (3, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.ones_like(ids)
    outputs = [model(ids, attention_mask=HOLES, labels=x) for x in (labels, labels.masked_fill(HOLES == 0, -100))]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert not outputs[0].logits[HOLES == 0].any() and outputs[0].logits[HOLES == 1].all()
    make(name, "ForQuestionAnswering").save_pretrained(tmp_path / "answers")
    model = fastbert.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "answers")
    start = model(ids, attention_mask=HOLES).start_logits
    assert (start[HOLES == 0] == torch.finfo(start.dtype).min).all()


@pytest.mark.parametrize("name", ["mpnet", "modernbert", "bert", "nomic_bert"])
def test_no_cuda_graph_runs_a_mask_with_gaps_where_distances_count(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    model = fastbert.AutoModel.from_pretrained(tmp_path)
    ids = torch.randint(5, 120, (3, 8))
    found = read_call(model, ids, HOLES, None, None, None, None)
    distances = FAMILIES[name].knows_distances
    assert isinstance(found, str) == distances and (not distances or "depends on distances" in found)
    right = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [1] + [0] * 7])
    assert not isinstance(read_call(model, ids, right, None, None, None, None), str)


def test_given_positions_do_not_reach_past_the_bias(tmp_path):
    fast, original = twins("mpnet")
    ids = torch.randint(5, 120, (2, 60), generator=torch.Generator().manual_seed(2))
    positions = torch.full_like(ids, 7)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            a, b = (m(ids, position_ids=positions).last_hidden_state for m in (fast, original))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert "it has 60 tokens; max_position_embeddings is 40" in str(fallbacks(fast))
    original.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a sequence of 60 tokens; max_position_embeddings is 40"):
        fastbert.AutoModel.from_pretrained(tmp_path)(ids, position_ids=positions)


@pytest.mark.parametrize("name", [name for name in CONFIGS if FAMILIES[name.partition(" ")[0]].rotary])
def test_negative_positions_of_a_live_model(name):
    fast, original = twins(name)
    inputs = given(original, "Model", "left")
    positions = inputs["attention_mask"].cumsum(-1) - 1
    with torch.no_grad():
        a, b = (m(**inputs, position_ids=positions).last_hidden_state for m in (fast, original))
    torch.testing.assert_close(real(a, inputs, "Model"), real(b, inputs, "Model"), rtol=1e-5, atol=2e-5)


def test_a_field_that_no_code_of_a_family_reads(tmp_path):
    """mmBERT's config.json says position_embedding_type "sans_pos"."""
    fast, original = twins("modernbert", position_embedding_type="sans_pos")
    same(fast, original)
    assert not fallbacks(fast)
    original.save_pretrained(tmp_path)
    same(fastbert.AutoModel.from_pretrained(tmp_path), original)


def test_nomics_tables_may_be_untied(tmp_path):
    theirs = make("nomic_bert", "ForMaskedLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    own = fastbert.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert own.get_output_embeddings().weight is not own.get_input_embeddings().weight
    own.save_pretrained(tmp_path / "again")
    assert not type(theirs).from_pretrained(tmp_path / "again").config.tie_word_embeddings


def test_a_config_made_by_hand_has_its_familys_settings(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    config = BertConfig(model_type="eurobert", vocab_size=120, pad_token_id=0, **small)
    assert config.extra["classifier_pooling"] == "late"
    model = fastbert.AutoModelForSequenceClassification.of(config)(config).eval()
    model.save_pretrained(tmp_path)
    again = fastbert.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).logits, again(ids).logits)


def test_mpnets_positions_begin_after_1_whatever_the_pad(tmp_path):
    theirs = make("mpnet", pad_token_id=0)
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    a, b = (m(ids).last_hidden_state for m in (fastbert.AutoModel.from_pretrained(tmp_path), theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "it must be an object by 'full_attention' and 'sliding_attention'"),
        ({"full_attention": {}, "sliding": {"rope_type": "yarn"}}, "it must be an object by 'full_attention'"),
    ],
)
def test_angles_of_modernbert_that_name_no_kind(rope, reason):
    with pytest.raises(ValueError, match=reason):
        BertConfig.from_dict({"model_type": "modernbert", "rope_parameters": rope})


def test_a_students_layers(tmp_path):
    make("modernbert", "ForMaskedLM", num_hidden_layers=4, embedding_dropout=0.2).save_pretrained(tmp_path)
    teacher = fastbert.AutoModelForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers are \[2, 0\]; layer 0 of the teacher has no norm"):
        make_student(teacher, layers=[2, 0])
    student = make_student(teacher, layers=[0, 3], dropout=0.0)
    assert student.base_model.embeddings.drop.p == 0.0
    kinds = teacher.config.extra["layer_types"]
    assert student.config.extra["layer_types"] == [kinds[0], kinds[3]]
    narrow = make_student(teacher, layers=[0, 1], hidden_size=16)
    wide, slim = (m.base_model.layers[1].attn.Wqkv.weight.unflatten(0, (3, -1)) for m in (teacher, narrow))
    assert torch.equal(slim, wide[:, :16, :16])


def test_the_ops_check_what_the_kernels_would_read_past():
    from test_encoder_arrangements import ARRANGEMENTS, arranged

    weights = arranged(64, 128, 4, torch.float32, **ARRANGEMENTS["jina"])
    x, cu_seqlens = torch.randn(8, 64), torch.tensor([0, 8]).int()
    with pytest.raises(ValueError, match=r"positions is torch.int32 on cpu; it must be int64"):
        ops.encoder(x, weights, cu_seqlens, 8, positions=torch.arange(8, dtype=torch.int32))
    plain = arranged(64, 128, 4, torch.float32)
    with pytest.raises(ValueError, match="bias has 9 columns; max_seqlen is 8, so there must be at least 15"):
        ops.encoder(x, plain, cu_seqlens, 8, bias=torch.zeros(4, 9))


def test_fresh_weights_are_spread_as_transformers_draws_them():
    import transformers

    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {"vocab_size": 300, "pad_token_id": 0, "initializer_range": 0.1}
    special = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.ModernBertConfig(**sizes, **special)
    theirs = transformers.ModernBertForSequenceClassification(config)
    config = BertConfig.from_dict(config.to_dict())
    own = dict(fastbert.AutoModelForSequenceClassification.of(config)(config).named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 1000:
            assert 0.9 < own[name].std() / parameter.std() < 1.1, name
            assert own[name].abs().max() <= 1.2 * parameter.abs().max(), name


def test_norms_of_every_family_have_no_weight_decay(tmp_path):
    from fastbert.training.optimizer import decay_groups

    for name in (name for name in CONFIGS if " " not in name):
        make(name).save_pretrained(tmp_path / name)
        model = fastbert.AutoModel.from_pretrained(tmp_path / name)
        names = {id(p): n for n, p in model.named_parameters()}
        decayed = [names[id(p)] for p in decay_groups(model, 0.1)[0]["params"]]
        assert decayed and not [n for n in decayed if "norm" in n.lower() or n.endswith("bias")], name


@pytest.mark.parametrize("labels", [torch.zeros(5, 2).long(), torch.full((2, 5), 2)])
def test_labels_of_replaced_tokens_are_checked(labels, tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig.from_dict({"model_type": "electra", "vocab_size": 50, "embedding_size": 8, **sizes})
    model = fastbert.ElectraForPreTraining(config)
    with pytest.raises(ValueError, match=r"labels has shape \(5, 2\); it must be \(2, 5\)|labels holds 2"):
        model(torch.full((2, 5), 7), labels=labels)
