"""Every model against transformers: outputs at real tokens, losses, all gradients, for masks of every kind."""

import copy

import pytest
import torch
import transformers
from support import MASKS, TINY, mask_of, tokens

import fastbert

HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
]
# transformers lets pads into the question-answering loss: test_question_answering_ignores_pads has those.
COMPARABLE = [
    (name, kind)
    for name in HEADS
    for kind in MASKS
    if kind != "zeros" and (name != "BertForQuestionAnswering" or kind in ("absent", "ones"))
]
PER_TOKEN = {"last_hidden_state", "logits", "prediction_logits", "start_logits", "end_logits"}


def pair(name, tmp_path, **changes):
    """A random transformers model and the fastbert model that loads its checkpoint."""
    config = transformers.BertConfig(**{**TINY, "num_labels": 2, **changes}, attn_implementation="eager")
    theirs = getattr(transformers, name)(config)
    for parameter in theirs.parameters():  # biases and norms are trivial at birth
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    mine = getattr(fastbert, name).from_pretrained(tmp_path)
    return theirs.eval(), mine


def labels_of(name, mask, ids):
    """Labels for a batch of 3 (of 8 columns), -100 at every pad."""
    pads = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask == 0
    words = torch.randint(0, 120, ids.shape, generator=torch.Generator().manual_seed(2)).masked_fill(pads, -100)
    words[:, 1::3] = -100
    kinds = (words % 2).masked_fill(words < 0, -100)
    return {
        "BertModel": {},
        "BertForPreTraining": {"labels": words, "next_sentence_label": torch.tensor([0, 1, 1])},
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": torch.tensor([1, 0, 1])},
        "BertForSequenceClassification": {"labels": torch.tensor([1, 0, 1])},
        "BertForTokenClassification": {"labels": kinds},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([2, 0, 9]),
            "end_positions": torch.tensor([3, 1, 7]),
        },
        "BertForMultipleChoice": {"labels": torch.tensor([1])},
    }[name]


def call(model, name, mask, labels):
    ids, types = tokens(), tokens(vocab=3) - 1
    if name == "BertForMultipleChoice":
        ids, types = ids[None], types[None]
        mask = None if mask is None else mask[None]
    return model(ids, attention_mask=mask, token_type_ids=types, **labels)


def pool_first_real_token(model, mask):
    """fastbert pools a row's first real token; transformers pools column 0, a pad where a row begins with one."""
    pooler = getattr(model, "bert", model).pooler
    if pooler is not None and mask is not None:
        rows, first = torch.arange(len(mask)), mask.argmax(1)
        pooler.forward = lambda states: torch.tanh(pooler.dense(states[rows, first]))


def assert_same_outputs(mine, theirs, mask, rows=slice(None), tolerance=1e-5):
    fields = [f for f in theirs if f not in ("hidden_states", "attentions", "cross_attentions")]
    assert [f for f in mine if f not in ("hidden_states", "attentions")] == fields
    real = torch.ones(3, 8, dtype=torch.bool) if mask is None else mask.bool()
    for field in fields:
        a, b = mine[field], theirs[field]
        assert a.shape == b.shape, field
        if field in PER_TOKEN and a.shape[:2] == real.shape:
            if "start" not in field and "end" not in field:
                assert (a[~real] == 0).all(), f"{field} is not zero at pads"
            a, b = a[real], b[real]
        elif a.dim() and len(a) == 3:
            a, b = a[rows], b[rows]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "kind"), COMPARABLE)
def test_forward_and_backward(name, kind, dtype, tmp_path):
    theirs, mine = (model.to(dtype) for model in pair(name, tmp_path))
    mask = mask_of(kind)
    pool_first_real_token(theirs, mask)
    labels = labels_of(name, mask, tokens())
    a, b = call(mine, name, mask, labels), call(theirs, name, mask, labels)
    assert_same_outputs(a, b, mask, tolerance=1e-5 if dtype == torch.float32 else 1e-11)
    if name == "BertModel":
        real = torch.ones(3, 8) if mask is None else mask
        losses = [(o[0] * real[..., None]).pow(2).mean() + o[1].pow(3).mean() for o in (a, b)]
    else:
        losses = [a.loss, b.loss]
    for loss in losses:
        loss.backward()
    assert_same_gradients(mine, theirs, 1e-5 if dtype == torch.float32 else 1e-11)


def assert_same_gradients(mine, theirs, tolerance):
    """Relative to a gradient's largest element; some are 0 in truth, and rounding of terms of size 1 in fact: against
    fp64 either model errs by about 4 eps there, in directions of its own."""
    expected = dict(theirs.named_parameters())
    assert set(dict(mine.named_parameters())) == set(expected)
    for parameter_name, p in mine.named_parameters():
        q = expected[parameter_name]
        assert (p.grad is None) == (q.grad is None), parameter_name
        if p.grad is not None:
            limit = tolerance * q.grad.abs().max() + 8 * torch.finfo(q.dtype).eps
            error = (p.grad - q.grad).abs().max()
            assert error <= limit, (parameter_name, error, limit)


@pytest.mark.parametrize("name", HEADS)
def test_a_row_of_zeros_yields_zeros(name, tmp_path):
    _, mine = pair(name, tmp_path)
    mask = mask_of("zeros")
    out = call(mine, name, mask, labels_of(name, mask, tokens()))
    for field, value in out.items():
        assert value.isfinite().all(), field
    if name == "BertModel":
        assert (out.last_hidden_state[1] == 0).all() and (out.pooler_output[1] == 0).all()
    if "loss" in out:
        out.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mine.parameters())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(activation, tmp_path):
    theirs, mine = pair("BertForMaskedLM", tmp_path, hidden_act=activation)
    assert_same_outputs(mine(tokens()), theirs(tokens()), None)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1]]), "multi_label_classification"),
    ],
)
def test_problem_types(num_labels, labels, problem, tmp_path):
    theirs, mine = pair("BertForSequenceClassification", tmp_path, num_labels=num_labels)
    a, b = mine(tokens(), labels=labels), theirs(tokens(), labels=labels)
    assert mine.config.problem_type == problem
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)


def test_question_answering_ignores_pads(tmp_path):
    """transformers' loss over the logits of real tokens alone, and a row's loss does not depend on its padding."""
    theirs, mine = pair("BertForQuestionAnswering", tmp_path)
    mask, ids = mask_of("right"), tokens()
    where = {"start_positions": torch.tensor([2, 0, 0]), "end_positions": torch.tensor([3, 1, 0])}
    a, b = mine(ids, attention_mask=mask, **where), theirs(ids, attention_mask=mask)
    lowest = torch.finfo(torch.float32).min
    expected = 0
    for logits, got, target in zip(b[:2], a[1:3], where.values(), strict=True):
        masked = logits.masked_fill(mask == 0, lowest)
        torch.testing.assert_close(got, masked, rtol=1e-5, atol=1e-5)
        expected = expected + torch.nn.functional.cross_entropy(masked, target) / 2
    torch.testing.assert_close(a.loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(MASKS))
def test_hidden_states_and_attentions(kind, tmp_path):
    theirs, mine = pair("BertModel", tmp_path)
    mask, ids = mask_of(kind), tokens()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    a, b = mine(ids, attention_mask=mask, **wanted), theirs(ids, attention_mask=mask, **wanted)
    plain = mine(ids, attention_mask=mask)
    real = torch.ones(3, 8, dtype=torch.bool) if mask is None else mask.bool()
    assert len(a.hidden_states) == len(b.hidden_states) == 4 and len(a.attentions) == 3
    torch.testing.assert_close(a.last_hidden_state, plain.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.hidden_states[-1], a.last_hidden_state)
    for mine_, theirs_ in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(mine_[real], theirs_[real], rtol=1e-5, atol=1e-5)
        assert (mine_[~real] == 0).all()
    for mine_, theirs_ in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(mine_.transpose(1, 2)[real], theirs_.transpose(1, 2)[real], rtol=1e-5, atol=1e-6)
    only_states = mine(ids, attention_mask=mask, output_hidden_states=True)
    assert only_states.attentions is None
    torch.testing.assert_close(only_states.hidden_states, a.hidden_states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [h for h in HEADS if h != "BertForMultipleChoice"])
def test_packed_input_equals_right_padded(name, tmp_path):
    _, mine = pair(name, tmp_path)
    mask, ids, types = mask_of("right"), tokens(), tokens(vocab=3) - 1
    real = mask.bool()
    cu_seqlens = torch.tensor([0, 8, 11, 12], dtype=torch.int32)
    padded = mine(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    packed = mine(ids[real], token_type_ids=types[real], cu_seqlens=cu_seqlens, output_hidden_states=True)
    for field, value in padded.items():
        if field == "hidden_states":
            for a, b in zip(packed[field], value, strict=True):
                torch.testing.assert_close(a, b[real])
        else:
            torch.testing.assert_close(
                packed[field], value[real] if field in PER_TOKEN and value.shape[:2] == real.shape else value
            )


def test_a_text_alone_and_in_a_batch(tmp_path):
    mine = pair("BertModel", tmp_path)[1].double()  # test_real_models.py has it in fp32
    mask, ids = mask_of("right"), tokens()
    out = mine(ids, attention_mask=mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = mine(ids[row : row + 1, :length])
        for together, single in ((out[0][row, :length], alone[0][0]), (out[1][row], alone[1][0])):
            torch.testing.assert_close(together, single, rtol=1e-12, atol=1e-12)


def test_position_ids_and_inputs_embeds(tmp_path):
    theirs, mine = pair("BertModel", tmp_path)
    mask = mask_of("left")
    pool_first_real_token(theirs, mask)
    embeds = torch.randn(3, 8, 48, requires_grad=True)
    for positions in (torch.arange(20, 28)[None], torch.randint(0, 40, (3, 8))):
        a = mine(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        b = theirs(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        assert_same_outputs(a, b, mask)
        got, wanted = (torch.autograd.grad((o[0] * mask[..., None]).pow(2).sum(), embeds)[0] for o in (a, b))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_empty_batch(tmp_path):
    _, mine = pair("BertModel", tmp_path)
    for mask in (None, torch.ones(0, 8)):
        out = mine(torch.zeros(0, 8, dtype=torch.long), attention_mask=mask)
        assert out[0].shape == (0, 8, 48) and out[1].shape == (0, 48)


def test_without_pooler_and_as_a_tuple(tmp_path):
    theirs, _ = pair("BertModel", tmp_path)
    mine = fastbert.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    out = mine(tokens())
    assert out.pooler_output is None and list(out) == ["last_hidden_state"]
    assert len(out.to_tuple()) == 1 and torch.equal(out[0], out["last_hidden_state"])
    assert isinstance(mine(tokens(), return_dict=False), tuple)
    torch.testing.assert_close(out[0], theirs(tokens())[0], rtol=1e-5, atol=1e-5)


def test_decoder_is_tied_and_resized(tmp_path):
    theirs, mine = pair("BertForMaskedLM", tmp_path)
    assert mine.cls.predictions.decoder.weight is mine.bert.embeddings.word_embeddings.weight
    assert mine.cls.predictions.bias is mine.cls.predictions.decoder.bias
    old = mine.bert.embeddings.word_embeddings.weight.detach().clone()
    for count, rows in ((130, 130), (121, 128), (100, 100)):
        mine.resize_token_embeddings(count, pad_to_multiple_of=8 if rows == 128 else None)
        weight = mine.get_input_embeddings().weight
        assert weight.shape == (rows, 48) and mine.config.vocab_size == rows
        assert mine.cls.predictions.decoder.weight is weight
        assert mine.cls.predictions.bias.shape == (rows,)
        assert torch.equal(weight[:100], old[:100])
        if rows > 120:
            torch.testing.assert_close(weight[-1], old.mean(0), rtol=1e-4, atol=1e-4)
    out = mine(tokens(vocab=100))
    torch.testing.assert_close(out.logits, theirs(tokens(vocab=100)).logits[..., :100], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="new_num_tokens is 0"):
        mine.resize_token_embeddings(0)


def test_untied_decoder(tmp_path):
    theirs, mine = pair("BertForMaskedLM", tmp_path, tie_word_embeddings=False)
    assert mine.cls.predictions.decoder.weight is not mine.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(mine(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_loss_without_logits(name, tmp_path):
    _, mine = pair(name, tmp_path)
    mask = mask_of("right")
    labels = labels_of(name, mask, tokens())
    with_logits = mine(tokens(), attention_mask=mask, **labels)
    without = mine(tokens(), attention_mask=mask, output_logits=False, **labels)
    assert "logits" not in without and "prediction_logits" not in without
    torch.testing.assert_close(without.loss, with_logits.loss)
    for out in (with_logits, without):
        out.loss.backward()
        gradient = mine.get_input_embeddings().weight.grad.clone()
        mine.zero_grad()
        if out is with_logits:
            expected = gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(dropout, tmp_path):
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    _, mine = pair("BertForSequenceClassification", tmp_path, **changes)
    mine.train()
    gradients = []
    for enable in (False, True):
        if enable:
            mine.gradient_checkpointing_enable()
        torch.manual_seed(7)
        mine.zero_grad()
        mine(tokens(), attention_mask=mask_of("right"), labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append([p.grad.clone() for p in mine.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
    assert all(layer.gradient_checkpointing for layer in mine.bert.encoder.layer)
    mine.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in mine.bert.encoder.layer)


def test_checkpointing_recomputes(tmp_path, monkeypatch):
    from fastbert.model.layer import Layer

    _, mine = pair("BertModel", tmp_path)
    calls = []
    real = Layer.__call__
    monkeypatch.setattr(Layer, "__call__", lambda *a, **k: calls.append(1) or real(*a, **k))
    mine.train().gradient_checkpointing_enable()
    mine(tokens())[0].sum().backward()
    assert len(calls) == 6


def test_freezing(tmp_path):
    _, mine = pair("BertForSequenceClassification", tmp_path)
    for p in mine.bert.parameters():
        p.requires_grad_(False)
    mine(tokens(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is None for p in mine.bert.parameters())
    assert all(p.grad is not None for p in mine.classifier.parameters())


def test_dropout_stands_where_transformers_has_it(tmp_path, monkeypatch):
    """Each dropout of transformers, in order: its probability and the values that it meets, unpadded.

    The last layer's hidden ones meet the states that the head reads.
    """
    changes = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.125, "classifier_dropout": 0.5}
    theirs, mine = pair("BertForSequenceClassification", tmp_path, **changes)
    real_dropout, real_sdpa = torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention
    seen = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p:
            seen.append((p, x.numel()))
        return real_dropout(x, p, training, inplace)

    def sdpa(q, k, v, dropout_p=0.0, **kwargs):
        if dropout_p:
            seen.append((dropout_p, q.shape[0] * q.shape[1] * q.shape[2] ** 2))
        return real_sdpa(q, k, v, dropout_p=0.0, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    sequences = []
    for model in (mine.train(), theirs.train()):
        seen.clear()
        with fastbert.use_backend("reference"):  # which drops by torch's functions; where is up to the model
            model(tokens())
        sequences.append(list(seen))
    wide, (texts, width) = tokens().numel(), (len(tokens()), mine.config.hidden_size)
    found, expected = sequences
    assert len(found) == 1 + 3 * 3 + 1 and expected[-3:-1] == [(0.25, wide * width)] * 2
    assert found == [*expected[:-3], *[(0.25, texts * width)] * 2, expected[-1]]


def test_parameters_stay_where_they_are_and_changes_are_followed(tmp_path):
    """Inference multiplies once for queries, keys and values; a weight changed by whatever means counts at once."""
    _, mine = pair("BertModel", tmp_path)
    ids = tokens()
    parameters = list(mine.parameters())
    with torch.no_grad():
        addresses = [p.data_ptr() for p in parameters]
        mine(ids)
        assert addresses == [p.data_ptr() for p in parameters]
        attention = mine.encoder.layer[0].attention.self
        for change in (
            lambda: attention.key.weight.mul_(1.5),
            lambda: attention.key.weight.data.add_(0.3) is fastbert.refresh(mine),
            lambda: setattr(attention.query.weight, "data", torch.randn(48, 48)),
            lambda: attention.value.load_state_dict(torch.nn.Linear(48, 48).state_dict()),
            lambda: mine.to(torch.float64),
            lambda: mine.to(torch.float32),
        ):
            before = mine(ids)[0]
            change()
            fused, apart = mine(ids)[0], copy.deepcopy(mine).train()(ids)[0]
            assert not torch.equal(before, fused)
            torch.testing.assert_close(fused, apart)
    assert all(a is b for a, b in zip(parameters, mine.parameters(), strict=True))


def test_fusing_in_inference_mode_leaves_the_parameters_trainable(tmp_path):
    _, mine = pair("BertModel", tmp_path)
    with torch.inference_mode():
        expected = mine(tokens())[0]
    assert not any(p.is_inference() for p in mine.parameters())
    out = mine(tokens())[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.pow(2).mean().backward()
    torch.optim.SGD(mine.parameters(), lr=0.1).step()
    with torch.inference_mode():
        assert not torch.allclose(mine(tokens())[0], expected)


def test_fusing_between_forward_and_backward_is_harmless(tmp_path):
    theirs, mine = pair("BertModel", tmp_path)
    loss = mine(tokens())[0].pow(2).mean()
    with torch.no_grad():
        mine(tokens())
    loss.backward()
    theirs(tokens())[0].pow(2).mean().backward()
    for name in ("query", "key", "value"):
        p, q = (getattr(m.encoder.layer[0].attention.self, name).weight.grad for m in (mine, theirs))
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_wrapped_linear_is_called(tmp_path):
    _, mine = pair("BertModel", tmp_path)
    expected = mine(tokens())[0]
    calls = []
    mine.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *a: calls.append(1))
    mine.encoder.layer[2].attention.self.key.register_forward_hook(lambda m, i, o: o * 2)
    with torch.no_grad():
        out = mine(tokens())[0]
    assert calls == [1] and not torch.allclose(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles(dtype, tmp_path):
    _, mine = pair("BertModel", tmp_path)
    mine.to(dtype)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 0.05  # the compiled graph holds the reference
        torch.testing.assert_close(compiled(tokens())[0], mine(tokens())[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=["packed", "padded"])
def test_hooks_of_a_layer_fire(options):
    """In inference, where one op would run all layers, and in training with recomputation, once."""
    mine = fastbert.BertModel(fastbert.BertConfig(**TINY)).eval()
    with torch.no_grad():
        plain = mine(tokens(), **options).last_hidden_state
    calls = []
    mine.encoder.layer[1].register_forward_hook(lambda module, args, output: calls.append(module))
    with torch.no_grad():
        hooked = mine(tokens(), **options).last_hidden_state
    torch.testing.assert_close(hooked, plain, rtol=0, atol=1e-5)
    mine.train().gradient_checkpointing_enable()
    mine(tokens(), **options).last_hidden_state.sum().backward()
    assert calls == [mine.encoder.layer[1]] * 2


def test_sequences_of_length_zero(tmp_path):
    """Rows without a token: as many rows come out, of zeros."""
    _, mine = pair("BertModel", tmp_path)
    none = torch.zeros(0, dtype=torch.long)
    packed = mine(none, cu_seqlens=torch.tensor([0, 0, 0], dtype=torch.int32))
    padded = mine(torch.zeros(2, 0, dtype=torch.long))
    for out, shape in ((packed, (0, 48)), (padded, (2, 0, 48))):
        assert out.last_hidden_state.shape == shape
        assert out.pooler_output.shape == (2, 48) and (out.pooler_output == 0).all()


def test_outputs_can_be_made_anew(tmp_path):
    """As Accelerate and DataParallel do with what a model returns."""
    _, mine = pair("BertModel", tmp_path)
    out = mine(tokens())
    for again in (type(out)(dict(out)), type(out)((k, v) for k, v in out.items()), copy.copy(out)):
        assert list(again) == list(out) and again.pooler_output is out.pooler_output
    with pytest.raises(TypeError, match="has no field logits"):
        type(out)(logits=1)


def test_flat_buffers_are_not_taken_apart(tmp_path):
    """Parameters that are slices of another buffer (FSDP's, say) stay there."""
    _, mine = pair("BertModel", tmp_path)
    attention = mine.encoder.layer[0].attention.self
    buffer = torch.randn(48 * 48 * 3 + 7)
    for i, projection in enumerate((attention.value, attention.key, attention.query)):
        projection.weight.data = buffer[i * 48 * 48 : (i + 1) * 48 * 48].view(48, 48)
    with torch.no_grad():
        expected = mine(tokens())[0]
        assert attention.query.weight.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        buffer.mul_(1.5)
        assert not torch.allclose(mine(tokens())[0], expected)


def test_padding_row_gets_no_gradient(tmp_path):
    """Id 0 at real tokens: transformers' table gives its row no gradient, and so does ours."""
    theirs, mine = pair("BertModel", tmp_path)
    ids = tokens()
    ids[:, 2] = 0
    for model in (mine, theirs):
        model(ids)[0].pow(2).mean().backward()
    a, b = (m.embeddings.word_embeddings.weight.grad for m in (mine, theirs))
    assert (a[0] == 0).all()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_settings_are_passed_on(reentrant, tmp_path, monkeypatch):
    _, mine = pair("BertModel", tmp_path)
    mine.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert mine.encoder.layer[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant
    mine(tokens())[0].sum().backward()
    assert mine.encoder.layer[0].output.dense.weight.grad is not None


def test_resizing_keeps_what_is_frozen(tmp_path):
    _, mine = pair("BertForMaskedLM", tmp_path)
    mine.get_input_embeddings().weight.requires_grad_(False)
    assert not mine.resize_token_embeddings(125).weight.requires_grad


def test_a_model_loaded_in_inference_mode_can_be_trained(tmp_path):
    pair("BertModel", tmp_path)
    with torch.inference_mode():
        mine = fastbert.BertModel.from_pretrained(tmp_path)
    mine(tokens())[0].sum().backward()
    assert mine.encoder.layer[0].attention.self.query.weight.grad is not None
