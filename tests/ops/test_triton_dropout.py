"""The dropout mask that the kernels share: its share, its independence, its repetition."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_support import (
    COMPILED,
    DEVICE,
    check_resources,
    compiles,
    compiling_for,
    runs,
)

from fastbert.kernels import dropout


@triton.jit
def _mask_kernel(mask_ptr, seed_ptr, plane, threshold, first, M: tl.constexpr, N: tl.constexpr):
    seed = tl.load(seed_ptr)
    rows = first + tl.arange(0, M).to(tl.int64)
    columns = tl.arange(0, N)
    keep = dropout.kept(
        dropout.row_keys(seed, rows, plane)[:, None], dropout.column_keys(seed, columns)[None, :], threshold
    )
    tl.store(mask_ptr + tl.arange(0, M)[:, None] * N + columns[None, :], keep)


def mask(p, seed=0, *, plane=0, first=0, M=512, N=512, device=DEVICE):
    out = torch.empty((M, N), dtype=torch.bool, device=device)
    seed = torch.tensor([seed], dtype=torch.int64, device=device)
    _mask_kernel[(1,)](out, seed, plane, dropout.threshold(p), first, M=M, N=N)
    return out.float()


@runs
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_kept(p):
    keep = mask(p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / 512
    for of_lines in (keep.mean(0), keep.mean(1)):  # every row and column by itself, as a binomial's spread says
        assert (of_lines - (1 - p)).abs().max() < 6 * sigma / 512**0.5
        assert 0.7 < of_lines.std() / (sigma / 512**0.5) < 1.3


@runs
def test_rows_columns_planes_and_seeds_are_independent():
    centred = mask(0.5) - 0.5
    for other in (mask(0.5, 1), mask(0.5, plane=1), mask(0.5, first=512), mask(0.5).T, mask(0.5, 2**40)):
        assert (centred * (other - 0.5)).mean().abs() < 5 * 0.25 / 512
    for correlation in (centred @ centred.T, centred.T @ centred):
        off_diagonal = correlation - correlation.diag().diag()
        assert off_diagonal.abs().max() < 7 * 0.25 * 512**0.5
    # An exclusive or of keys makes rectangles suspicious: the parity of their four corners must be even half the time.
    corners = centred[:256, :256] * centred[256:, :256] * centred[:256, 256:] * centred[256:, 256:]
    assert (corners * 16).mean().abs() < 5 / 256


@runs
def test_any_window_of_it_is_the_same():
    assert torch.equal(mask(0.3)[128:256, :64], mask(0.3, first=128, M=128, N=64))
    assert torch.equal(mask(0.3, 7), mask(0.3, 7))
    assert not torch.equal(mask(0.3, 7), mask(0.3, 8))
    assert mask(0.0).all()


@runs
def test_seeds_repeat_with_torchs():
    torch.manual_seed(3)
    first = dropout.draw_seed(torch.device(DEVICE))
    torch.manual_seed(3)
    assert torch.equal(first, dropout.draw_seed(torch.device(DEVICE)))
    assert not torch.equal(first, dropout.draw_seed(torch.device(DEVICE)))


@compiles
@pytest.mark.parametrize("target", COMPILED)
def test_compiles(target):
    with compiling_for(target) as compiled:
        mask(0.1, M=64, N=64, device="cpu")
    check_resources(compiled[0])
