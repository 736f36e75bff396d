"""User code inside an accelerated encoder sees (B, S, E): the original code runs, and explain names the part."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support import TINY
from torch import nn
from torch.nn.utils import parametrize, prune

import fastbert
from fastbert.integrations import parts
from fastbert.integrations.parts import ADAPTERS

IDS = torch.randint(5, 120, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [1] * 6 + [0] * 2])
PADDED = IDS.masked_fill(MASK == 0, 0)


def make(name="BertModel", **changes):
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def twins(name="BertModel", change=None, **changes):
    original = make(name, **changes)
    if change is not None:
        change(original)
    return fastbert.accelerate(copy.deepcopy(original)), original


def fallbacks(model):
    return [line.strip() for line in str(fastbert.explain(model)).splitlines() if "ran the original code" in line]


PARTS = {
    "word table": lambda m: m.embeddings.word_embeddings,
    "embedding norm": lambda m: m.embeddings.LayerNorm,
    "query": lambda m: m.encoder.layer[1].attention.self.query,
    "attention output": lambda m: m.encoder.layer[0].attention.output.dense,
    "up": lambda m: m.encoder.layer[2].intermediate.dense,
    "down": lambda m: m.encoder.layer[2].output.dense,
    "norm": lambda m: m.encoder.layer[1].output.LayerNorm,
    "layer": lambda m: m.encoder.layer[1],
    "encoder": lambda m: m.encoder,
}


def without_position_3(x):
    x = x.clone()
    x[:, 3] = 0
    return x


HOOKS = {
    "forward": lambda part: part.register_forward_hook(lambda m, args, out: without_position_3(out)),
    "forward with kwargs": lambda part: part.register_forward_hook(
        lambda m, args, kwargs, out: without_position_3(out), with_kwargs=True
    ),
    "backward": lambda part: part.register_full_backward_hook(
        lambda m, inputs, outputs: tuple(g * 2 if g is not None and g.is_floating_point() else g for g in inputs)
    ),
    "backward before": lambda part: part.register_full_backward_pre_hook(lambda m, go: (without_position_3(go[0]),)),
}


@pytest.mark.parametrize("when", ["before", "between calls"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("part", PARTS)
def test_hooks_see_what_they_see_in_transformers(part, hook, when):
    if part == "encoder" and hook.startswith("forward"):
        pytest.skip("its output is no tensor")
    fast, original = twins()
    if when == "between calls":
        fast(PADDED, attention_mask=MASK)
    gradients = []
    for model in (fast, original):
        HOOKS[hook](PARTS[part](model))
        out = model(PADDED, attention_mask=MASK)
        (out.last_hidden_state[MASK == 1].square().sum() + out.pooler_output.sum()).backward()
        gradients.append(model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    (line,) = fallbacks(fast)
    assert "has a hook" in line


def test_only_code_in_the_package_is_transformers_own(monkeypatch):
    """Also where a folder above the package is called models."""
    assert parts._transformers_folder() == f"{Path(transformers.__file__).parent}{os.sep}"
    home = Path("/home/models/site-packages/transformers")
    monkeypatch.setattr(sys.modules["transformers.modeling_outputs"], "__file__", str(home / "modeling_outputs.py"))
    parts._transformers_folder.cache_clear()
    try:
        assert parts._transformers_folder() == f"{home}{os.sep}"
    finally:
        parts._transformers_folder.cache_clear()


def test_hooks_for_all_modules_see_every_module():
    fast, original = twins()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        original(PADDED, attention_mask=MASK)
        expected, seen[:] = list(seen), []
        fast(PADDED, attention_mask=MASK)
    finally:
        handle.remove()
    assert seen == expected and len(seen) > 40
    assert "hooks for all modules are registered" in fallbacks(fast)[0]
    fast(PADDED, attention_mask=MASK)
    assert "1 calls ran" in fallbacks(fast)[0]


class Shifted(nn.Linear):
    """Looks along the sequence."""

    def forward(self, x):
        return super().forward(x.roll(1, dims=1))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) - x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("when", ["before", "between calls"])
@pytest.mark.parametrize("kind", ["subclass", "wrapper", "word table"])
def test_a_part_that_is_not_known_runs_the_original(kind, when):
    def change(model):
        output = model.encoder.layer[1].attention.output
        if kind == "subclass":
            output.dense.__class__ = Shifted
        elif kind == "wrapper":
            output.dense = Wrapped(output.dense)
        else:
            model.embeddings.word_embeddings = Wrapped(model.embeddings.word_embeddings)
            model.embeddings.word_embeddings.forward = lambda ids, table=model.embeddings.word_embeddings: table.inner(
                ids
            ).roll(1, dims=1)

    fast, original = twins(change=change if when == "before" else None)
    if when != "before":
        fast(PADDED, attention_mask=MASK)
        change(fast), change(original)
    a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
    assert torch.equal(a, b)
    name = "word_embeddings" if kind == "word table" else "encoder.layer.1.attention.output.dense"
    assert name in str(fastbert.explain(fast))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


STAYS_PACKED = {
    "pruned": lambda m: prune.l1_unstructured(m.encoder.layer[0].output.dense, "weight", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(
        m.encoder.layer[1].output.dense, "weight", Doubled()
    ),
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m.encoder.layer[1].intermediate.dense),
    "inputs require gradients": lambda m: m.enable_input_require_grads(),
}


@pytest.mark.parametrize("when", ["before", "between calls"])
@pytest.mark.parametrize("change", STAYS_PACKED)
def test_known_parts_and_hooks_stay_packed(change, when):
    fast, original = twins()
    if when == "between calls":
        fast(PADDED, attention_mask=MASK)
    for model in (fast, original):
        STAYS_PACKED[change](model)
    for _ in range(2):
        a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
        torch.testing.assert_close(a[MASK == 1], b[MASK == 1], rtol=1e-5, atol=1e-5)
    assert not fallbacks(fast)


def test_device_hooks_of_accelerate_stay_packed():
    hooks = pytest.importorskip("accelerate.hooks")
    fast, original = twins()
    hooks.attach_execution_device_hook(fast.embeddings, "cpu")
    hooks.attach_execution_device_hook(fast.encoder, "cpu")
    assert hasattr(fast.encoder.layer[1].output.dense, "_hf_hook")
    for _ in range(2):
        a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
        torch.testing.assert_close(a[MASK == 1], b[MASK == 1], rtol=1e-5, atol=1e-5)
    assert not fallbacks(fast)


def adapted(kind):
    """A tiny BERT with one of PEFT's adapters, whose weights are all away from their start."""
    peft = pytest.importorskip("peft")
    # What PEFT asks of the sizes: vblora cuts vectors of 16, waveft counts coefficients, ln_tuning is about norms.
    names = {"ln_tuning": "LNTuningConfig", "fourierft": "FourierFTConfig", "trainable_tokens": "TrainableTokensConfig"}
    spelled = {c.lower(): c for c in dir(peft) if c.endswith("Config")}
    config = getattr(peft, names.get(kind) or spelled[f"{kind.replace('_', '')}config"])
    settings = {
        "ln_tuning": {"target_modules": ["LayerNorm"]},
        "trainable_tokens": {"target_modules": ["word_embeddings"], "token_indices": [7, 9]},
        "ia3": {"target_modules": ["query", "value"], "feedforward_modules": []},
        "vblora": {"target_modules": ["query", "value"], "vector_length": 16, "num_vectors": 8, "r": 2},
        "waveft": {"target_modules": ["query", "value"], "n_frequency": 32},
        "adalora": {"target_modules": ["query", "value"], "total_step": 10},
        "oft": {"target_modules": ["query", "value"], "oft_block_size": 8},
        "boft": {"target_modules": ["query", "value"], "boft_block_size": 8},
        "c3a": {"target_modules": ["query", "value"], "block_size": 8},
        "road": {"target_modules": ["query", "value"], "group_size": 8},
        "shira": {"target_modules": ["query", "value"], "r": 2},
        "miss": {"target_modules": ["query", "value"], "r": 4},
        "hra": {"target_modules": ["query", "value"], "r": 4},
    }.get(kind, {"target_modules": ["query", "value"]})
    model = peft.get_peft_model(make("BertForSequenceClassification"), config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_the_list_work_token_by_token(kind):
    original, fast = adapted(kind), fastbert.accelerate(adapted(kind))  # a copy would lose osf's hooks on parameters
    gradients = []
    for model in (fast, original):
        model(input_ids=PADDED, attention_mask=MASK).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[1]
    for name, gradient in gradients[1].items():
        atol = max(5e-5, 1e-4 * gradient.abs().max().item())
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert "packed, by fastbert" in str(fastbert.explain(fast)) and not fallbacks(fast)


@pytest.mark.filterwarnings("ignore:fastbert.accelerate left")
@pytest.mark.parametrize("when", ["before", "between calls"])
def test_an_adapter_off_the_list_runs_the_original(when):
    """Lily's router takes the mean of its experts over all tokens of a batch, pads among them."""
    original, fast = adapted("lily"), adapted("lora") if when == "between calls" else adapted("lily")
    fast = fastbert.accelerate(fast)
    if when == "between calls":
        with torch.no_grad():
            fast(input_ids=PADDED, attention_mask=MASK)
        for mine, theirs in zip(
            fast.base_model.model.bert.encoder.layer, adapted("lily").bert.encoder.layer, strict=True
        ):
            mine.attention.self.query = theirs.attention.self.query
            mine.attention.self.value = theirs.attention.self.value
    with torch.no_grad():
        a, b = (m(input_ids=PADDED, attention_mask=MASK).logits for m in (fast, original))
    assert torch.equal(a, b)
    assert "attention.self.query is a peft.tuners.lily.layer.Linear" in str(fastbert.explain(fast))


def test_a_hook_inside_an_adapter_runs_the_original():
    original = adapted("lora")
    fast = fastbert.accelerate(copy.deepcopy(original))
    outputs = []
    for model in (fast, original):
        part = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default
        part.register_forward_hook(lambda m, args, out: without_position_3(out))
        outputs.append(model(input_ids=PADDED, attention_mask=MASK).logits)
    assert torch.equal(*outputs)
    assert "has a hook on lora_A.default" in fallbacks(fast)[0]


def test_activated_lora_runs_the_original():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], r=4, alora_invocation_tokens=[7], task_type="SEQ_CLS")
    model = peft.get_peft_model(make("BertForSequenceClassification"), config).eval()
    fast = fastbert.accelerate(copy.deepcopy(model))
    reason = str(fastbert.explain(fast))
    assert "looks along the sequence" in reason and "packed, by fastbert" not in reason


def test_neftune_in_the_trainer(tmp_path):
    rows = [{"input_ids": IDS[i], "attention_mask": MASK[i], "labels": i % 2} for i in range(3)]
    fast, _ = twins("BertForSequenceClassification")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        neftune_noise_alpha=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    transformers.Trainer(fast, arguments, train_dataset=rows).train()
    assert "embeddings.word_embeddings has a hook" in fallbacks(fast)[0]
