"""Plain ways to run an accelerated BERT: every call is packed, and the numbers are transformers'."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_known_parts import MASK, PADDED, fallbacks, twins
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.bert.modeling_bert import BertLayer


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp2(model):
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model, policy=None):
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)


BY_LAYER = partial(transformer_auto_wrap_policy, transformer_layer_cls={BertLayer})
WRAPPERS = {
    "plain": lambda m: m,
    "DDP": lambda m: torch.nn.parallel.DistributedDataParallel(m, find_unused_parameters=True),
    "FSDP1 whole": fsdp1,
    "FSDP1 by layer": partial(fsdp1, policy=BY_LAYER),
    "FSDP2": fsdp2,
}


def states(model):
    return model(PADDED, attention_mask=MASK).last_hidden_state[MASK == 1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_steps_and_inference_are_packed(group, wrapper):
    fast, original = twins()
    wrapped, outputs = WRAPPERS[wrapper](fast), []
    for model in (wrapped, original):
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.01), []
        for _ in range(2):
            with torch.no_grad():
                seen.append(states(model))
            out = states(model)
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(out.detach())
        with torch.no_grad():
            seen.append(states(model))
        outputs.append(seen)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert (outputs[1][0] - outputs[1][-1]).abs().max() > 1e-3  # the steps are seen
    assert not fallbacks(fast)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_and_gradient_checkpointing_are_packed(checkpointing):
    fast, original = twins(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for autocast, tolerance in ((False, 1e-5), (True, 0.1)):
        outputs = []
        for model in (fast, original):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train().zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = states(model).float()
            out.square().mean().backward()
            outputs.append((out.detach(), model.encoder.layer[0].attention.self.query.weight.grad))
        torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    assert not fallbacks(fast)
