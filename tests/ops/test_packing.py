"""Packing from any mask and from cu_seqlens, and back."""

import pytest
import torch
from support import MASKS, mask_of, require_native

from fastbert import native, ops, use_backend
from fastbert.packing import batch_from_cu_seqlens, full_batch, pack, unpack

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["native", "reference"])
def read_mask(request):
    """ops.read_mask by one backend."""
    if request.param == "native":
        require_native()
    with use_backend(request.param, "read_mask"):
        yield ops.read_mask


@pytest.mark.parametrize("kind", [k for k in MASKS if k != "absent"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_round_trip(read_mask, kind, dtype):
    mask = mask_of(kind).to(dtype)
    batch = read_mask(mask)
    x = torch.randn(*mask.shape, 5)
    packed = pack(x, batch)
    lengths = mask.long().sum(1)
    assert torch.equal(packed, x[mask.bool()])
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert batch.max_seqlen == lengths.max()
    assert torch.equal(batch.mask(), mask.bool())
    assert batch.leading_pads == bool((~mask[:, 0].bool() & (lengths > 0)).any())
    assert torch.equal(unpack(packed, batch), x * mask.bool()[..., None])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_bounds_of_ids(dtype, count):
    require_native()
    limit = torch.iinfo(dtype).max
    ids = torch.randint(-limit, limit, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)
    assert native.bounds(ids) == (int(ids.min()), int(ids.max()))
    assert native.bounds(ids.to(torch.int16)) is native.bounds(ids[None].expand(3, count)) is None


def test_a_mask_of_any_strides(read_mask):
    mask = mask_of("holes").repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(read_mask(mask).mask(), mask.bool())
    assert torch.equal(read_mask(mask.t()).mask(), mask.t().bool())
    assert read_mask(torch.ones(1, 4).expand(3, 4)).indices is None


def test_a_zero_with_a_sign_is_a_pad(read_mask):
    assert read_mask(torch.tensor([[1.0, -0.0]])).cu_seqlens.tolist() == [0, 1]


def test_all_ones_is_a_view(read_mask):
    x = torch.randn(2, 3, 4)
    batch = read_mask(torch.ones(2, 3))
    assert batch.indices is None
    assert pack(x, batch).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_nothing(read_mask, shape):
    batch = read_mask(torch.ones(shape))
    x = torch.randn(*shape, 2)
    assert batch.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert pack(x, batch).shape == (0, 2)
    assert unpack(pack(x, batch), batch).shape == x.shape


def test_cu_seqlens_is_right_padded():
    batch = batch_from_cu_seqlens(torch.tensor([0, 3, 3, 8]), 8)
    expected = torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1] * 5], dtype=torch.bool)
    assert torch.equal(batch.mask(), expected)
    assert batch.max_seqlen == 5
    x = torch.arange(8.0)
    assert unpack(x, batch, fill=-1).tolist() == [[0, 1, 2, -1, -1], [-1] * 5, [3, 4, 5, 6, 7]]


def test_full_batch_equals_mask_of_ones(read_mask):
    mine, theirs = full_batch(3, 4, torch.device("cpu")), read_mask(torch.ones(3, 4))
    assert mine.max_seqlen == theirs.max_seqlen
    assert torch.equal(mine.cu_seqlens, theirs.cu_seqlens)
    assert mine.indices is theirs.indices is None


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_of_other_values(read_mask, dtype, value):
    if torch.tensor(value).to(dtype).item() in (0, 1) or not (dtype.is_floating_point or value in (2, -1)):
        pytest.skip("this type cannot hold it")
    mask = torch.ones(2, 3, dtype=dtype)
    mask[1, 2] = torch.tensor(value).to(dtype)
    with pytest.raises(ValueError, match=f"attention_mask holds {mask[1, 2].item()}"):
        read_mask(mask)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3)])
def test_a_mask_has_two_dimensions(shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*; it must be \(batch, sequence\)"):
        ops.read_mask(torch.ones(shape))


@pytest.mark.parametrize(
    ("offsets", "longest", "message"),
    [
        ([1, 4], None, r"cu_seqlens\[0\] is 1; offsets must rise from 0 to the number of tokens, 4"),
        ([0, 3], None, "offsets must rise from 0 to the number of tokens, 4"),
        ([0, 3, 2, 4], None, "must rise"),
        ([0, 4], 3, "a sequence of 4 tokens; max_seqlen is 3"),
    ],
)
def test_bad_cu_seqlens(offsets, longest, message):
    with pytest.raises(ValueError, match=message):
        batch_from_cu_seqlens(torch.tensor(offsets), 4, longest)


def test_gradient_passes_through():
    mask = mask_of("holes")
    x = torch.randn(3, 8, 4, requires_grad=True)
    batch = ops.read_mask(mask)
    unpack(pack(x, batch), batch).sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
