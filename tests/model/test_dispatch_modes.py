"""Dispatch modes, function modes and module trackers see what runs: no kernel hides behind one of its pointers."""

import copy

import pytest
import torch
from test_known_parts import IDS, MASK, PADDED, fallbacks, make
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import fastbert


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class WithoutPosition3(TorchFunctionMode):
    """Zeroes the third token in what every linear layer takes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and args[0].dim() == 3:
            x = args[0].clone()
            x[:, 3] = 0
            args = (x, *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """transformers' model, the same accelerated, and fastbert's own."""
    original, folder = make(), tmp_path_factory.mktemp("model")
    original.save_pretrained(folder)
    fast = fastbert.accelerate(copy.deepcopy(original))
    return original, fast, fastbert.BertModel.from_pretrained(folder).eval()


def flops(model, ids, mask, backward):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = model(ids, attention_mask=mask)
        if backward:
            (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    return counter.get_flop_counts()


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_transformers(three, backward):
    """Of the linear layers: torch has no formula for attention on a CPU, other than as products in our backward."""
    original, fast, own = three
    for model in three:  # as a warm model runs
        with torch.no_grad():
            model(IDS)
    expected = flops(original, IDS, None, backward)["Global"]
    assert sum(expected.values()) > 2_000_000
    assert flops(fast, IDS, None, backward)["Global"] == expected
    counted = flops(own, IDS, None, backward)["Global"]
    assert counted.pop(torch.ops.aten.bmm, 0) < 0.1 * sum(expected.values())
    assert sum(counted.values()) == sum(expected.values())


def test_flops_of_a_padded_batch_are_those_of_its_tokens(three):
    original, fast, own = three
    expected = flops(original, PADDED, MASK, False)["Global"]
    assert flops(fast, PADDED, MASK, False)["Global"] == expected
    pooler = 2 * len(IDS) * 48 * 48
    share = MASK.sum().item() / MASK.numel()
    counted = sum(flops(own, PADDED, MASK, False)["Global"].values())
    assert counted == (sum(expected.values()) - pooler) * share + pooler


def test_flops_by_module(three):
    original, _, own = three
    expected, counted = (flops(model, IDS, None, False) for model in (original, own))
    for name in ("encoder.layer.0", "encoder.layer.2.output.dense", "pooler.dense"):
        assert sum(counted[f"BertModel.{name}"].values()) == sum(expected[f"BertModel.{name}"].values()) > 0


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_sees_every_operation(three, grad):
    fast = three[1]
    with torch.set_grad_enabled(grad):
        plain = [model(PADDED, attention_mask=MASK).last_hidden_state for model in three]
        recorded, outputs = [], []
        for model in three:
            with Recorder() as recorder:
                outputs.append(model(PADDED, attention_mask=MASK).last_hidden_state)
            recorded.append(recorder.seen)
    assert recorded[0] == recorded[1]
    assert recorded[2].count("aten.addmm.default") == 3 * 4 + 1  # q, k and v are one product
    assert torch.equal(outputs[0], outputs[1])
    for a, b in zip(plain, outputs, strict=True):
        torch.testing.assert_close(a[MASK == 1], b[MASK == 1], rtol=1e-5, atol=1e-5)
    assert "a dispatch mode is active: Recorder" in str(fallbacks(fast))


def test_a_function_mode_sees_every_function(three):
    fast, recorded = three[1], []
    for model in three:
        with FunctionRecorder() as recorder, torch.no_grad():
            model(PADDED, attention_mask=MASK)
        recorded.append(recorder.seen)
    assert [name for name in recorded[1] if name in ("linear", "layer_norm", "embedding")] == [
        name for name in recorded[0] if name in ("linear", "layer_norm", "embedding")
    ]
    assert recorded[0].count("linear") == 3 * 6 + 1
    assert recorded[2].count("linear") == 3 * 4 + 1
    assert "a function mode is active: FunctionRecorder" in str(fallbacks(fast))


def test_a_function_mode_that_changes_a_text_by_position(three):
    original, fast, _ = three
    with torch.no_grad():
        plain = original(PADDED, attention_mask=MASK).last_hidden_state
        with WithoutPosition3():
            a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
    assert torch.equal(a, b) and not torch.equal(a, plain)


def test_a_default_device_is_no_reason():
    original = make()
    fast = fastbert.accelerate(copy.deepcopy(original))
    with torch.device("cpu"), torch.no_grad():
        a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
    torch.testing.assert_close(a[MASK == 1], b[MASK == 1], rtol=1e-5, atol=1e-5)
    assert not fallbacks(fast)


def test_a_checkpoint_that_chooses_what_it_keeps(three):
    """Selective checkpointing records operations in a dispatch mode, which must see products to keep them."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    kept = []

    def policy(context, op, *args, **kwargs):
        if op is torch.ops.aten.addmm.default:
            kept.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    for model in three[1:]:
        kept.clear()
        context = partial(create_selective_checkpoint_contexts, policy)
        out = checkpoint(
            lambda m=model: m(PADDED, attention_mask=MASK).last_hidden_state, use_reentrant=False, context_fn=context
        )
        model.zero_grad()
        out[MASK == 1].square().sum().backward()
        gradient = model.encoder.layer[1].output.dense.weight.grad
        assert len(kept) >= 12
        three[0].zero_grad()
        three[0](PADDED, attention_mask=MASK).last_hidden_state[MASK == 1].square().sum().backward()
        expected = three[0].encoder.layer[1].output.dense.weight.grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_module_tracker_knows_where_it_is(three):
    class Where(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.tracker, self.seen = ModuleTracker(), []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.addmm.default:
                self.seen.append(max(self.tracker.parents, key=len))
            return function(*args, **(kwargs or {}))

    found = []
    for model in three:
        with Where() as where, where.tracker, torch.no_grad():
            model(PADDED, attention_mask=MASK)
        found.append(where.seen)
    assert found[0] == found[1] == found[2]
    assert "BertModel.encoder.layer.1.attention.self.value" in found[2]


def test_hooks_for_all_modules_see_the_parts_of_our_own(three):
    own, seen = three[2], []
    with torch.no_grad():
        expected = own(PADDED, attention_mask=MASK).last_hidden_state
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
        try:
            got = own(PADDED, attention_mask=MASK).last_hidden_state
        finally:
            handle.remove()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    kinds = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding)
    wanted = [m for m in own.modules() if isinstance(m, kinds)]
    assert {id(m) for m in seen} >= {id(m) for m in [*wanted, *own.encoder.layer, own]}
