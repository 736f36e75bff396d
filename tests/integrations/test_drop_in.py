"""What is done to live models, seen or survived: the accelerated twin and fastbert's own against transformers'."""

import copy
import functools
import gc
import pickle
import weakref
from types import FunctionType

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_model
from support import TINY, tokens
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, BertConfig, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert import modeling_bert

import fastbert

IDS = tokens()
# A layer of BERT-base, where a head is a twelfth of the columns.
WIDE = {**TINY, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "initializer_range": 0.05}


def original(**changes):
    torch.manual_seed(3)
    return BertModel(BertConfig(**{**TINY, **changes})).eval()


def twins(**changes):
    """transformers' model, and a copy that is accelerated."""
    model = original(**changes)
    return model, fastbert.accelerate(copy.deepcopy(model))


def own(model, tmp_path):
    """fastbert's model of the same weights."""
    model.save_pretrained(tmp_path)
    return fastbert.BertModel.from_pretrained(tmp_path).eval()


def check(model, fast, tolerance=2e-5, **arguments):
    with torch.no_grad():
        torch.testing.assert_close(
            fast(IDS, **arguments)[0], model(IDS, **arguments)[0], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype(dtype):
    """Of whatever memory the kernels ask for, some is fp32."""
    model, fast = twins()
    head = fastbert.BertForMaskedLM(fastbert.BertConfig(**TINY))
    gradients = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            fast.zero_grad(), head.zero_grad()
            for _ in range(3):
                fast(IDS).pooler_output.sum().backward()
                head(IDS, labels=IDS, output_logits=False).loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        gradients.append([p.grad.clone() for m in (fast, head) for p in m.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    check(model, fast)


def test_another_default_device():
    model, fast = twins(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3)
    mask, types = torch.ones_like(IDS), torch.zeros_like(IDS)
    mask[1, 3:] = 0
    torch.set_default_device("meta")
    try:
        fast.train()(IDS, attention_mask=mask).pooler_output.sum().backward()
        with torch.no_grad():
            got = fast.eval()(IDS, attention_mask=mask, token_type_ids=types)[0]
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got[mask > 0], model(IDS, attention_mask=mask)[0][mask > 0], rtol=2e-5, atol=2e-5)
    assert all(p.grad.device.type == "cpu" for p in fast.parameters() if p.grad is not None)


def without_a_head(model):
    model.encoder.layer[1].attention.output.dense.weight.data[:, 64:128] = 0


def without_some_units(model):
    model.encoder.layer[0].intermediate.dense.weight.data[100:300] = 0


def with_another_bias(model):
    model.encoder.layer[0].intermediate.dense.bias.detach().numpy()[256:512] += 1


@pytest.mark.parametrize("write", [without_a_head, without_some_units, with_another_bias])
def test_writes_that_torch_does_not_count(write):
    model, fast = twins(**WIDE)
    check(model, fast)
    for m in (model, fast):
        write(m)
    fastbert.refresh(fast)
    check(model, fast)


def test_an_alias_of_the_weights_stays_one():
    """An average of the weights, say, which writes to what it was given before the first call."""
    model, fast = twins()
    state = fast.state_dict()
    check(model, fast)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            state[name].mul_(0.5)
            value.mul_(0.5)
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())
    check(model, fast)
    del state
    check(model, fast)


@pytest.mark.parametrize("mine", [True, False], ids=["own", "accelerated"])
def test_what_saves_tied_weights_once_saves_all_three(mine, tmp_path):
    model, fast = twins()
    if mine:
        fast = own(model, tmp_path)
    for m in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        check(model, m)
        save_model(m, tmp_path / "saved.safetensors")  # raises where it can keep none
        accelerate.Accelerator(cpu=True).save_model(m, tmp_path / "by_accelerate")
        for path in (tmp_path / "saved.safetensors", tmp_path / "by_accelerate" / "model.safetensors"):
            saved = load_file(path)
            assert saved.keys() == model.state_dict().keys()
            assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        check(model, m)


def test_weights_with_adapters_around_them_are_all_saved(tmp_path):
    model, fast = twins()
    check(model, fast)
    for layer in fast.encoder.layer:
        for name in ("query", "value"):
            setattr(layer.attention.self, name, Shifted(getattr(layer.attention.self, name)))
    save_model(fast, tmp_path / "saved.safetensors")
    assert len(load_file(tmp_path / "saved.safetensors")) >= len(model.state_dict())


def test_memory_that_others_look_at_is_left_to_them():
    """An alias, or another process, of weights that were laid together before."""
    model, fast = twins()
    check(model, fast)
    query = [m.encoder.layer[0].attention.self.query.weight for m in (model, fast)]
    aliases = [p.data for p in query]
    fast.state_dict()
    for alias in aliases:
        alias.mul_(-1)
    check(model, fast)
    del aliases, alias
    fast.share_memory()
    fast.state_dict()
    fastbert.restore(fast)
    assert query[1].is_shared()
    torch.testing.assert_close(fast(IDS)[0], model(IDS)[0], rtol=2e-5, atol=2e-5)


class Nothing(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x


def test_a_layer_of_another_kind():
    model, fast = twins()
    check(model, fast)
    for m in (model, fast):
        m.encoder.layer[1] = Nothing()
    check(model, fast)
    assert f"encoder.layer.1 is a {__name__}.Nothing" in str(fastbert.explain(fast))
    check(model, fastbert.restore(fast))
    with pytest.warns(UserWarning, match="left the model as it was"):
        fastbert.accelerate(fast)


def test_a_restored_model_has_nothing_of_ours():
    model, fast = twins()
    check(model, fast)
    assert b"fastbert" in pickle.dumps(fast) and b"fastbert" not in pickle.dumps(fastbert.restore(fast))


def test_fake_tensors():
    _, fast = twins()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fast(torch.ones(2, 8, dtype=torch.long))[0].shape == (2, 8, TINY["hidden_size"])


def test_queries_keep_memory_of_their_own():
    _, fast = twins()
    attention = fast.encoder.layer[0].attention.self
    storage = lambda: {p.untyped_storage().data_ptr() for p in attention.parameters()}  # noqa: E731
    expected = fast(IDS)[0]
    with torch.no_grad():
        fast(IDS)
    assert len(storage()) == 6
    fastbert.restore(fast)
    assert len(storage()) == 6
    torch.testing.assert_close(fast(IDS)[0], expected, rtol=2e-5, atol=2e-5)


def test_attention_of_ones_own():
    def twice(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, query * 2, *args, **kwargs)

    AttentionInterface.register("twice", twice)
    model, fast = twins()
    for implementation in ("twice", "sdpa", "eager"):
        for m in (model, fast):
            m.set_attn_implementation(implementation)
        check(model, fast)
    assert "1 calls ran the original code: its attention, 'twice', is not transformers'" in str(fastbert.explain(fast))


def test_attention_of_ones_own_under_the_name_of_theirs(monkeypatch):
    @functools.wraps(modeling_bert.eager_attention_forward)
    def twice(module, query, *args, **kwargs):
        return eager(module, query * 2, *args, **kwargs)

    eager = modeling_bert.eager_attention_forward
    model, fast = twins()
    for m in (model, fast):
        m.set_attn_implementation("eager")
    check(model, fast)
    monkeypatch.setattr(modeling_bert, "eager_attention_forward", twice)
    check(model, fast)
    assert "its attention, 'eager', is not transformers'" in str(fastbert.explain(fast))


@pytest.mark.parametrize("way", ["another function", "other code"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ["BertIntermediate", "BertSelfOutput", "BertEmbeddings", "BertPooler", "BertLayer"])
def test_a_class_of_transformers_patched(name, called, way, monkeypatch):
    model, fast = twins()
    if called:
        with torch.no_grad():
            fast(IDS)
    kind = getattr(modeling_bert, name)
    forward = kind.forward
    if way == "another function":
        twice = functools.wraps(forward)(lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 2)
        monkeypatch.setattr(kind, "forward", twice)
    else:  # in the same function
        kept = FunctionType(forward.__code__, forward.__globals__, closure=forward.__closure__)
        monkeypatch.setitem(forward.__globals__, "_kept", kept)
        code = (lambda self, *args, **kwargs: _kept(self, *args, **kwargs) * 2).__code__  # noqa: F821
        if forward.__code__.co_freevars:
            pytest.skip("its code has cells")
        monkeypatch.setattr(forward, "__code__", code)
    with torch.no_grad():
        got, expected = fast(IDS), model(IDS)
    assert all(torch.equal(a, b) for a, b in zip(got.to_tuple(), expected.to_tuple(), strict=True))
    assert f"{name}.forward has been replaced" in str(fastbert.explain(fast))


def other_types(embeddings):
    embeddings.token_type_ids = torch.ones_like(embeddings.token_type_ids)


def other_positions(embeddings):
    embeddings.position_ids.copy_(embeddings.position_ids.flip(1))


def other_types_uncounted(embeddings):
    embeddings.token_type_ids.data.fill_(1)


@pytest.mark.parametrize("change", [other_types, other_positions, other_types_uncounted])
def test_other_buffers(change):
    model, fast = twins()
    check(model, fast)
    compiled = torch.compile(fast, backend="eager")
    check(model, compiled)
    for m in (model, fast):
        change(m.embeddings)
    check(model, fast), check(model, compiled)
    check(model, fast, token_type_ids=torch.zeros_like(IDS), position_ids=torch.arange(IDS.shape[1])[None])


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings", "token_type_embeddings"])
@pytest.mark.parametrize(("option", "value"), [("max_norm", 0.3), ("sparse", True), ("scale_grad_by_freq", True)])
def test_options_of_tables(option, value, table, tmp_path):
    model, fast = twins()
    models = [model, fast]
    if option != "scale_grad_by_freq" or table == "word_embeddings":  # packed, each token has a position of its own
        models.append(own(model, tmp_path))
    ids = torch.tensor([[5, 5, 7, 5], [1, 5, 2, 9]])
    results = []
    for m in models:
        setattr(m.embeddings._modules[table], option, value)
        state = m(ids, attention_mask=torch.ones_like(ids))[0]
        state[..., 0].sum().backward()
        results.append((state, m.embeddings._modules[table].weight.grad))
    for state, gradient in results[1:]:
        torch.testing.assert_close(state, results[0][0], rtol=2e-5, atol=2e-5)
        assert gradient.layout == results[0][1].layout
        torch.testing.assert_close(gradient.to_dense(), results[0][1].to_dense(), rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """What an adapter is: a module around the one that was there, whose weight can be asked for."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.linspace(-0.5, 0.4, TINY["hidden_size"]))

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return self.inner(x) + self.shift


@pytest.mark.parametrize("name", ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"])
def test_adapters_in_the_embeddings(name, tmp_path):
    model, fast = twins()
    for m in (model, fast, own(model, tmp_path)):
        setattr(m.embeddings, name, Shifted(getattr(m.embeddings, name)))
        check(model, m)
        m(IDS)[0].sum().backward()
        assert getattr(m.embeddings, name).shift.grad.norm() > 0


@pytest.mark.parametrize(
    "name", ["intermediate.dense", "attention.self.query", "attention.output.LayerNorm", "output.dense"]
)
def test_weights_that_are_buffers(name, tmp_path):
    model, fast = twins()
    mine = own(model, tmp_path)
    check(model, fast), check(model, mine)
    for m in (model, fast, mine):
        module = m.encoder.layer[1].get_submodule(name)
        weight = module.weight.detach() * 2
        del module.weight
        module.register_buffer("weight", weight)
    check(model, fast), check(model, mine)


def test_positions_and_types_for_a_row_each(tmp_path):
    model, fast = twins()
    mine = own(model, tmp_path)
    column = torch.arange(len(IDS))[:, None]
    for arguments in ({"position_ids": column}, {"token_type_ids": column.clamp(max=1)}):
        check(model, fast, **arguments), check(model, mine, **arguments)


def test_a_model_without_memory():
    with torch.device("meta"):
        fast = fastbert.accelerate(BertModel(BertConfig(**TINY)))
    assert fast(torch.ones(2, 8, dtype=torch.long, device="meta"))[0].is_meta


def test_tensors_without_memory_are_not_read(tmp_path):
    """They say that they are contiguous and on the CPU."""
    mine, mask = own(original(), tmp_path), torch.ones_like(IDS)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        fastbert.BertModel(fastbert.BertConfig(**TINY))(torch.zeros(2, 4, dtype=torch.long))
    with FakeTensorMode() as mode:
        pretended = mode.from_tensor(mask)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            fastbert.ops.read_mask(pretended)
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        mine(TwoTensor(IDS, IDS.clone()))
    twice = mine(IDS, attention_mask=TwoTensor(mask, mask.clone()))
    torch.testing.assert_close(twice[0], mine(IDS, attention_mask=mask)[0])
    with pytest.raises(ValueError, match=r"attention_mask holds -1\.0"):
        mine(IDS, attention_mask=torch._neg_view(mask.float()))


def test_export_with_any_length(tmp_path):
    mine = own(original(), tmp_path)
    length = torch.export.Dim("length", min=3, max=TINY["max_position_embeddings"])
    exported = torch.export.export(mine, (IDS,), dynamic_shapes={"input_ids": {1: length}}).module()
    for ids in (IDS, IDS[:, :5], torch.cat([IDS, IDS], dim=1)):
        for a, b in zip(exported(ids)[:2], mine(ids)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export_holds_the_original_code():
    model, fast = twins()
    mask, other = torch.ones_like(IDS), torch.ones_like(IDS)
    mask[1, 3:], other[0, 2:] = 0, 0
    exported = torch.export.export(fast, (IDS, mask)).module()
    torch.testing.assert_close(exported(IDS, other)[0], model(IDS, other)[0], rtol=1e-4, atol=1e-5)


def test_a_trace_holds_no_lengths(tmp_path):
    mine = own(original(), tmp_path)
    with pytest.raises(ValueError, match=r"attention_mask is given to torch\.jit\.trace"):
        torch.jit.trace(lambda ids, mask: mine(ids, mask)[0], (IDS, torch.ones_like(IDS)), check_trace=False)


def test_outputs_show_their_tensors(tmp_path):
    """DistributedDataParallel with a static graph, FSDP and torch.export look for them as pytrees."""
    output = own(original(), tmp_path)(IDS, output_hidden_states=True)
    leaves, spec = pytree.tree_flatten(output)
    assert len(leaves) == 2 + 1 + TINY["num_hidden_layers"] and all(isinstance(x, torch.Tensor) for x in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(output) and list(again) == list(output)
    assert again.last_hidden_state is output.last_hidden_state


def test_a_model_goes_when_nobody_refers_to_it(tmp_path):
    mine = own(original(), tmp_path)
    weights = [weakref.ref(p) for p in mine.parameters()]
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            mine(IDS)
        mine(IDS)[0].sum().backward()
        del mine
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()
