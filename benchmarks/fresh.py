"""Work done once in a fresh process: its clock, its memory, and the row of what several of them took.

torch is imported first in each, before the clock starts and before memory counts: its own import is no one's here.
What a runtime imports besides is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import machine
import torch
from harness import COLUMNS

# Around the body of a program, which leaves its outcome in `result`. sys.argv[1] is the number of threads.
FRAME = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[1]))

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3

before, begin = memory("VmRSS:"), time.perf_counter()
{body}
taken = time.perf_counter() - begin
print(json.dumps({{"seconds": taken, "before_mb": before, "peak_mb": memory("VmHWM:"), "result": result}}))
"""


def run(body: str, *arguments: object) -> dict[str, Any]:
    """The figures that the program printed: seconds, before_mb (with torch imported), peak_mb and its result.

    Raises:
        RuntimeError: it failed; the message is the last line of its error output.
    """
    command = [sys.executable, "-c", FRAME.format(body=body), str(torch.get_num_threads()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def row(**columns: Any) -> dict[str, Any]:
    """A result row of a fresh process."""
    stamp = {"date": machine.now(), "mode": "fresh process"}
    return {**dict.fromkeys(COLUMNS), **stamp, **machine.environment(torch.device("cpu")), **columns}
