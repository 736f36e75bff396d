"""Memory of the extension's calls: aligned, large enough, kept for the next call."""

import numpy as np
import pytest

from fastbert import native
from fastbert.engine import memory

pytestmark = pytest.mark.skipif(native.available() is not None, reason="not built")
HUGE = 2 << 20


@pytest.mark.parametrize("size", [0, 1, 4096, HUGE - 1, HUGE, HUGE + 1, 5 * HUGE + 7])
def test_memory_is_aligned_and_holds_its_size(size):
    found = memory.fresh_bytes(size)
    first = memory.address_of(found.held)
    assert found.start % (HUGE if size >= HUGE else 64) == 0 and found.size >= size
    assert first <= found.start and found.start + found.size == first + found.held.size
    assert len(found.bytes) == found.size and (not size or memory.address_of(found.bytes) == found.start)
    found.bytes[:] = 7  # it may be written to, to its end
    assert (found.held[found.start - first :] == 7).all()


def test_a_workspace_is_kept_where_it_is_large_enough():
    memory.workspace(0)  # what an earlier test has left to the thread, and not kept
    first = memory.workspace(3 * HUGE)
    memory.keep(first)
    second = memory.workspace(HUGE)
    assert second is first
    third = memory.workspace(HUGE)  # the call before has not given its memory back
    assert third is not first
    memory.keep(second)
    larger = memory.workspace(5 * HUGE)  # with its room for the alignment, the first may hold 4
    assert larger is not first and larger.size >= 5 * HUGE
    memory.keep(memory.Memory(np.empty(memory.KEPT + 1, dtype=np.uint8), 0, memory.KEPT + 1))
    assert memory.workspace(64).size < memory.KEPT
