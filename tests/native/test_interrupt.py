"""Signals during a C++ call that lasts: handlers run while it does, and one that raises ends it.

All calls are those of one process of its own (`native_interrupt_script.py`), which tells what it saw.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import require_native

SCRIPT = Path(__file__).parents[1] / "native_interrupt_script.py"
SECONDS = 2.5  # from the signal to the end of the call; each call would take longer than that on one core


@pytest.fixture(scope="module")
def seen():
    require_native()
    run = subprocess.run([sys.executable, SCRIPT], env=os.environ, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("call", ["encoder", "linear", "linear backward", "attention backward", "cross entropy"])
def test_ctrl_c_ends_the_call(seen, call, threads):
    raised, seconds = seen["interrupted"][call][threads]
    assert raised == "KeyboardInterrupt" and seconds < SECONDS


def test_results_are_right_after_a_stopped_call(seen):
    assert seen["right afterwards"] == [True] * 10


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_handler_that_returns_changes_nothing(seen, threads):
    """It runs in the first half of the call, and calls the encoder itself."""
    found = seen["handled"][threads]
    assert found == {"ran early": True, "call equal": True, "call in the handler equal": True}


def test_what_a_handler_raises_comes_out(seen):
    assert seen["another exception"] == "LookupError: from the handler"


def test_a_call_in_another_thread_goes_on(seen):
    """Handlers run on the main thread, which waits for it."""
    assert seen["another thread"] == {"raised in main": "KeyboardInterrupt", "call equal": True}
