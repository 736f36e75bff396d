"""A minute of too much: `fastbert serve` with 200 clients, more texts than it can answer, and clients that break off,
read slowly, or send no JSON."""

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from load import Connection
from serve_support import running

from fastbert.light import TextEmbedder

CLIENTS, SECONDS, GROWTH_MB = 200, 60, 16
GARBAGE = [b"{", b"[" * 50000, b"\xff" * 1000, b'{"inputs": 3}', b'{"inputs":"' + b"a" * 10_000_000 + b'"}']


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1e3


class Load:
    """Clients of every kind until the time is over, and what they saw."""

    def __init__(self, address: str, pid: int, texts: list[str], vectors: np.ndarray) -> None:
        self.address, self.pid, self.texts, self.vectors = address, pid, texts, vectors
        self.rng, self.statuses, self.wrong = random.Random(0), Counter(), []
        self.memory: list[float] = []
        self.left = True

    async def client(self) -> None:
        """One that waits for its answer, and comes back later where it is told to."""
        connection = Connection(self.address)
        while self.left:
            i = self.rng.randrange(len(self.texts))
            status, answer = await connection.post("/embed", json.dumps({"inputs": self.texts[i]}).encode())
            self.statuses[status] += 1
            if status == 200 and np.abs(np.array(json.loads(answer)[0]) - self.vectors[i]).max() > 1e-6:
                self.wrong.append(self.texts[i])
            if status == 429:
                await asyncio.sleep(self.rng.random() * 2)
        connection.close()

    async def send(self, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = httpx.URL(self.address)
        reader, writer = await asyncio.open_connection(parts.host, parts.port)
        writer.write(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return reader, writer

    async def vanishing(self) -> None:
        while self.left:
            _, writer = await self.send(json.dumps({"inputs": self.rng.choices(self.texts, k=20)}).encode())
            await asyncio.sleep(self.rng.random() * 0.05)
            writer.close()
            await asyncio.sleep(0.3)

    async def slow(self) -> None:
        while self.left:
            reader, writer = await self.send(json.dumps({"inputs": self.texts[:50]}).encode())
            for _ in range(20):
                await reader.read(100)
                await asyncio.sleep(0.2 * self.left)
            writer.close()

    async def garbage(self) -> None:
        while self.left:
            reader, writer = await self.send(self.rng.choice(GARBAGE))
            try:
                line = await asyncio.wait_for(reader.readline(), 10)
                self.statuses["garbage", line.split(b" ")[1][:1] if line else b""] += 1
            except ConnectionError:  # ended before the body was read
                self.statuses["garbage", b""] += 1
            writer.close()
            await asyncio.sleep(0.1)

    async def watch(self) -> None:
        for _ in range(SECONDS):
            await asyncio.sleep(1)
            self.memory.append(resident_mb(self.pid))
        self.left = False

    async def run(self) -> None:
        several = [self.client] * CLIENTS + [self.vanishing, self.slow] * 5 + [self.garbage] * 3
        await asyncio.gather(self.watch(), *(one() for one in several))


@pytest.mark.slow
def test_a_minute_of_too_much(minilm):
    rng = random.Random(0)
    words = [word for word in Path(__file__).read_text().split() if word.isalpha()]
    texts = [" ".join(["secretword", *rng.choices(words, k=rng.randint(1, 40))]) for _ in range(400)]
    vectors = TextEmbedder.from_pretrained(minilm, quantize="int8").embed(texts, normalize=True)
    options = ("--quantize", "int8", "--max-queue-tokens", "8000")
    with running(str(minilm), *options, env={"OMP_NUM_THREADS": str(os.cpu_count())}) as (address, process, lines):
        load = Load(address, process.pid, texts, vectors)
        asyncio.run(load.run())
        print(dict(load.statuses), f"{load.memory[9]:.0f} to {load.memory[-1]:.0f} MB")
        assert not load.wrong, load.wrong[:3]
        answers = {status for status in load.statuses if isinstance(status, int)}
        assert answers == {200, 429}, load.statuses  # none lost, none failed; some refused
        assert {kind for _, kind in (status for status in load.statuses if isinstance(status, tuple))} <= {b"4", b""}
        assert load.memory[-1] - load.memory[9] <= GROWTH_MB
        assert httpx.post(f"{address}/embed", json={"inputs": texts[0]}).status_code == 200
        process.terminate()
        assert process.wait(30) == 0
        assert not [line for line in lines if "secretword" in line]
