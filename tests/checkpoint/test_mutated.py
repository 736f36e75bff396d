"""Mutated checkpoints load right or are refused in one error that names a file; see mutated_checkpoints.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory by /proc")


@pytest.mark.parametrize("cases", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_checkpoints(cases):
    script = Path(__file__).parents[1] / "mutated_checkpoints.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, str(cases)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    loaded, refused = (int(re.search(rf"'{name}': (\d+)", done.stdout)[1]) for name in ("loaded", "refused"))
    assert loaded + refused >= cases and min(loaded, refused) > cases / 5, done.stdout
