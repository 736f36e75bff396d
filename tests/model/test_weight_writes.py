"""Writes to the weights of the real MiniLM, by whatever means: the next call sees them, or one of the next ones."""

import copy

import pytest
import torch
from torch import nn

import fastbert

IDS = torch.randint(1000, 20_000, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded(minilm):
    return {dtype: fastbert.BertModel.from_pretrained(minilm, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}


def linears(model):
    return [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]


def weights(model):
    return [linear.weight for linear in linears(model)]


def clip(model, sigmas):
    for w in weights(model):
        w.data.clamp_(-sigmas * w.std().item(), sigmas * w.std().item())


def prune_at_random(model, share):
    generator = torch.Generator().manual_seed(1)
    for w in weights(model):
        w.data.mul_(torch.rand(w.shape, generator=generator) >= share)


def prune_by_magnitude(model):
    for w in weights(model):
        w.data.mul_(w.abs() >= w.abs().flatten().kthvalue(w.numel() // 10).values)


def zero_a_head(model):
    model.encoder.layer[3].attention.self.value.weight.data[32:64] = 0


def smooth_eight_columns(model):
    model.encoder.layer[2].intermediate.dense.weight.data[:, 100:108] *= 1.5


def one_bias_element(model):
    model.encoder.layer[4].output.dense.bias.data[7] += 1.0


def one_weight_element(model):
    model.encoder.layer[4].output.dense.weight.data[7, 9] += 1.0


def through_numpy(model):
    model.encoder.layer[1].attention.output.dense.weight.detach().numpy()[3] *= 2


def step_through_data(model):
    """As apex and others write: p.data += a little, in the dtype of the weights."""
    for p in model.parameters():
        p.data.add_(0.01 * p.data)


def average(model):
    """One step of an exponential moving average of decay 0.99 towards other weights."""
    for p in model.parameters():
        p.data.lerp_(p.data + 1.0, 0.01)


def merge_lora(model):
    generator = torch.Generator().manual_seed(2)
    for w in weights(model):
        a, b = (torch.randn(n, 4, generator=generator).to(w.dtype) for n in w.shape)
        w.data += 1e-2 * (a @ b.T)


# Unseen by the version counter: seen after a number of calls.
UNCOUNTED = {
    "clip at 2 sigma": lambda m: clip(m, 2),
    "clip at 3 sigma": lambda m: clip(m, 3),
    "prune 5 %": lambda m: prune_at_random(m, 0.05),
    "prune 30 %": lambda m: prune_at_random(m, 0.3),
    "prune by magnitude": prune_by_magnitude,
    "a head": zero_a_head,
    "eight columns": smooth_eight_columns,
    "a weight": one_weight_element,
    "numpy": through_numpy,
    "step through data": step_through_data,
    "average": average,
    "merge LoRA": merge_lora,
}


def states(model):
    with torch.inference_mode():
        return model(IDS).last_hidden_state


def expected(model):
    """Of a copy, which remembers nothing."""
    return states(copy.deepcopy(model))


@pytest.mark.parametrize("write", UNCOUNTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uncounted_writes_are_seen_within_the_bound(loaded, write, dtype):
    if write == "numpy" and dtype == torch.bfloat16:
        write = "a head"  # numpy has no bfloat16
    model = copy.deepcopy(loaded[dtype])
    before = states(model)
    UNCOUNTED[write](model)
    right = expected(model)
    assert not torch.equal(before, right)
    calls = bound = 0
    while not torch.equal(states(model), right):
        bound = max(bound, vars(model)["_fastbert_plan"].checksums.calls_until_seen())  # calls differ in time
        calls += 1
        assert calls <= bound + 1


@pytest.mark.parametrize("write", UNCOUNTED)
def test_refresh_makes_the_next_call_see_them(loaded, write):
    model = copy.deepcopy(loaded[torch.float32])
    states(model)
    UNCOUNTED[write](model)
    assert fastbert.refresh(model) is model
    assert torch.equal(states(model), expected(model))


@pytest.mark.parametrize("write", UNCOUNTED)
def test_a_call_with_gradients_sees_them_at_once(loaded, write):
    model = copy.deepcopy(loaded[torch.float32])
    model(IDS[:1, :8])
    UNCOUNTED[write](model)
    assert torch.equal(model(IDS[:1, :8])[0], copy.deepcopy(model)(IDS[:1, :8])[0])


def optimizer_step(kind):
    def step(model):
        optimizer = kind(model.parameters(), lr=1e-3)
        model(IDS[:1, :8])[0].pow(2).mean().backward()
        optimizer.step()

    return step


def swa(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    optimizer_step(torch.optim.SGD)(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
            p.copy_(q)


def parametrize(model):
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    torch.nn.utils.parametrize.register_parametrization(linears(model)[0], "weight", Half())


def load(model, **options):
    model.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()}, **options)


def swap(model):
    linear = linears(model)[0]
    torch.utils.swap_tensors(linear.weight, nn.Parameter(2 * linear.weight.detach()))


def share(model):
    linears(model)[6].weight = linears(model)[0].weight


def to_under_the_swap_flag(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double(), model.float()
        load(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Counted, or seen in the tree: the next call is right.
AT_ONCE = {
    "a bias": one_bias_element,
    "SGD": optimizer_step(torch.optim.SGD),
    "AdamW": optimizer_step(torch.optim.AdamW),
    "AdamW foreach": optimizer_step(lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True)),
    "SWA": swa,
    "prune": lambda m: [torch.nn.utils.prune.l1_unstructured(x, "weight", 0.3) for x in linears(m)],
    "parametrize": parametrize,
    "load": load,
    "assign": lambda m: load(m, assign=True),
    "swap": swap,
    "share": share,
    "convert by swapping": to_under_the_swap_flag,
    "quantize": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
}


@pytest.mark.parametrize("write", AT_ONCE)
def test_other_writes_are_seen_at_the_next_call(loaded, write):
    import torch.nn.utils.prune

    model = copy.deepcopy(loaded[torch.float32])
    before = states(model)
    AT_ONCE[write](model)
    after = states(model)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected(model), rtol=0, atol=0)
