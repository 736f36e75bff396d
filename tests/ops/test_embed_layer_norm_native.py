"""The C++ embed_layer_norm and its backward: every instruction set this machine has, by the accuracy contract."""

import pytest
import torch
from support import assert_op_accurate, require_native
from test_rowwise import layer_norm

import fastbert
from fastbert import native, ops

DTYPES = [torch.float32, torch.bfloat16]
TABLES = ("word", "token_type", "position", "weight", "bias")


def inputs_of(rows, width, *, vocab=30, types=2, places=16):
    return {
        "input_ids": torch.randint(0, vocab, (rows,)),
        "token_type_ids": torch.randint(0, types, (rows,)),
        "position_ids": torch.randint(0, places, (rows,)),
        "word": torch.randn(vocab, width),
        "token_type": torch.randn(types, width),
        "position": torch.randn(places, width),
        "weight": torch.randn(width),
        "bias": torch.randn(width),
    }


def naive(input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, eps):
    return layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids], weight, bias, eps)


def run(inputs, dtype, **kwargs):
    """The output and the five gradients."""
    leaves = {k: x.detach().to(dtype, copy=True) if x.is_floating_point() else x for k, x in inputs.items()}
    for name in TABLES:
        leaves[name].requires_grad_()
    out = ops.embed_layer_norm(**leaves, eps=1e-12, **kwargs)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
    grads = torch.autograd.grad((out * weight).sum(), [leaves[name] for name in TABLES])
    return [out.detach(), *grads]


@pytest.fixture(autouse=True)
def _native():
    require_native()
    with fastbert.use_backend("native", "embed_layer_norm"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (1, 768), (63, 63), (111, 111), (200, 1000)])
def test_accuracy(isa, rows, width, dtype):
    assert_op_accurate(ops.embed_layer_norm, naive, inputs_of(rows, width), dtype, eps=1e-12)


def test_many_tokens_of_one_type_and_a_large_table(isa):
    """Every token of type 0, few words of many: long sums, and rows that no one asks for."""
    inputs = inputs_of(3000, 40, vocab=5000, types=1, places=3)
    inputs["input_ids"] %= 7
    assert_op_accurate(ops.embed_layer_norm, naive, inputs, torch.float32, eps=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(isa, dtype, p):
    inputs, results = inputs_of(700, 100, vocab=900, types=3), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        results.append(run(inputs, dtype, dropout_p=p))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_used_before_leaves_no_trace(isa):
    inputs = inputs_of(300, 63)
    clean = run(inputs, torch.float32)
    run({k: x * float("nan") if x.is_floating_point() else x for k, x in inputs_of(400, 200).items()}, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(clean, run(inputs, torch.float32), strict=True))


def test_dropout(isa):
    """Its share, its scale, that seed and torch's generator choose it, and that the backward has the same mask."""
    inputs = inputs_of(400, 256)
    leaves = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    plain = ops.embed_layer_norm(**leaves, eps=1e-12)
    torch.manual_seed(3)
    out = ops.embed_layer_norm(**leaves, eps=1e-12, dropout_p=0.25)
    kept = out != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    assert abs(kept.float().mean(0) - 0.75).max() < 0.15 and abs(kept.float().mean(1) - 0.75).max() < 0.15
    torch.testing.assert_close(out, torch.where(kept, plain / 0.75, 0.0))
    dy = torch.randn_like(out)
    got = torch.autograd.grad(out, [leaves[name] for name in TABLES], dy, retain_graph=True)
    expected = torch.autograd.grad(plain, [leaves[name] for name in TABLES], torch.where(kept, dy / 0.75, 0.0))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ops.embed_layer_norm(**leaves, eps=1e-12, dropout_p=0.25), out)
    torch.manual_seed(3)
    assert torch.equal(ops.embed_layer_norm(**leaves, eps=1e-12, dropout_p=0.25), out)


def test_the_mask_is_the_same_on_every_instruction_set(isa):
    """What is dropped is a matter of integers alone; and rows and columns next to each other are independent."""
    inputs = inputs_of(512, 512)
    inputs["bias"] += 100  # so that nothing kept is zero
    mask = native.embed_layer_norm(**inputs, eps=1e-12, dropout_p=0.5, seed=12345)[0] == 0
    bits = mask.double() * 2 - 1
    assert hash_of(mask) == MASK_HASH
    for a, b in ((bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1]), (bits[2:, 1:], bits[:-2, :-1])):
        assert abs((a * b).mean()) < 0.01  # 5 standard deviations


MASK_HASH = 17143235427


def hash_of(mask):
    return int((mask.flatten().long() * torch.arange(1, mask.numel() + 1)).sum())


def test_padding_row_gets_no_gradient(isa):
    inputs = inputs_of(64, 40)
    inputs["input_ids"][::3] = 4
    whole, padded = run(inputs, torch.float32), run(inputs, torch.float32, padding_idx=4)
    assert whole[1][4].abs().sum() > 0 and (padded[1][4] == 0).all()
    others = torch.arange(30) != 4
    assert torch.equal(whole[1][others], padded[1][others])
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], padded[2:], strict=True))
    assert torch.equal(run(inputs, torch.float32, padding_idx=-26)[1], padded[1])


def test_only_what_is_asked_for_gets_a_gradient():
    inputs = inputs_of(20, 40)
    expected = dict(zip(TABLES, run(inputs, torch.float32)[1:], strict=True))
    for name in TABLES:
        leaves = {**inputs, name: inputs[name].clone().requires_grad_()}
        out = ops.embed_layer_norm(**leaves, eps=1e-12)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        assert torch.equal(leaves[name].grad, expected[name])


def test_int32_ids_strided_ids_and_strided_tables(isa):
    inputs = inputs_of(64, 40)
    expected = native.embed_layer_norm(**inputs, eps=1e-12)[0]
    for change in (
        {name: inputs[name].int() for name in ("input_ids", "token_type_ids", "position_ids")},
        {"input_ids": torch.stack([inputs["input_ids"]] * 2, 1)[:, 1]},
        {
            "word": torch.cat([inputs["word"]] * 2, 1)[:, 40:],
            "position": inputs["position"].repeat_interleave(2, 0)[::2],
        },
    ):
        assert torch.equal(ops.embed_layer_norm(**{**inputs, **change}, eps=1e-12), expected)
    grads = run(inputs, torch.float32)[1:]
    wide = torch.cat([inputs["word"]] * 2, 1).requires_grad_()
    out = ops.embed_layer_norm(**{**inputs, "word": wide[:, 40:]}, eps=1e-12)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert torch.equal(wide.grad[:, 40:], grads[0]) and (wide.grad[:, :40] == 0).all()


def test_a_gradient_that_is_one_number_for_all(isa):
    leaves = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in inputs_of(9, 40).items()}
    ops.embed_layer_norm(**leaves, eps=1e-12).sum().backward()
    torch.testing.assert_close(leaves["bias"].grad, torch.full((40,), 9.0))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("name", "bad", "rows"), [("input_ids", 30, 30), ("token_type_ids", -1, 2), ("position_ids", 1 << 40, 16)]
)
def test_ids_outside_their_table(name, bad, rows, grad):
    inputs = inputs_of(20, 40)
    inputs[name][13] = bad
    inputs["bias"].requires_grad_(grad)
    with pytest.raises(ValueError, match=f"embed_layer_norm: {name} holds {bad}; its table has {rows} rows"):
        ops.embed_layer_norm(**inputs, eps=1e-12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"word": torch.zeros(40, 30).T}, "last dimension not contiguous"),
        ({"word": torch.zeros(30, 40).half()}, "dtype torch.float16"),
        ({"bias": torch.zeros(40).bfloat16()}, "mixed dtypes torch.float32 and torch.bfloat16"),
        ({"bias": torch.zeros(80)[::2]}, r"weight or bias of shape \(40,\) and stride \(2,\)"),
    ],
)
def test_reasons(change, reason):
    with pytest.raises(fastbert.BackendError, match=f"cannot run this call: {reason}"):
        ops.embed_layer_norm(**{**inputs_of(4, 40), **change}, eps=1e-12)
