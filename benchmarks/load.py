"""Load on an HTTP server: closed loops of clients, or requests at a rate whatever the answers do; see bench_serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlparse


@dataclass
class Outcome:
    """The results of requests."""

    seconds: float = 0.0  # from the first request to the last answer
    latencies: list[float] = field(default_factory=list)  # of those answered with 200, seconds, from when each was due
    statuses: dict[int, int] = field(default_factory=dict)  # 0: no answer

    @property
    def done(self) -> int:
        return self.statuses.get(200, 0)


class Connection:
    """One kept-alive connection. It is a few lines of its own as a full client takes as long as a small model."""

    def __init__(self, address: str) -> None:
        parts = urlparse(address)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and body of an answer; 0 where there is none."""
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection(self.host, self.port)
            reader, writer = self.streams
            writer.write(request)
            lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines[1:])}
            if b"content-length" in headers:
                answer = await reader.readexactly(int(headers[b"content-length"]))
            else:
                answer = await _chunks(reader)
            if headers.get(b"connection", b"").lower() == b"close":
                self.close()
            return int(lines[0].split(b" ", 2)[1]), answer
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0, b""

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        parts.append(await reader.readexactly(size + 2))
    await reader.readexactly(2)
    return b"".join(part[:-2] for part in parts)


async def closed_loop(
    address: str, path: str, bodies: Sequence[bytes], clients: int, answers: list[bytes] | None = None
) -> Outcome:
    """Each client sends its next request when it has the answer to its last; all bodies once."""
    outcome, following = Outcome(), iter(range(len(bodies)))

    async def client() -> None:
        connection = Connection(address)
        for i in following:
            begun = time.perf_counter()
            status, answer = await connection.post(path, bodies[i])
            _count(outcome, status, time.perf_counter() - begun)
            if answers is not None:
                answers[i] = answer
        connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.seconds = time.perf_counter() - begun
    return outcome


async def open_loop(address: str, path: str, bodies: Sequence[bytes], at: Sequence[float]) -> Outcome:
    """Request i is sent `at` so many seconds, whatever became of the others; a latency counts from then."""
    outcome, free = Outcome(), []

    async def one(i: int, due: float) -> None:
        connection = free.pop() if free else Connection(address)
        status, _ = await connection.post(path, bodies[i])
        _count(outcome, status, time.perf_counter() - due)
        free.append(connection)

    begun, tasks = time.perf_counter(), []
    for i, seconds in enumerate(at):
        await asyncio.sleep(max(0.0, begun + seconds - time.perf_counter()))
        tasks.append(asyncio.create_task(one(i, begun + seconds)))
    await asyncio.gather(*tasks)
    outcome.seconds = time.perf_counter() - begun
    for connection in free:
        connection.close()
    return outcome


def _count(outcome: Outcome, status: int, seconds: float) -> None:
    outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
    if status == 200:
        outcome.latencies.append(seconds)
