"""Decay groups, LAMB against a loop over tensors, clipping, and what optimizers are saved as."""

from __future__ import annotations

import pytest
import torch
from support import TINY
from torch import nn

import fastbert
from fastbert.training.optimizer import Lamb, clip_gradients, decay_groups, make_optimizer
from fastbert.training.settings import OptimizerSettings
from fastbert.training.training_state import CheckpointError, load_optimizer, save_optimizer


@pytest.fixture
def model():
    return fastbert.BertForPreTraining(fastbert.BertConfig(**TINY))


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def naive_lamb_step(w, g, state, lr, beta1, beta2, eps, decay, trust_ratio):
    """Algorithm 2 of You et al., 2020, a tensor at a time."""
    state["t"] += 1
    state["m"] = beta1 * state["m"] + (1 - beta1) * g
    state["v"] = beta2 * state["v"] + (1 - beta2) * g * g
    m, v = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
    update = m / (v.sqrt() + eps) + decay * w
    ratio = 1.0
    if trust_ratio and w.norm() > 0 and update.norm() > 0:
        ratio = w.norm() / update.norm()
    return w - lr * ratio * update


def test_biases_and_norms_do_not_decay(model):
    decayed, others = decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(p)].endswith("bias") or "LayerNorm" in names[id(p)] for p in others["params"])
    left = [names[id(p)] for p in decayed["params"]]
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in left)
    assert "bert.embeddings.word_embeddings.weight" in left  # once, though the decoder has it too
    assert len(left) + len(others["params"]) == len(names)
    model.bert.embeddings.requires_grad_(False)
    assert not {id(p) for p in model.bert.embeddings.parameters()} & {
        id(p) for group in decay_groups(model, 0.1) for p in group["params"]
    }


@pytest.mark.parametrize("trust_ratio", [True, False])
def test_lamb_is_the_algorithm_a_tensor_at_a_time(trust_ratio):
    shapes = [(7, 5), (1,), (3, 2, 4), (6,)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    params.append(nn.Parameter(torch.zeros(4, dtype=torch.float64)))  # a length of 0 takes the ratio 1
    lr, betas, eps, decay = 0.01, (0.8, 0.95), 1e-6, 0.1
    optimizer = Lamb(params, lr=lr, betas=betas, eps=eps, weight_decay=decay, trust_ratio=trust_ratio)
    expected = [p.detach().clone() for p in params]
    states = [{"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in expected]
    for step in range(5):
        give_gradients(params, step)
        if step == 2:
            params[1].grad = None  # left out: neither moved nor counted
        for i, p in enumerate(params):
            if p.grad is not None:
                expected[i] = naive_lamb_step(expected[i], p.grad, states[i], lr, *betas, eps, decay, trust_ratio)
        optimizer.step()
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)


def test_the_lamb_of_settings_has_no_ratio_for_biases_and_norms(model):
    optimizer = make_optimizer(model, OptimizerSettings(name="lamb", weight_decay=0.3))
    assert [(g["weight_decay"], g["trust_ratio"]) for g in optimizer.param_groups] == [(0.3, True), (0.0, False)]


def test_adamw_is_fused_and_takes_the_settings(model):
    settings = OptimizerSettings(lr=0.5, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.2)
    optimizer = make_optimizer(model, settings)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.7, 0.8), 1e-3, 0.2)


def test_fused_steps_are_seen_by_what_keeps_packed_weights(model):
    """A fused kernel must count as a write: the C++ ops keep packed weights by version and sample."""
    optimizer = make_optimizer(model, OptimizerSettings())
    weight = model.bert.encoder.layer[0].output.dense.weight
    give_gradients(model.parameters(), 0)
    version = weight._version
    optimizer.step()
    assert weight._version > version


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping(model, limit):
    give_gradients(model.parameters(), 0)
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in before]).norm()
    got = clip_gradients(model.parameters(), limit)
    torch.testing.assert_close(got, norm, rtol=1e-5, atol=0)
    factor = min(1.0, limit / norm.item()) if limit else 1.0
    for p, g in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * factor, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_saved_optimizer_goes_on_bit_for_bit(model, tmp_path, name):
    settings = OptimizerSettings(name=name, lr=0.01)
    optimizer = make_optimizer(model, settings)
    for step in range(3):
        give_gradients(model.parameters(), step)
        optimizer.step()
    save_optimizer(optimizer, model, tmp_path)
    twin = fastbert.BertForPreTraining(fastbert.BertConfig(**TINY))
    twin.load_state_dict(model.state_dict())
    restored = make_optimizer(twin, settings)
    load_optimizer(restored, twin, tmp_path)
    for m, o in ((model, optimizer), (twin, restored)):
        give_gradients(m.parameters(), 7)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_of_another_model_or_a_damaged_one_is_an_error(model, tmp_path):
    optimizer = make_optimizer(model, OptimizerSettings())
    give_gradients(model.parameters(), 0)
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path)
    for change in ({"intermediate_size": 64}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}):
        other = fastbert.BertForPreTraining(fastbert.BertConfig(**{**TINY, **change}))
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
            load_optimizer(make_optimizer(other, OptimizerSettings()), other, tmp_path)
    file = tmp_path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read"):
        load_optimizer(optimizer, model, tmp_path)
