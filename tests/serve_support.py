"""The command `fastbert serve` in a process of its own."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
from support import require_native


@contextmanager
def running(*arguments, env=None):
    """A server's address, its process, and the lines that it has written."""
    require_native()
    command = [sys.executable, "-m", "fastbert", "serve", *arguments, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines, known = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            known.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert known.wait(60), "the server says nothing"
        address = re.search(r"http://\S+", lines[0])
        assert address, lines
        until_ready(address[0], process)
        yield address[0], process, lines
    finally:
        process.kill()
        process.wait()
        reader.join(10)


def until_ready(address, process):
    for _ in range(600):
        assert process.poll() is None, "the server has ended"
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server is not ready after a minute")
