"""torch.func and forward-mode differentiation through a model: as through any other module."""

import pytest
import torch
from support import TINY, tokens
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastbert

# As in any other model: the fused attention of torch has no batching rule, and is called once a sample.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
IDS = tokens()


@pytest.fixture
def model():
    return fastbert.BertForSequenceClassification(fastbert.BertConfig(**TINY)).eval()


def loss_of(model):
    def loss(parameters, ids):
        return functional_call(model, parameters, (ids,)).logits.square().sum()

    return loss


def detached(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_gradients_of_each_sample(model):
    got = vmap(grad(loss_of(model)), in_dims=(None, 0))(detached(model), IDS[:, None])
    for i, row in enumerate(IDS):
        model.zero_grad()
        model(row[None]).logits.square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-3, atol=1e-5)


def test_an_ensemble(model):
    models = [model, fastbert.BertForSequenceClassification(model.config).eval()]
    parameters, _ = stack_module_state(models)
    got = vmap(lambda p: functional_call(model, p, (IDS,)).logits)({n: p.detach() for n, p in parameters.items()})
    with torch.no_grad():
        torch.testing.assert_close(got, torch.stack([m(IDS).logits for m in models]), rtol=1e-4, atol=1e-5)


def test_ids_of_a_batch_are_held_to_the_vocabulary(model):
    ids = IDS.clone()
    ids[-1, 2] = 1234
    with pytest.raises(ValueError, match="input_ids holds 1234"):
        vmap(lambda row: model(row[None]).logits)(ids)


def by_level(loss, parameters, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss({n: forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()}))


@pytest.mark.parametrize("mode", [by_level, lambda loss, p, t: jvp(loss, (p,), (t,))], ids=["dual level", "jvp"])
def test_forward_mode(model, mode):
    parameters = detached(model)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    loss = loss_of(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # which alone has a forward-mode derivative
        value, slope = mode(lambda p: loss(p, IDS), parameters, tangents)
    model(IDS).logits.square().sum().backward()
    expected = sum((p.grad * tangents[name]).sum() for name, p in model.named_parameters())
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(value, loss(parameters, IDS), rtol=1e-4, atol=1e-5)
