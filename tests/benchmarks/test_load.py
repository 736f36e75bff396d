"""benchmarks/load.py: every body is sent, every answer counted, and a latency counts from when a request was due."""

import asyncio

import load
import pytest


class Server:
    """Answers each request after some seconds, with its body, or with what `answers` says."""

    def __init__(self, seconds=0.0, status="200 OK", chunked=False, drop=False):
        self.seconds, self.status, self.chunked, self.drop = seconds, status, chunked, drop
        self.bodies, self.connections, self.busy, self.most = [], 0, 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error):
        self.server.close()

    async def talk(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length"))
                body = await reader.readexactly(length)
                self.bodies.append(body)
                self.busy += 1
                self.most = max(self.most, self.busy)
                await asyncio.sleep(self.seconds)
                self.busy -= 1
                if self.drop:
                    break
                if self.chunked:
                    parts = b"".join(b"%x\r\n%s\r\n" % (1, body[i : i + 1]) for i in range(len(body))) + b"0\r\n\r\n"
                    answer = f"HTTP/1.1 {self.status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + parts
                else:
                    answer = f"HTTP/1.1 {self.status}\r\nContent-Length: {length}\r\n\r\n".encode() + body
                writer.write(answer)
        except asyncio.IncompleteReadError:
            pass
        writer.close()


BODIES = [b"body %d" % i for i in range(20)]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_closed_loop_sends_each_body_once(chunked):
    async def run():
        async with Server(0.01, chunked=chunked) as server:
            answers = [b""] * len(BODIES)
            outcome = await load.closed_loop(server.address, "/x", BODIES, 4, answers)
            return server, outcome, answers

    server, outcome, answers = asyncio.run(run())
    assert sorted(server.bodies) == sorted(BODIES) and answers == BODIES
    assert server.connections == 4 == server.most
    assert outcome.statuses == {200: 20} and outcome.done == 20 and len(outcome.latencies) == 20
    assert 0.05 <= outcome.seconds < 5 and min(outcome.latencies) >= 0.01


def test_an_open_loop_does_not_wait_for_answers():
    async def run():
        async with Server(0.3) as server:
            outcome = await load.open_loop(server.address, "/x", BODIES[:10], [i * 0.01 for i in range(10)])
            return server, outcome

    server, outcome = asyncio.run(run())
    assert server.most == 10 and outcome.done == 10  # all were sent before the first was answered
    assert min(outcome.latencies) >= 0.3 and outcome.seconds < 3


def test_what_is_not_answered_is_counted():
    async def run(**options):
        async with Server(**options) as server:
            return await load.closed_loop(server.address, "/x", BODIES, 2)

    assert asyncio.run(run(status="429 Too Many Requests")).statuses == {429: 20}
    dropped = asyncio.run(run(drop=True))
    assert dropped.statuses == {0: 20} and not dropped.latencies
    nowhere = asyncio.run(load.closed_loop("http://127.0.0.1:9", "/x", BODIES[:2], 1))
    assert nowhere.statuses == {0: 2}
