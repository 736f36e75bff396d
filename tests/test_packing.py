"""Packing from any mask and from cu_seqlens, and back."""

import pytest
import torch
from support import MASKS, mask_of

from fastbert.packing import batch_from_cu_seqlens, batch_from_mask, full_batch, pack, unpack


@pytest.mark.parametrize("kind", [k for k in MASKS if k != "absent"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.int32])
def test_mask_round_trip(kind, dtype):
    mask = mask_of(kind).to(dtype)
    batch = batch_from_mask(mask)
    x = torch.randn(*mask.shape, 5)
    packed = pack(x, batch)
    lengths = mask.long().sum(1)
    assert torch.equal(packed, x[mask.bool()])
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert batch.max_seqlen == lengths.max()
    assert torch.equal(batch.mask(), mask.bool())
    assert torch.equal(unpack(packed, batch), x * mask.bool()[..., None])


def test_all_ones_is_a_view():
    x = torch.randn(2, 3, 4)
    batch = batch_from_mask(torch.ones(2, 3))
    assert batch.indices is None
    assert pack(x, batch).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_nothing(shape):
    batch = batch_from_mask(torch.ones(shape))
    x = torch.randn(*shape, 2)
    assert pack(x, batch).shape == (0, 2)
    assert unpack(pack(x, batch), batch).shape == x.shape


def test_cu_seqlens_is_right_padded():
    batch = batch_from_cu_seqlens(torch.tensor([0, 3, 3, 8]), 8)
    expected = torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1] * 5], dtype=torch.bool)
    assert torch.equal(batch.mask(), expected)
    assert batch.max_seqlen == 5
    x = torch.arange(8.0)
    assert unpack(x, batch, fill=-1).tolist() == [[0, 1, 2, -1, -1], [-1] * 5, [3, 4, 5, 6, 7]]


def test_full_batch_equals_mask_of_ones():
    mine, theirs = full_batch(3, 4, torch.device("cpu")), batch_from_mask(torch.ones(3, 4))
    assert torch.equal(mine.cu_seqlens, theirs.cu_seqlens)
    assert mine.indices is theirs.indices is None


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan"), float("inf")])
def test_mask_of_other_values(value):
    mask = torch.ones(2, 3)
    mask[1, 2] = value
    with pytest.raises(ValueError, match=f"attention_mask holds {value}"):
        batch_from_mask(mask)


@pytest.mark.parametrize(
    ("offsets", "longest", "message"),
    [
        ([1, 4], None, "cu_seqlens runs from 1 to 4"),
        ([0, 3], None, "it must rise from 0 to the number of tokens, 4"),
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
    batch = batch_from_mask(mask)
    unpack(pack(x, batch), batch).sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
