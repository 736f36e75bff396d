"""Dropout masks of a batch in parts: those that its rows have in the whole, forward and backward."""

import pytest
import torch
from support import require_native

from fastbert import ops

LENGTHS = [5, 33, 1, 70, 12]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs():
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    qkv, x = torch.randn(tokens, 3, 4, 16), torch.randn(tokens, 64)
    return qkv, x, torch.randint(0, 20, (tokens,)), torch.randn(20, 64), torch.rand(64), torch.randn(64)


def gradients(qkv, x, ids, table, weight, bias, lengths):
    """The outputs of a chain with dropout in each op, and the gradients of its rows."""
    qkv, x = qkv.clone().requires_grad_(), x.clone().requires_grad_()
    zeros = torch.zeros_like(ids)
    embedded = ops.embed_layer_norm(ids, zeros, zeros, table, table, table, weight, bias, eps=1e-5, dropout_p=0.3)
    attended = ops.attention(qkv, offsets(lengths), max(lengths), dropout_p=0.3).flatten(1)
    out = ops.add_layer_norm(attended + embedded, x, weight, bias, eps=1e-5, dropout_p=0.3)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), (qkv, x)))


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_parts_have_the_masks_of_the_whole(isa, cut):
    qkv, x, ids, table, weight, bias = inputs()
    with ops.mask_rows(7, 0):
        whole = gradients(qkv, x, ids, table, weight, bias, LENGTHS)
    first = sum(LENGTHS[:cut])
    parts = []
    for place, lengths in ((slice(0, first), LENGTHS[:cut]), (slice(first, None), LENGTHS[cut:])):
        with ops.mask_rows(7, place.start):
            parts.append(gradients(qkv[place], x[place], ids[place], table, weight, bias, lengths))
    for one, other, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(torch.cat([one, other]), both, rtol=1e-5, atol=1e-5)
    with ops.mask_rows(8, 0):
        assert not torch.equal(gradients(qkv, x, ids, table, weight, bias, LENGTHS)[0], whole[0])


def test_calls_without_gradient_have_the_same_masks():
    require_native()
    qkv, *_ = inputs()
    with ops.mask_rows(7, 0), torch.no_grad():
        plain = ops.attention(qkv, offsets(LENGTHS), max(LENGTHS), dropout_p=0.3)
    with ops.mask_rows(7, 0):
        differentiable = ops.attention(qkv.requires_grad_(), offsets(LENGTHS), max(LENGTHS), dropout_p=0.3)
    torch.testing.assert_close(differentiable.detach(), plain, rtol=1e-5, atol=1e-6)


def test_rows_are_new_ones_in_each_call_and_outside_torch_decides():
    require_native()
    x, vector = torch.ones(40, 64), torch.ones(64)
    drop = lambda: ops.add_layer_norm(x, x, vector, vector, eps=1e-5, dropout_p=0.3)  # noqa: E731
    with ops.mask_rows(7, 0):
        first, second = drop(), drop()
        with ops.mask_rows(7, 0):
            assert torch.equal(drop(), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    outside = drop()
    torch.manual_seed(3)
    assert torch.equal(drop(), outside)
