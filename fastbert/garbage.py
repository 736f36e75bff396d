"""Python's garbage collector, at rest while something is loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Within it nothing is collected in this process, unless the collector is at rest anyway.

    Loading makes thousands of objects that stay. Counting them, Python would go over all that torch has made, a tenth
    of a second, as long as all the rest takes for a small model, and find nothing to free.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
