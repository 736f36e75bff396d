"""How each kernel is cut into tiles: pure functions of shape, dtype and architecture.

`architecture` is what `architecture.architecture` says. Where a line was measured it names the GPU and the date;
every other was chosen by counting registers and shared memory, and waits for a GPU. Nothing is tuned at call time.
"""

from __future__ import annotations
