"""Ways to change a model or to watch it: each gives transformers' numbers, packed or not, and explain says which."""

import copy
import types

import pytest
import torch
from test_known_parts import MASK, PADDED, fallbacks, make, twins, without_position_3
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastbert

REAL = MASK == 1


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class AlongTheText(nn.Linear):
    def forward(self, x):
        return super().forward(x.cumsum(1))


class Scaled(torch.Tensor):
    """A weight that is read as another, as those of quantisation libraries are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            plain = weight.as_subclass(torch.Tensor) * 3
            return nn.functional.linear(x - x.mean(1, keepdim=True), plain, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def dense(model):
    return model.encoder.layer[1].output.dense


def patched(model):
    part, forward = dense(model), dense(model).forward
    part.forward = lambda x: forward(without_position_3(x))


def method(model):
    def forward(self, x):
        return nn.functional.linear(without_position_3(x), self.weight, self.bias)

    dense(model).forward = types.MethodType(forward, dense(model))


def patched_layer(model):
    layer, forward = model.encoder.layer[1], model.encoder.layer[1].forward
    layer.forward = lambda hidden_states, *args, **kwargs: forward(without_position_3(hidden_states), *args, **kwargs)


def subclass(model):
    dense(model).__class__ = AlongTheText


def per_sample(model):
    """Keeps inputs and gradients of outputs, a row per text, and makes of them gradients per text."""
    part = dense(model)
    part.kept = []
    part.register_forward_hook(lambda m, args, out: m.kept.append(args[0].detach()))
    part.register_full_backward_hook(lambda m, dx, dy: m.kept.append(dy[0].detach()))


def tensor_hook(model):
    dense(model).weight.register_hook(lambda gradient: gradient * 2)


def accumulated(model):
    def tripled(parameter):
        parameter.grad *= 3

    dense(model).weight.register_post_accumulate_grad_hook(tripled)


def frozen(model):
    dense(model).requires_grad_(False)
    model.embeddings.requires_grad_(False)


def tied(model):
    model.encoder.layer[2].output.dense.weight = dense(model).weight


def shared_layer(model):
    model.encoder.layer[2] = model.encoder.layer[0]


def fewer_layers(model):
    model.encoder.layer = model.encoder.layer[:2]


def sequential(model):
    model.encoder.layer[1].output.dense = nn.Sequential(dense(model), nn.Identity())


def no_bias(model):
    dense(model).bias = None


def changed_dropout(model):
    model.encoder.layer[0].output.dropout = nn.Identity()


def subclassed_weight(model):
    dense(model).weight = nn.Parameter(dense(model).weight.detach().as_subclass(Scaled), requires_grad=False)


CHANGES = {
    "instance forward": patched,
    "bound method": method,
    "instance forward of a layer": patched_layer,
    "subclass": subclass,
    "per-sample hooks": per_sample,
    "hook on a parameter": tensor_hook,
    "hook after accumulation": accumulated,
    "frozen": frozen,
    "tied": tied,
    "one layer twice": shared_layer,
    "fewer layers": fewer_layers,
    "sequential": sequential,
    "without bias": no_bias,
    "no dropout module": changed_dropout,
    "weight of a subclass": subclassed_weight,
    "pruned at random": lambda m: prune.random_unstructured(dense(m), "weight", 0.3),
    "pruned in rows": lambda m: prune.ln_structured(dense(m), "weight", 0.3, n=2, dim=0),
    "pruned for good": lambda m: prune.remove(prune.l1_unstructured(dense(m), "weight", 0.3), "weight"),
    "parametrized": lambda m: parametrize.register_parametrization(dense(m), "weight", Twice()),
    "parametrized bias": lambda m: parametrize.register_parametrization(dense(m), "bias", Twice()),
    "parametrized table": lambda m: parametrize.register_parametrization(
        m.embeddings.word_embeddings, "weight", Twice()
    ),
    "parametrized norm": lambda m: parametrize.register_parametrization(
        m.encoder.layer[0].output.LayerNorm, "weight", Twice()
    ),
    "parametrized position table": lambda m: parametrize.register_parametrization(
        m.embeddings.position_embeddings, "weight", Twice()
    ),
    "weight norm": lambda m: parametrizations.weight_norm(dense(m)),
    "weight norm by a hook": lambda m: nn.utils.weight_norm(dense(m)),
    "spectral norm": lambda m: parametrizations.spectral_norm(dense(m)),
    "spectral norm by a hook": lambda m: nn.utils.spectral_norm(dense(m)),
    "orthogonal": lambda m: parametrizations.orthogonal(m.encoder.layer[1].attention.output.dense),
}
FOREIGN = {
    "instance forward": "encoder.layer.1.output.dense has a hook",
    "bound method": "encoder.layer.1.output.dense has a hook",
    "instance forward of a layer": "encoder.layer.1 has a hook",
    "subclass": "encoder.layer.1.output.dense is a ",
    "per-sample hooks": "encoder.layer.1.output.dense has a hook",
    "no dropout module": "encoder.layer.0.output.dropout is a ",
    "sequential": "encoder.layer.1.output.dense is a ",
    "weight of a subclass": "encoder.layer.1.output.dense.weight is a ",
    "parametrized position table": "embeddings.position_embeddings is a ",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "between calls"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_and_watched_parts(change, when):
    original = make()
    fast = copy.deepcopy(original)
    if when == "between calls":
        fastbert.accelerate(fast)
        with torch.no_grad():
            fast(PADDED, attention_mask=MASK)
        fast(PADDED, attention_mask=MASK)
    for model in (original, fast):
        torch.manual_seed(7)  # of pruning, of power iterations
        CHANGES[change](model)
    fastbert.accelerate(fast)
    for _ in range(2):
        with torch.no_grad():
            a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
        torch.testing.assert_close(a[REAL], b[REAL], rtol=1e-4, atol=1e-4)
    gradients = []
    for model in (fast, original):
        out = model(PADDED, attention_mask=MASK)
        (out.last_hidden_state[REAL].square().sum() + out.pooler_output.sum()).backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({**found, **{f"kept {i}": x for i, x in enumerate(getattr(dense(model), "kept", ()))}})
    assert gradients[0].keys() == gradients[1].keys() and gradients[1]
    for name, gradient in gradients[1].items():
        atol = max(1e-5, 1e-4 * gradient.abs().max().item())
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    said = str(fastbert.explain(fast))
    assert FOREIGN[change] in said if change in FOREIGN else "packed, by fastbert" in said and not fallbacks(fast)


def test_functional_call_with_other_parameters():
    """Parameters that are swapped for one call, as in meta-learning: the call sees them, the next one does not."""
    fast, original = twins()
    others = {name: p.detach() * 1.1 for name, p in original.named_parameters() if "dense" in name}
    call = (PADDED,), {"attention_mask": MASK}
    outputs = []
    for model in (fast, original):
        with torch.no_grad():
            plain = model(*call[0], **call[1]).last_hidden_state[REAL]
            swapped = torch.func.functional_call(model, others, *call).last_hidden_state[REAL]
            again = model(*call[0], **call[1]).last_hidden_state[REAL]
        outputs.append((plain, swapped, again))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs[0][0], outputs[0][2]) and (plain - swapped).abs().max() > 1e-3


def test_a_mask_batched_by_vmap_gives_the_error_of_transformers():
    """Gradients per text without a mask are packed; a mask's values are nothing that a batching transform can read."""
    fast, original = twins()
    errors = []
    for model in (fast, original):
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            torch.func.vmap(lambda ids, mask, m=model: m(ids[None], attention_mask=mask[None])[0])(PADDED, MASK)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "attention_mask is batched by torch.func" in fallbacks(fast)[0]
