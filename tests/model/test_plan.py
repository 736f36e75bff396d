"""Plans: whatever changes in a model, the next call sees it; and nothing else is remembered."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support import TINY
from torch import nn

import fastbert
from fastbert.model import plan

IDS = torch.randint(1, TINY["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(0))


class Doubled(nn.Linear):
    """A linear layer by another name."""

    def forward(self, x):
        return 2 * super().forward(x)


def remembered(model):
    return vars(model).get(plan._PLAN)


def hook(module):
    module.register_forward_hook(lambda module, args, out: 2 * out)


def hook_in_another_table(module):
    module._forward_hooks = copy.copy(module._forward_hooks)
    hook(module)


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def become_doubled(module):
    module.__class__ = Doubled


def written_in_place(module):
    with torch.no_grad():
        module.weight.mul_(2)


def written_through_data(module):
    module.weight.data.mul_(2)


def other_data(module):
    module.weight.data = 2 * module.weight.data


def other_parameter(module):
    module.weight = nn.Parameter(2 * module.weight.detach())


def transposed(module):
    if module.in_features == module.out_features:
        module.weight.data = module.weight.data.t()
    else:
        other_data(module)


def other_table(module):
    module._parameters = {**module._parameters, "weight": nn.Parameter(2 * module.weight.detach())}


def other_state(module):
    other = copy.deepcopy(module)
    other_data(other)
    module.__setstate__(other.__dict__)


def no_bias(module):
    module.register_parameter("bias", None)


# For linear layers: each doubles what the layer makes, or nearly.
LINEAR = [
    *(hook, hook_in_another_table, own_forward, become_doubled, written_in_place),
    *(written_through_data, other_data, other_parameter, transposed, other_table, other_state, no_bias),
]
NAMES = ["attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"]


def replace_linear(layers):
    old = layers[1].intermediate.dense
    new = layers[1].intermediate.dense = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())


def replace_container(layers):
    layers[0].attention = copy.deepcopy(layers[1].attention)


def swap_layers(layers):
    layers[0], layers[1] = layers[1], layers[0]


def enter_layers_in_another_order(layers):
    first = layers._modules.pop("0")
    layers._modules["0"] = first


def hook_a_layer(layers):
    hook(layers[1])


def drop_a_layer(layers):
    del layers[1]


def append_a_layer(layers):
    layers.append(copy.deepcopy(layers[0]))


def other_eps(layers):
    for layer in layers:
        layer.output.LayerNorm.eps = layer.attention.output.LayerNorm.eps = 0.1


def different_eps(layers):
    layers[0].output.LayerNorm.eps = 0.1


def scaled_norm(layers):
    with torch.no_grad():
        layers[0].attention.output.LayerNorm.bias += 1


def other_heads(layers):
    for layer in layers:
        layer.attention.self.attention_head_size *= 2


def narrower(layers):
    """Leading slices: the same memory, less of it."""
    for layer in layers:
        up, down = layer.intermediate.dense, layer.output.dense
        half = len(up.weight) // 2
        up.weight.data, up.bias.data, down.weight.data = (
            up.weight.data[:half],
            up.bias.data[:half],
            down.weight.data[:, :half],
        )


def no_layers(layers):
    del layers[:]


def all_biases_away(layers):
    for name in ("query", "key", "value"):
        no_bias(getattr(layers[0].attention.self, name))


TREE = [
    *(
        replace_linear,
        replace_container,
        swap_layers,
        enter_layers_in_another_order,
        hook_a_layer,
        drop_a_layer,
        append_a_layer,
        other_eps,
    ),
    *(different_eps, scaled_norm, other_heads, all_biases_away, narrower, no_layers),
]


@pytest.fixture
def model():
    model = fastbert.BertModel(fastbert.BertConfig(**TINY)).eval()
    for parameter in model.encoder.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))  # so that biases matter, too
    return model


def changes():
    for name in NAMES:
        for change in LINEAR:
            yield pytest.param(
                lambda layers, name=name, change=change: change(layers[1].get_submodule(name)),
                id=f"{change.__name__}-{name}",
            )
    for change in TREE:
        yield pytest.param(change, id=change.__name__)


@pytest.mark.parametrize("change", list(changes()))
@torch.inference_mode()
def test_a_change_counts_at_the_next_call(model, change):
    model(IDS)
    before = model(IDS).last_hidden_state
    assert remembered(model)
    with torch.inference_mode(False):
        change(model.encoder.layer)
    checksums = remembered(model).checksums
    for _ in range(checksums.calls_until_seen() if checksums is not None else 0):
        model(IDS)  # more than one is needed for writes through .data alone
    after = model(IDS).last_hidden_state
    plan.forget(model)
    torch.testing.assert_close(after, model(IDS).last_hidden_state, rtol=0, atol=0)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_dropout_counts_at_the_next_call(model):
    before = model(IDS).last_hidden_state
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.embeddings.dropout.p = 0.0
    torch.testing.assert_close(model(IDS).last_hidden_state, before, rtol=1e-5, atol=1e-5)
    model.encoder.layer[0].output.dropout.p = 0.5
    assert (model(IDS).last_hidden_state - before).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(model(IDS).last_hidden_state, before, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_an_activation_counts_at_the_next_call(model):
    before = model(IDS).last_hidden_state
    model.config.hidden_act = "relu"
    assert (model(IDS).last_hidden_state - before).abs().max() > 1e-3


@torch.inference_mode()
def test_the_same_weights_come_again(model):
    model(IDS)
    forms = remembered(model).whole.forms
    model(IDS)
    assert forms and remembered(model).whole.forms is forms


def test_nothing_outlives_the_model():
    model = fastbert.BertModel(fastbert.BertConfig(**TINY)).eval()
    with torch.inference_mode():
        model(IDS)
    parameter, layers = weakref.ref(model.encoder.layer[0].output.dense.weight), weakref.ref(model.encoder.layer)
    assert remembered(model)
    del model
    gc.collect()
    assert parameter() is None and layers() is None


def test_hooks_that_refer_to_the_model_keep_nothing():
    model = fastbert.BertModel(fastbert.BertConfig(**TINY)).eval()
    with torch.inference_mode():
        model(IDS)
        layers = model.encoder.layer
        layers[0].output.dense.register_forward_hook(lambda *_, model=model: None)
        layers[0].register_forward_hook(lambda *_, model=model: None)
        layers[0].attention.self.owner = [model]
        model(IDS)
    gone = weakref.ref(layers[0].output.dense.weight)
    del model, layers
    gc.collect()
    assert gone() is None


@torch.inference_mode()
def test_what_was_replaced_goes_at_the_next_call(model):
    model(IDS)
    gone = weakref.ref(model.encoder.layer[0].intermediate.dense.weight)
    with torch.inference_mode(False):
        replace_linear([None, model.encoder.layer[0]])
    model(IDS)
    gc.collect()
    assert gone() is None and not remembered(model).whole


@torch.inference_mode()
def test_copies_remember_nothing_of_the_original(model):
    model(IDS)
    assert remembered(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not remembered(other)
        torch.testing.assert_close(other(IDS).last_hidden_state, model(IDS).last_hidden_state)
    replica = copy.copy(model)  # as DataParallel makes them: the same __dict__, other modules in it
    replica.__dict__ = dict(replica.__dict__)
    assert not remembered(replica).holds(replica) and remembered(model).holds(model)


@torch.inference_mode()
def test_a_model_goes_without_the_garbage_collector():
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**TINY)).eval()
    model(IDS)
    gone = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not any(p() is not None for p in gone)
    finally:
        gc.enable()


def test_explain_prints_after_how_many_calls_a_write_is_seen(model):
    model(IDS)
    with torch.no_grad():
        model(IDS)
    calls = remembered(model).checksums.calls_until_seen()
    assert f"are seen after at most {calls} calls" in str(fastbert.explain(model))
