"""The C++ linear and attention: every instruction set this machine has, by the accuracy contract."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import assert_accurate, floor_of_product, poisoned_memory, require_native, score_gradients

from fastbert import native, ops, reference, use_backend
from fastbert.native import extension, packed_weights


def linear_inputs(rows, inner, outer, dtype):
    x, weight = torch.randn(rows, inner).to(dtype), (torch.randn(outer, inner) / inner**0.5).to(dtype)
    return x, weight, torch.randn(outer).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu", "silu", "tanh"])
def test_linear_accuracy(isa, activation, dtype):
    """Sizes that are no multiple of any tile; one and two threads give the same bits."""
    for rows, inner, outer in ((1, 2, 1), (5, 62, 31), (13, 768, 33), (63, 100, 111), (200, 1000, 65)):
        x, weight, bias = linear_inputs(rows, inner, outer, dtype)
        got = native.linear(x, weight, bias, activation=activation)
        exact = reference.linear(x.double(), weight.double(), bias.double(), activation=activation)
        assert_accurate(got, reference.linear(x, weight, bias, activation=activation), exact)
        torch.set_num_threads(2)
        assert torch.equal(native.linear(x, weight, bias, activation=activation), got)
        torch.set_num_threads(1)


@pytest.mark.parametrize("precision, dtype", [(None, torch.float32), ("high", torch.float32), ("int8", torch.bfloat16)])
def test_a_product_of_nothing_is_the_bias(isa, precision, dtype):
    bias = torch.randn(33).to(dtype)
    with poisoned_memory():
        for rows in (1, 13, 40):
            got = native.linear(torch.ones(rows, 0).to(dtype), torch.ones(33, 0).to(dtype), bias, precision=precision)
            assert torch.equal(got, bias.expand(rows, 33))


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_out_the_same_whatever_rows_go_with_it(isa, dtype, precision):
    """The same bits: a text's vector does not depend on its batch, nor on how rows are cut for threads and caches."""
    for inner in (384, 1200):
        x, weight, bias = linear_inputs(100, inner, 70, dtype)
        all_rows = native.linear(x, weight, bias, precision=precision)
        for rows in (1, 8, 12, 13, 16, 24, 25, 37):
            assert torch.equal(native.linear(x[:rows], weight, bias, precision=precision), all_rows[:rows])


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "tanh"])
def test_activations_over_their_whole_range(isa, activation):
    """Through an identity weight; large, small, infinite and NaN arguments."""
    x = torch.cat(
        [torch.linspace(-100, 100, 4001), torch.linspace(-8, 8, 4095), torch.tensor([0.0, -0.0, 1e30, -1e30])]
    )
    x = x[: len(x) // 4 * 4].view(-1, 4).contiguous()
    got = native.linear(x, torch.eye(4), None, activation=activation)
    exact = reference.ACTIVATIONS[activation](x.double())
    assert ((got - exact).abs() <= 3e-7 * exact.abs().clamp(min=1)).all()
    special = torch.tensor([[float("inf"), 0, 0, 0], [float("nan"), 0, 0, 0]])
    got = native.linear(special, torch.ones(1, 4), None, activation=activation)
    assert got[0, 0] == special[0, 0] or activation == "tanh"
    assert got[1, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_strides_and_neighbours(isa, dtype):
    """Strided rows are read as they are, and nothing is written outside the output."""
    wide, weight, bias = torch.randn(9, 200).to(dtype), torch.randn(50, 200).to(dtype), torch.randn(50).to(dtype)
    expected = native.linear(wide[::2, 20:120].contiguous(), weight[:, 40:140].contiguous(), bias)
    assert torch.equal(native.linear(wide[::2, 20:120], weight[:, 40:140], bias), expected)
    out = torch.full((5, 60), float("nan"), dtype=dtype)
    owner = ops.Weight([weight[:, 40:140]], [bias])
    code, packed = extension.CPU_DTYPES[dtype], packed_weights.packed(owner)
    x = wide[::2, 20:120]
    pointers = (x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr(), 60)
    extension.C.linear_cpu(code, 0, 5, 50, 100, *pointers, 0, False, extension.chosen_isa()[1], 1)
    assert torch.equal(out[:, :50], expected) and out[:, 50:].isnan().all()


def test_row_blocks_are_packed_as_their_concatenation(isa):
    """Whether or not they fill the panels of the instruction set."""
    x = torch.randn(9, 64)
    for rows in ((96, 96, 96), (20, 33, 7)):
        weights, biases = [torch.randn(n, 64) for n in rows], [torch.randn(n) for n in rows]
        stacked = native.linear(x, torch.cat(weights), torch.cat(biases))
        assert torch.equal(native.linear(x, ops.Weight(weights, biases)), stacked)


def test_threads_may_pack_one_weight_at_once():
    """Each call holds the packed weight that it reads, whatever the others do meanwhile."""
    require_native()
    weights = [ops.Weight([torch.randn(300, 256)], [None]) for _ in range(8)]
    x = torch.randn(64, 256)
    expected = [reference.linear(x, *w.stacked()) for w in weights]

    def run(i):
        weights[i % 8].forms.clear()  # as if it had changed
        return i % 8, native.linear(x, weights[i % 8])

    with ThreadPoolExecutor(8) as pool:
        for i, got in pool.map(run, range(400)):
            torch.testing.assert_close(got, expected[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 16), (12, 32), (2, 64), (2, 80), (1, 34)])
def test_attention_accuracy(isa, heads, width, dtype):
    lengths = torch.tensor([0, 1, 5, 0, 32, 33, 64, 130])
    cu_seqlens = lengths.cumsum(0).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, heads, width).to(dtype)
    for scale in (None, 2.0):
        got = native.attention(qkv, cu_seqlens, 130, scale=scale)
        exact = reference.attention(qkv.double(), cu_seqlens, 130, scale=scale)
        assert_accurate(got, reference.attention(qkv, cu_seqlens, 130, scale=scale), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_scores_however_large(isa, dtype):
    """Scores up to 1e12: values of one come out as ones, since probabilities add up to one."""
    qkv = torch.randn(40, 3, 2, 64)
    qkv[:, :2] *= 1e5
    qkv[:, 2] = 1
    got = native.attention(qkv.to(dtype), torch.tensor([0, 23, 40], dtype=torch.int32), 23)
    torch.testing.assert_close(got.float(), torch.ones(40, 2, 64), rtol=1e-2, atol=0)


def test_attention_of_one_long_text_among_short_ones():
    """The results are those of each text alone, however its heads are shared out."""
    lengths = [300, *[3] * 40]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3, 12, 32)
    torch.set_num_threads(2)
    got = native.attention(qkv, cu_seqlens, 300)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = native.attention(qkv[start:end], torch.tensor([0, end - start], dtype=torch.int32), end - start)
        assert torch.equal(got[start:end], alone)


def test_attention_of_large_scores(isa):
    """Scores of thousands: the largest alone counts, and nothing overflows."""
    qkv = torch.randn(20, 3, 2, 16) * 60
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
    exact = reference.attention(qkv.double(), cu_seqlens, 20)
    torch.testing.assert_close(native.attention(qkv, cu_seqlens, 20).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_scores_of_ten_thousand(isa, dtype):
    """By the contract: scores that fp32 holds exactly, so close together that probabilities are not all 0 or 1.

    A maximum and the logarithm of a sum in one number would lose all but four of that one's digits.
    """
    queries, keys, values = (
        torch.randint(1, 5, (100, 2, 64)) * 32.0,
        torch.full((100, 2, 64), 64.0),
        torch.randn(100, 2, 64),
    )
    keys[..., 0] += torch.randint(-2, 3, (100, 2)) / 32
    qkv, lengths = torch.stack([queries, keys, values], 1), (40, 60)
    cu_seqlens, dy = torch.tensor([0, 40, 100]).int(), torch.randn(100, 2, 64)

    def eager(qkv):
        parts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths)]
        results = [torch.softmax(q @ k.mT / 8, -1) @ v for q, k, v in parts]
        return torch.cat([y.transpose(0, 1) for y in results])

    def gradient(function, dtype):
        x = qkv.to(dtype).requires_grad_()
        y = function(x)
        return y.detach(), *torch.autograd.grad(y, x, dy.to(dtype))

    scores = queries[:, 0] @ keys[:, 0].T / 8
    assert 1e4 < scores.max() < 1e5 and 0.1 < scores.std(1).median() < 10
    with use_backend("native"):
        got = gradient(lambda x: ops.attention(x, cu_seqlens, 60), dtype)
    qkv = qkv.to(dtype)
    floors = []
    for part, dout in zip(qkv.split(lengths), dy.to(dtype).split(lengths), strict=True):
        q, k, v = part.permute(1, 2, 0, 3)
        dscores = score_gradients(q, k, v, dout.transpose(0, 1), 1 / 8)
        floors += [floor_of_product(dscores, k, dtype), floor_of_product(dscores.mT, q, dtype)]
    inherent = {"dqkv": tuple(map(max, zip(*floors, strict=True)))}
    for name, *three in zip(("y", "dqkv"), got, gradient(eager, dtype), gradient(eager, torch.float64), strict=True):
        assert_accurate(*three, name, inherent.get(name, (0.0, 0.0)))


def test_attention_refuses_offsets_that_would_crash():
    require_native()
    qkv = torch.randn(4, 3, 1, 8)
    for offsets in ([0, 5], [0, 3, 2, 4], [-1, 4], [1, 4], [0, 3], [0]):
        with pytest.raises(ValueError, match="offsets must rise from 0 to the number of tokens, 4"):
            native.attention(qkv, torch.tensor(offsets, dtype=torch.int32), 5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: native.supports_linear(torch.zeros(2, 3).bfloat16(), torch.zeros(4, 3).bfloat16()), "odd width"),
        (lambda: native.supports_linear(torch.zeros(2, 4), torch.zeros(4, 4).double()), "mixed dtypes"),
        (lambda: native.supports_linear(torch.zeros(2, 4).half(), torch.zeros(4, 4).half()), "dtype torch.float16"),
        (lambda: native.supports_linear(torch.zeros(4, 2).T, torch.zeros(4, 4)), "not contiguous"),
        (lambda: native.supports_attention(torch.zeros(2, 3, 1, 4), torch.tensor([0, 2]), 2), "int32"),
        (
            lambda: native.supports_attention(torch.zeros(2, 3, 1, 4), torch.tensor([0, 2]).int(), 2, scale=-1.0),
            "scale -1.0",
        ),
    ],
)
def test_reasons_of_linear_and_attention(call, reason):
    require_native()
    assert reason in call()


def test_weights_that_do_not_say_when_they_change_are_refused():
    require_native()
    x, weight, bias = linear_inputs(2, 4, 3, torch.float32)
    with torch.inference_mode():
        silent = [weight.clone(), bias.clone()]
    assert native.supports_linear(x, weight, bias) is None
    for given in ((silent[0], bias), (weight, silent[1])):
        assert "made in inference mode" in native.supports_linear(x, *given)


def test_a_weight_with_another_stride_is_packed_anew():
    """The same tensor object at the same address, other numbers."""
    require_native()
    x, memory = torch.randn(2, 4), torch.randn(64)
    weight = memory.as_strided((3, 4), (8, 1))
    native.linear(x, weight)
    weight.data = memory.as_strided((3, 4), (9, 1))
    torch.testing.assert_close(native.linear(x, weight), x @ weight.t())


def test_the_kernels_know_nothing_of_autocast():
    """The ops cast, and call them with it off: see test_native_bwd.py."""
    require_native()
    with torch.autocast("cpu", torch.bfloat16):
        assert native.supports_linear(torch.zeros(2, 4), torch.zeros(4, 4)) == "autocast is on"


def exact_int8(x, weight, bias, activation):
    """The definition, in fp64 with whole numbers: both operands rotated, and rounded by 127 / their largest value."""

    def rounded(t):
        t = reference.rotate(t)
        largest = t.abs().amax(1, keepdim=True)
        return (t * torch.where(largest > 0, 127 / largest, 0)).round().double(), largest.double() / 127

    (xq, x_scale), (wq, w_scale) = rounded(x), rounded(weight)
    return reference.linear(xq, wq) * x_scale * w_scale.T + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_int8(isa, activation, dtype):
    """Whole-number sums leave the rounding of the result alone; any width, one and two threads alike."""
    for rows, inner, outer in ((1, 1, 1), (5, 63, 31), (13, 768, 33), (33, 100, 111), (300, 1001, 65)):
        x, weight, bias = linear_inputs(rows, inner, outer, dtype)
        x[rows // 2] = 0
        x[0] *= 1000
        got = native.linear(x, weight, bias, activation=activation, precision="int8")
        exact = exact_int8(x, weight, bias, activation)
        exact = exact if activation is None else reference.ACTIVATIONS[activation](exact)
        assert_accurate(got, exact.to(dtype), exact)
        torch.set_num_threads(2)
        assert torch.equal(native.linear(x, weight, bias, activation=activation, precision="int8"), got)
        torch.set_num_threads(1)


def test_linear_int8_of_what_is_not_finite(isa):
    x = torch.randn(4, 70)
    x[1, 69], x[2, 3] = float("nan"), float("inf")
    got = native.linear(x, torch.randn(9, 70), torch.zeros(9), precision="int8")
    assert got[1:3].isnan().all() and got[[0, 3]].isfinite().all()


@pytest.mark.parametrize(("precision", "limit"), [("high", 2e-5), ("highest", 1e-6)])
def test_linear_in_bf16_pieces(isa, precision, limit):
    """Relative error of the whole product; where there is no AMX it is the product in fp32."""
    for rows, inner, outer in ((1, 1, 1), (5, 63, 31), (33, 768, 33), (300, 1001, 65)):
        x, weight, bias = linear_inputs(rows, inner, outer, torch.float32)
        got = native.linear(x, weight, bias, precision=precision).double()
        exact = reference.linear(x.double(), weight.double(), bias.double())
        assert (got - exact).norm() <= limit * exact.norm()
        torch.set_num_threads(2)
        assert torch.equal(native.linear(x, weight, bias, precision=precision).double(), got)
        torch.set_num_threads(1)
