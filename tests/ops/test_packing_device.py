"""Packing without the host: the tensors say what fastbert.packing says, in shapes that do not depend on the mask."""

import pytest
import torch
from support import MASKS, mask_of

import fastbert
from fastbert import native, ops
from fastbert.ops.packing import read_mask_at_once
from fastbert.packing import batch_from_mask, pack, unpack

CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not CUDA, reason="no GPU")
BACKENDS = [
    pytest.param("reference", "cpu"),
    pytest.param("reference", "cuda", marks=gpu),
    pytest.param("native", "cuda", marks=gpu),
]
DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool)


def masks():
    """The masks of every kind, and random ones whose sizes meet the borders of warps and tiles."""
    generator = torch.Generator().manual_seed(0)
    found = {kind: mask_of(kind) for kind in MASKS if kind != "absent"}
    for shape in ((1, 1), (1, 63), (111, 1), (7, 1000), (1, 8192), (3, 8193), (33, 513), (1000, 17)):
        found[f"random {shape}"] = (torch.rand(shape, generator=generator) < 0.6).long()
    lengths = torch.randint(0, 513, (64, 1), generator=generator)
    found["lengths"] = (torch.arange(512) < lengths).long()
    found["all zeros"] = torch.zeros(40, 300, dtype=torch.long)
    found["all ones"] = torch.ones(40, 300, dtype=torch.long)
    return found


@pytest.fixture(params=masks())
def mask(request):
    return masks()[request.param]


def check(found, mask):
    """`found` of pack_mask against fastbert.packing."""
    cu_seqlens, indices, places, bad = (t.cpu() for t in found)
    batch = batch_from_mask(mask)
    tokens = int(batch.cu_seqlens[-1])
    assert [t.dtype for t in (cu_seqlens, indices, places, bad)] == [torch.int32, torch.int64, torch.int64, torch.int32]
    assert indices.shape == places.shape == (mask.numel(),) and bad.tolist() == [0]
    assert torch.equal(cu_seqlens, batch.cu_seqlens)
    expected = torch.arange(mask.numel()) if batch.indices is None else batch.indices
    assert torch.equal(indices[:tokens], expected)
    assert (indices[tokens:] == -1).all()
    numbers = torch.arange(tokens)
    assert torch.equal(places.view(mask.shape), unpack(numbers, batch, fill=-1))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_says_what_packing_says(backend, device, dtype, mask):
    with fastbert.use_backend(backend, "pack_mask"):
        given = mask.to(device, dtype)
        before = given.clone()
        found, again = ops.pack_mask(given), ops.pack_mask(given)
    check(found, mask)
    assert torch.equal(given, before)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_there_and_back(backend, device, mask):
    """Rows of every width, of 1 to 16 bytes a load, and one whose rows are apart."""
    batch = batch_from_mask(mask)
    with fastbert.use_backend(backend, "pack_mask", "gather_rows"):
        _, indices, places, _ = ops.pack_mask(mask.to(device))
        for x in (
            torch.randint(0, 99, mask.shape),
            torch.randn(*mask.shape, 6),
            torch.randn(*mask.shape, 3).half(),
            torch.randn(*mask.shape, 5) > 0,
            torch.randn(*mask.shape, 40).bfloat16()[..., :32],
        ):
            flat = x.to(device).flatten(0, 1)
            packed = ops.gather_rows(flat, indices)
            tokens = int(batch.cu_seqlens[-1])
            assert torch.equal(packed[:tokens].cpu(), pack(x, batch))
            assert not packed[tokens:].any()
            returned = ops.gather_rows(packed, places).view(x.shape)
            assert torch.equal(returned.cpu(), unpack(pack(x, batch), batch))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_nothing(backend, device, shape):
    with fastbert.use_backend(backend, "pack_mask", "gather_rows"):
        cu_seqlens, indices, places, bad = ops.pack_mask(torch.ones(shape, dtype=torch.long, device=device))
        assert cu_seqlens.tolist() == [0] * (shape[0] + 1) and bad.tolist() == [0]
        assert indices.shape == places.shape == (0,)
        assert ops.gather_rows(torch.ones(4, 3, device=device), indices).shape == (0, 3)
        gone = ops.gather_rows(torch.ones(0, 3, device=device), torch.tensor([0, -1], device=device))
        assert torch.equal(gone.cpu(), torch.zeros(2, 3))


def test_a_batch_is_read_with_one_wait(mask):
    device = "cuda" if CUDA else "cpu"
    mine, theirs = read_mask_at_once(mask.to(device)), batch_from_mask(mask)
    for name in ("batch_size", "seq_len", "max_seqlen", "leading_pads"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert torch.equal(mine.cu_seqlens.cpu(), theirs.cu_seqlens)
    assert (mine.indices is None) == (theirs.indices is None)
    assert mine.indices is None or torch.equal(mine.indices.cpu(), theirs.indices)
    lengths = mask.sum(1)
    assert mine.leading_pads == any(row[0] == 0 and n for row, n in zip(mask.tolist(), lengths.tolist(), strict=True))
    assert read_mask_at_once(torch.full((2, 3), 7, device=device)) is None


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("value", [2, -1, 1 << 40, 255])
@pytest.mark.parametrize("at", [(0, 0), (2, 6), (2, 7), (900, 13)])
def test_other_values_are_told_and_count_as_pads(backend, device, value, at):
    mask = torch.ones(901 if at[0] == 900 else 3, 14 if at[0] == 900 else 8, dtype=torch.long)
    mask[at] = value
    with fastbert.use_backend(backend, "pack_mask"):
        *found, bad = ops.pack_mask(mask.to(device))
    assert bad.tolist() == [1]
    mask[at] = 0
    check([*found, torch.zeros_like(bad)], mask)


def test_nan_in_a_mask_is_told():
    mask = torch.ones(2, 3)
    mask[1, 2] = float("nan")
    assert ops.pack_mask(mask)[3].tolist() == [1]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_an_index_outside_reads_nothing(backend, device):
    x = torch.arange(6.0, device=device).view(3, 2) + 1
    index = torch.tensor([2, -1, 3, 1 << 40, 0, -(1 << 40)], device=device)
    with fastbert.use_backend(backend, "gather_rows"):
        assert ops.gather_rows(x, index).tolist() == [[5, 6], [0, 0], [0, 0], [0, 0], [1, 2], [0, 0]]


def test_fill_and_gradient():
    x = torch.randn(3, 2, requires_grad=True)
    y = ops.gather_rows(x, torch.tensor([1, -1, 1]), fill=-5.0)
    assert y[1].tolist() == [-5, -5]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.tolist() == [[0, 0], [2, 2], [0, 0]]


def test_reasons():
    mask = torch.ones(2, 3, dtype=torch.long)
    assert native.supports_pack_mask(mask) in (native.available(), "device cpu")
    with pytest.raises(ValueError, match=r"pack_mask: mask has shape \(3,\); it must be \(\*, \*\)"):
        ops.pack_mask(torch.ones(3))


@gpu
def test_reasons_on_a_gpu():
    mask = torch.ones(2, 3, device="cuda")
    assert native.supports_pack_mask(mask) == "dtype torch.float32"
    assert native.supports_gather_rows(mask, torch.tensor([0], device="cuda"), fill=1.0) == "it fills with zeros only"
    assert native.supports_gather_rows(mask.mT, torch.tensor([0], device="cuda")) == "rows not contiguous"


@gpu
def test_nobody_waits_for_the_device(mask):
    """torch's own guard raises where an op synchronises; a graph could not hold such an op either."""
    given = mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in ("native", "reference"):
            with fastbert.use_backend(backend, "pack_mask", "gather_rows"):
                _, indices, places, _ = ops.pack_mask(given)
                ops.gather_rows(ops.gather_rows(given.flatten(), indices), places)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_beyond_2_to_the_31_bytes():
    """Row numbers times row bytes do not fit 32 bits."""
    x = torch.zeros(1 << 21, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    last = torch.full((1 << 21,), len(x) - 1, device="cuda")
    with fastbert.use_backend("native", "gather_rows"):
        assert (ops.gather_rows(x, last) == 1).all()


def test_every_cuda_file_is_compiled():
    """A build with nvcc has these functions; without one it says so."""
    if native.available():
        pytest.skip(native.available())
    assert hasattr(native.extension.C, "pack_mask_cuda") == native.has_cuda()
    assert hasattr(native.extension.C, "gather_rows_cuda") == native.has_cuda()
