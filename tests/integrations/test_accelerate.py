"""fastbert.accelerate on live transformers models: same numbers, same parameters, and back again."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import transformers
from support import MASKS, TINY, mask_of, tokens

import fastbert
from fastbert.model import encoder

HEADS = [n for n in fastbert.__all__ if n.startswith("BertFor")] + ["BertModel"]


def make(name="BertModel", **changes):
    model = getattr(transformers, name)(transformers.BertConfig(**{**TINY, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def twins(name="BertModel", **changes):
    """The same model twice: one accelerated, one not."""
    original = make(name, **changes)
    return fastbert.accelerate(copy.deepcopy(original)), original


def padded(mask):
    """Tokens, with the pad where the mask leaves one out."""
    return tokens() if mask is None else tokens().masked_fill(mask == 0, 0)


def batch(name, mask):
    ids = padded(mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "BertForMultipleChoice":
        inputs = {k: None if v is None else v[None] for k, v in inputs.items()}
    return inputs


@pytest.mark.parametrize("kind", [k for k in MASKS if k != "zeros"])
@pytest.mark.parametrize("name", HEADS)
def test_same_numbers_and_class(name, kind):
    fast, original = twins(name)
    mask = mask_of(kind)
    a, b = (model(**batch(name, mask)) for model in (fast, original))
    assert type(a) is type(b) and list(a) == list(b) and type(fast) is type(original)
    real = torch.ones(3, 8, dtype=torch.bool) if mask is None else mask.bool()
    for field in a:
        x, y = a[field], b[field]
        if x.shape[:2] == real.shape:
            x, y = x[real], y[real]
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda m, f=field: f"{f}: {m}")


def test_it_is_packed(monkeypatch):
    """No layer sees a pad: 12 real tokens of 24."""
    fast, _ = twins()
    seen, feed_forward = [], encoder.ops.feed_forward
    monkeypatch.setattr(
        encoder.ops, "feed_forward", lambda x, *args, **kw: seen.append(x.shape) or feed_forward(x, *args, **kw)
    )
    mask = mask_of("right")
    fast(padded(mask), attention_mask=mask)
    assert seen == [(12, 48)] * 3


def test_parameters_stay_the_same_objects():
    model = make("BertForSequenceClassification")
    before, names = list(model.parameters()), list(model.state_dict())
    values = [p.detach().clone() for p in before]
    fastbert.accelerate(model)
    with torch.no_grad():
        model(tokens())
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


def test_restore_undoes_it():
    fast, original = twins("BertForQuestionAnswering")
    assert "forward" in fast.bert.__dict__ and "forward" in fast.__dict__
    assert fastbert.restore(fast) is fast
    assert not any("forward" in m.__dict__ for m in fast.modules())
    assert not any("_replicate_for_data_parallel" in m.__dict__ for m in fast.modules())
    mask = mask_of("right")
    a, b = fast(tokens(), attention_mask=mask), original(tokens(), attention_mask=mask)
    assert all(torch.equal(a[f], b[f]) for f in a)
    fastbert.restore(original)  # never accelerated: nothing to undo


def test_twice_is_once():
    fast, _ = twins()
    forward = fast.forward
    assert fastbert.accelerate(fast).forward is forward
    assert not isinstance(fastbert.restore(fast).__dict__.get("forward"), type(forward))


def test_training_step_equals_the_original():
    fast, original = twins("BertForSequenceClassification")
    mask, labels = mask_of("right"), torch.tensor([0, 1, 1])
    for model in (fast, original):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.train()
        for _ in range(3):
            model(tokens(), attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # An update is lr * sign for a gradient of any size, so noise in a zero gradient must not be compared.
    for (name, a), b in zip(fast.named_parameters(), original.parameters(), strict=True):
        if "key.bias" not in name:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"attention_mask": torch.ones(3, 1, 8, 8, dtype=torch.bool)}, "attention_mask is 4-D"),
        ({"output_hidden_states": [1]}, "output_hidden_states selects layers"),
        ({"is_causal": True}, "is_causal is given"),
    ],
)
def test_what_it_cannot_pack_runs_the_original(call, reason):
    fast, original = twins()
    a, b = fast(tokens(), **call), original(tokens(), **call)
    assert torch.equal(a[0], b[0])
    assert f"1 calls ran the original code: {reason}" in str(fastbert.explain(fast))
    fast(tokens())
    assert str(fastbert.explain(fast)).count("calls ran the original") == 1


def test_output_states_and_attentions_as_eager():
    fast, original = twins()
    original.set_attn_implementation("eager")
    mask, wanted = mask_of("holes"), {"output_hidden_states": True, "output_attentions": True}
    mask[:, 0] = 1  # else the pooler's token is a pad, and transformers' own code runs
    a, b = fast(tokens(), attention_mask=mask, **wanted), original(tokens(), attention_mask=mask, **wanted)
    real = mask.bool()
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-5, atol=1e-5)
    for x, y in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)


def test_recording_hooks_of_transformers_do_not_count_as_hooks():
    """The original code leaves its recorders behind once it has run with output_hidden_states."""
    fast, _ = twins()
    fastbert.restore(fast)
    fast(tokens(), output_hidden_states=True)
    fastbert.accelerate(fast)
    fast(tokens())
    assert "original code:" not in str(fastbert.explain(fast))


def test_a_hook_on_a_layer_keeps_the_original_code():
    fast, original = twins()
    fast.encoder.layer[1].register_forward_hook(lambda m, args, out: out * 2)
    original.encoder.layer[1].register_forward_hook(lambda m, args, out: out * 2)
    assert torch.equal(fast(tokens())[0], original(tokens())[0])
    assert "encoder.layer.1 has a hook" in str(fastbert.explain(fast))


def test_decoder_is_left_alone_and_generates():
    config = transformers.BertConfig(**TINY, is_decoder=True)
    model = transformers.BertLMHeadModel(config).eval()
    expected = model.generate(tokens(1, 4), max_new_tokens=5, do_sample=False, pad_token_id=0)
    with pytest.warns(UserWarning, match="left the model as it was: it is a decoder"):
        fastbert.accelerate(model)
    assert torch.equal(model.generate(tokens(1, 4), max_new_tokens=5, do_sample=False, pad_token_id=0), expected)
    assert "the original code: it is a decoder" in str(fastbert.explain(model))


def test_nothing_to_accelerate():
    with pytest.raises(ValueError, match=r"without an encoder of transformers that is known \(BertModel"):
        fastbert.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be a torch module or a pipeline"):
        fastbert.accelerate("bert-base-uncased")


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Mine(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.warns(UserWarning, match="class Mine has a forward of its own"):
        fastbert.accelerate(Mine(transformers.BertConfig(**TINY)))


def test_copies_and_pickles():
    fast, _ = twins("BertForMaskedLM")
    mask = mask_of("right")
    expected = fast(tokens(), attention_mask=mask).logits
    copied = copy.deepcopy(fast)
    assert copied.bert.forward.module is copied.bert
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copied, torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(tokens(), attention_mask=mask).logits, expected)
    with torch.no_grad():
        copied.bert.embeddings.word_embeddings.weight.zero_()
    assert torch.equal(fast(tokens(), attention_mask=mask).logits, expected)


def test_signature_is_the_original(tmp_path):
    for name in ("BertModel", "BertForQuestionAnswering"):
        fast, original = twins(name)
        assert inspect.signature(fast.forward) == inspect.signature(original.forward)
    fast.save_pretrained(tmp_path)
    assert transformers.BertForQuestionAnswering.from_pretrained(tmp_path).config.hidden_size == 48


def test_question_answering_meets_no_pad():
    fast, original = twins("BertForQuestionAnswering")
    mask = mask_of("right")
    where = {"start_positions": torch.tensor([2, 0, 0]), "end_positions": torch.tensor([3, 1, 9])}
    out = fast(padded(mask), attention_mask=mask, **where)
    lowest = torch.finfo(torch.float32).min
    expected = 0
    plain = original(padded(mask), attention_mask=mask)
    for logits, target in zip(plain[:2], where.values(), strict=True):
        masked = logits.masked_fill(mask == 0, lowest)
        expected = expected + torch.nn.functional.cross_entropy(masked, target.clamp(0, 8), ignore_index=8) / 2
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(fast(tokens(), attention_mask=mask, return_dict=False, **where), tuple)
    assert list(out) == ["loss", "start_logits", "end_logits"]


def test_gradient_checkpointing_of_transformers():
    fast, original = twins("BertForSequenceClassification")
    gradients = []
    for model in (fast, original):
        model.train().gradient_checkpointing_enable()
        model(tokens(), attention_mask=mask_of("right"), labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append(model.bert.encoder.layer[0].intermediate.dense.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"], ["word_embeddings"]])
def test_lora(targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, lora_dropout=0.0)
    torch.manual_seed(1)
    original = peft.get_peft_model(make("BertForSequenceClassification"), config)
    fast = fastbert.accelerate(copy.deepcopy(original))
    mask, labels = mask_of("right"), torch.tensor([0, 1, 1])
    for model in (fast, original):
        model(input_ids=tokens(), attention_mask=mask, labels=labels).loss.backward()
    trained = 0
    for (name, a), b in zip(fast.named_parameters(), original.parameters(), strict=True):
        if b.grad is not None:
            trained += 1
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert trained >= 2
    # Merged in place, the weights have other values in the same objects: nothing may be stale.
    with torch.no_grad():
        fast(input_ids=tokens())
        fast.merge_adapter(), original.merge_adapter()
        a, b = (m(input_ids=tokens(), attention_mask=mask).logits for m in (fast, original))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast():
    fast, original = twins("BertForSequenceClassification")
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (m(tokens(), attention_mask=mask_of("right")).logits for m in (fast, original))
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_trainer_step_gives_the_same_weights(tmp_path):
    """One step of SGD by transformers' Trainer, dropout 0: weights within 1e-6."""
    rows = [{"input_ids": list(range(1, 2 + n)), "labels": n % 2} for n in (3, 9, 5, 2, 7, 20)]
    tokenizer = transformers.BertTokenizer(
        vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, model_max_length=40
    )
    fast, original = twins("BertForSequenceClassification")
    start = original.classifier.weight.detach().clone()
    for model in (fast, original):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=6,
            learning_rate=0.01,
            optim="sgd",
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=3,
        )
        transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        ).train()
    assert not torch.allclose(original.classifier.weight, start, atol=1e-5)
    for (name, a), b in zip(fast.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert "calls ran" not in str(fastbert.explain(fast))


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = make()
    with torch.no_grad():
        expected = model(tokens())[0]
    fast = fastbert.accelerate(model)

    def run(_):
        with torch.no_grad():
            return fast(tokens())[0]

    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(run, range(64)):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_inside_a_pipeline(minilm):
    """feature-extraction on real weights: the vectors of real tokens, in batches with pads."""
    texts = ["A man is playing a guitar.", "Ok", "The stock market fell sharply on Monday, and then it rose again."]
    pipeline = transformers.pipeline("feature-extraction", model=str(minilm), device="cpu")
    expected = [torch.tensor(vectors[0]) for vectors in pipeline(texts)]
    assert fastbert.accelerate(pipeline) is pipeline
    for batch_size in (1, 3):
        for vectors, wanted in zip(pipeline(texts, batch_size=batch_size), expected, strict=True):
            torch.testing.assert_close(torch.tensor(vectors[0])[: len(wanted)], wanted, rtol=1e-5, atol=1e-5)
    assert "packed, by fastbert" in str(fastbert.explain(pipeline))
    assert "calls ran" not in str(fastbert.explain(pipeline))


def test_inference_mode_leaves_the_model_trainable():
    fast, original = twins("BertForSequenceClassification")
    with torch.inference_mode():
        fast(tokens())
    for model in (fast, original):
        model(tokens(), labels=torch.tensor([0, 1, 1])).loss.backward()
    for (name, a), b in zip(fast.named_parameters(), original.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if "key.bias" not in name and a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def become(module, name, value):
    delattr(module, name)
    setattr(module, name, value)


def another_pooler(pooler):
    pooler = copy.deepcopy(pooler)
    become(pooler, "activation", torch.nn.Identity())
    return pooler


def with_scaling(layer, scaling):
    layer.attention.self.scaling = scaling
    return layer


class Halved(transformers.models.bert.modeling_bert.BertLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 2


REPLACED = {
    "activation": lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", torch.nn.ReLU()),
    "pooler activation": lambda m: setattr(m.pooler, "activation", torch.nn.Identity()),
    "dropout": lambda m: setattr(m.encoder.layer[0].output, "dropout", torch.nn.Identity()),
    "hook on a dropout": lambda m: m.embeddings.dropout.register_forward_hook(lambda mod, args, out: out * 2),
    "scaling": lambda m: setattr(m.encoder.layer[2].attention.self, "scaling", 1.0),
    "embedding norm": lambda m: setattr(m.embeddings, "LayerNorm", torch.nn.Identity()),
    "norm without bias": lambda m: setattr(m.embeddings, "LayerNorm", torch.nn.LayerNorm(48, bias=False)),
    "layer norm without bias": lambda m: setattr(
        m.encoder.layer[0].output, "LayerNorm", torch.nn.LayerNorm(48, bias=False)
    ),
    "key without bias": lambda m: setattr(m.encoder.layer[0].attention.self.key, "bias", None),
    "query without bias": lambda m: setattr(m.encoder.layer[0].attention.self.query, "bias", None),
    "one weight for query and key": lambda m: setattr(
        m.encoder.layer[0].attention.self.query, "weight", m.encoder.layer[0].attention.self.key.weight
    ),
    "two epsilons": lambda m: setattr(m.encoder.layer[0].output.LayerNorm, "eps", 0.5),
    "word table with a hook": lambda m: m.embeddings.word_embeddings.register_forward_hook(lambda mod, a, out: out * 2),
    "positions with a norm": lambda m: setattr(m.embeddings.position_embeddings, "max_norm", 0.1),
    "another layer list": lambda m: setattr(m.encoder, "layer", torch.nn.ModuleList(m.encoder.layer[:2])),
    "a layer more": lambda m: m.encoder.layer.append(with_scaling(copy.deepcopy(m.encoder.layer[0]), 1.0)),
    "no pooler": lambda m: setattr(m, "pooler", None),
    "another pooler": lambda m: setattr(m, "pooler", another_pooler(m.pooler)),
    "embedding norm without a bias": lambda m: m.embeddings.LayerNorm.register_parameter("bias", None),
    "embedding norm without a weight": lambda m: m.embeddings.LayerNorm.register_parameter("weight", None),
    "a function for an activation": lambda m: become(
        m.encoder.layer[1].intermediate, "intermediate_act_fn", torch.relu
    ),
    "a function for the pooler's": lambda m: become(m.pooler, "activation", torch.sin),
    "a scaling in a tensor": lambda m: setattr(m.encoder.layer[0].attention.self, "scaling", torch.tensor(1.0)),
    "a hook on a pooler": lambda m: m.pooler.register_forward_hook(lambda mod, args, out: out * 2),
    "a layer in another class": lambda m: setattr(m.encoder.layer[1], "__class__", Halved),
    "another activation's name": lambda m: setattr(m.config, "hidden_act", "relu"),
    "a forward of its own": lambda m: setattr(m.encoder.layer[1].output.dense, "forward", lambda x: x[..., :48] * 2),
}


@pytest.mark.parametrize("when", ["before", "after", "between calls"])
@pytest.mark.parametrize("change", REPLACED)
def test_replaced_parts_count(change, when):
    """Whatever was done to the model: the numbers are those of the original code."""
    original = make()
    if when == "before":
        REPLACED[change](original)
    fast = copy.deepcopy(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are left alone from the start
        fastbert.accelerate(fast)
    if when == "between calls":
        with torch.no_grad():
            fast(tokens())
        assert not fast.forward.declined
    if when != "before":
        for model in (original, fast):
            REPLACED[change](model)
    mask = mask_of("right")
    with torch.no_grad():
        a, b = fast(tokens(), attention_mask=mask), original(tokens(), attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(a[0][real], b[0][real], rtol=1e-4, atol=1e-5)
    assert (a.pooler_output is None) == (b.pooler_output is None)
    if b.pooler_output is not None:
        torch.testing.assert_close(a.pooler_output, b.pooler_output, rtol=1e-4, atol=1e-5)


def test_restore_reaches_through_wrappers():
    """HF Accelerate keeps our forward inside its own; a restored model must still run the original code."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one a process, and Trainer has made one
    for name in ("BertModel", "BertForQuestionAnswering"):
        fast, original = twins(name)
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(fast)
        assert "packed, by fastbert" in str(fastbert.explain(prepared))
        fastbert.restore(prepared)
        assert "accelerate was not called" in str(fastbert.explain(prepared))
        mask = mask_of("right")
        with torch.autocast("cpu", torch.bfloat16):
            expected = original(tokens(), attention_mask=mask)[0]
        torch.testing.assert_close(prepared(tokens(), attention_mask=mask)[0], expected.float(), rtol=1e-6, atol=1e-6)


def test_replicas_run_on_their_own_parameters():
    """What torch's DataParallel does for each GPU."""
    fast, _ = twins()
    replica = fast._replicate_for_data_parallel()
    assert replica.forward.module is replica and fast.forward.module is fast


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"])
def test_labels_at_pads_are_not_read(name):
    fast, original = twins(name)
    mask = mask_of("right")
    labels = tokens() if "Token" not in name else tokens() % 2
    extra = {"next_sentence_label": torch.tensor([0, 1, 1])} if "Pre" in name else {}
    a = fast(padded(mask), attention_mask=mask, labels=labels, **extra).loss
    b = original(padded(mask), attention_mask=mask, labels=labels.masked_fill(mask == 0, -100), **extra).loss
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_transformers_broadcasts():
    fast, original = twins()
    types, positions = torch.ones(1, 8, dtype=torch.long), torch.arange(8) + 3
    for call in ({"token_type_ids": types}, {"position_ids": positions[None]}):
        torch.testing.assert_close(fast(tokens(), **call)[0], original(tokens(), **call)[0], rtol=1e-5, atol=1e-5)


def test_config_asks_for_states_and_attentions():
    fast, original = twins()
    for model in (fast, original):
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
    a, b = fast(tokens()), original(tokens())
    assert list(a) == list(b) and len(a.to_tuple()) == len(b.to_tuple())


def test_config_asks_for_some_states():
    pytest.importorskip("transformers", minversion="5.23")  # 5.17 knows all or none
    fast, original = twins()
    for model in (fast, original):
        model.config.output_hidden_states = [1]
    a, b = fast(tokens()).hidden_states, original(tokens()).hidden_states
    assert [x is None for x in a] == [x is None for x in b]


def test_a_trace_holds_the_original_code():
    fast, original = twins()
    with torch.no_grad():
        traced = torch.jit.trace(fast, (tokens(), torch.ones(3, 8, dtype=torch.long)), strict=False)
        mask = mask_of("right")
        torch.testing.assert_close(
            traced(tokens(), mask)["last_hidden_state"],
            original(tokens(), attention_mask=mask)[0],
            rtol=1e-4,
            atol=1e-4,
        )


def test_explain_sees_a_hook_before_the_call_does():
    fast, _ = twins()
    fast.encoder.layer[0].register_forward_hook(lambda m, args, out: out)
    assert "original code: encoder.layer.0 has a hook" in str(fastbert.explain(fast))
    with pytest.raises(ValueError, match="nothing to explain"):
        fastbert.explain(torch.nn.Linear(2, 2))
    nested = torch.nn.Sequential(fastbert.BertModel(fastbert.BertConfig(**TINY)))
    assert "attention" in str(fastbert.explain(nested))
