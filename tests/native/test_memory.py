"""Memory of the extension's calls: aligned, large enough, kept for the next call."""

import pytest
import torch

from fastbert import native
from fastbert.native import extension

pytestmark = pytest.mark.skipif(native.available() is not None, reason="not built")
HUGE = 2 << 20


@pytest.mark.parametrize("size", [0, 1, 4096, HUGE - 1, HUGE, HUGE + 1, 5 * HUGE + 7])
def test_memory_is_aligned_and_holds_its_size(size):
    memory = extension.fresh_bytes(size)
    start = extension.start_of(memory)
    assert start % (HUGE if size >= HUGE else 64) == 0
    assert memory.data_ptr() <= start and start + size <= memory.data_ptr() + memory.numel()
    offset = start - memory.data_ptr()
    memory[offset : offset + size] = 7  # it may be written to, to its end
    assert memory[offset : offset + size].eq(7).all()


def test_a_workspace_is_kept_where_it_is_large_enough():
    first, _ = extension.workspace(3 * HUGE)
    extension.keep(first)
    second, start = extension.workspace(HUGE)
    assert second is first and start == extension.start_of(first)
    third, _ = extension.workspace(HUGE)  # the call before has not given its memory back
    assert third is not first
    extension.keep(second)
    larger, start = extension.workspace(5 * HUGE)  # with its room for the alignment, the first may hold 4
    assert larger is not first and start + 5 * HUGE <= larger.data_ptr() + larger.numel()
    extension.keep(torch.empty(extension.KEPT + 1, dtype=torch.uint8))
    fresh, _ = extension.workspace(64)
    assert fresh.numel() < extension.KEPT
