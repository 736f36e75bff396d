"""Signals during long C++ calls, for native/test_interrupt.py: prints what happened as JSON."""

import json
import os
import signal
import threading
import time

import torch

from fastbert import native, ops

WIDTH, INNER, BEFORE = 256, 1024, 0.1


def layer():
    def product(rows, columns):
        return ops.Weight([torch.randn(rows, columns) / columns**0.5], [torch.randn(rows) / 10])

    norm = torch.ones(WIDTH), torch.zeros(WIDTH)
    attention = product(3 * WIDTH, WIDTH), product(WIDTH, WIDTH), norm
    feed_forward = product(INNER, WIDTH), product(WIDTH, INNER), norm
    return ops.LayerWeights(*attention, *feed_forward, num_heads=4, activation="gelu", eps=1e-12, precision=None)


# Also where SIGINT is ignored from the start, as in a shell's background jobs.
signal.signal(signal.SIGINT, signal.default_int_handler)
LAYER, X = layer(), torch.randn(2048, WIDTH)
STACKS = {layers: ops.EncoderWeights([LAYER] * layers) for layers in (1, 10, 16, 200)}


def encoder(layers, x=X):
    with torch.no_grad():
        return native.encoder(x, STACKS[layers], torch.arange(0, len(x) + 1, 128, dtype=torch.int32), 128)


def long_encoder():
    """1,200 GFLOP; the call with few tokens packs the weights and makes the plan, so that C++ begins at once."""
    encoder(200, X[:128])
    return lambda: encoder(200)


def long_linear():
    """One product of 2,200 GFLOP, its weight packed."""
    x, weight = torch.randn(64, 65536), torch.randn(256, 65536)
    rows = x.as_strided((65536, 65536), (0, 1))
    weight = ops.Weight([weight], [None])
    native.linear(rows[:1], weight)
    return lambda: native.linear(rows, weight)


def long_linear_backward():
    """550 GFLOP, 34 in one piece."""
    x, dy, weight = torch.ones(8192, 4096), torch.ones(8192, 4096), ops.Weight([torch.ones(4096, 4096)], [None])
    return lambda: native.linear_bwd(dy, x, weight, None, None, (True, True, True))


def long_attention_backward():
    """32 tasks over 2,048 tokens each; what the forward would have saved is of no account here."""
    qkv, y, statistics = torch.randn(16384, 3, 4, 64), torch.randn(16384, 4, 64), torch.ones(2, 4, 16384)
    offsets = torch.arange(0, 16385, 2048, dtype=torch.int32)
    constants = {"scale": None, "dropout_p": 0.0, "seed": 0}
    return lambda: native.attention_bwd(y, qkv, offsets, y, statistics, **constants)


def long_cross_entropy():
    """500 GFLOP."""
    x, weight = torch.randn(2048, 1024, requires_grad=True), torch.full((30_000, 1024), 0.01, requires_grad=True)
    labels = torch.randint(0, 30_000, (2048,))
    return lambda: ops.linear_cross_entropy(x, weight, None, labels).backward()


LONG = {
    "encoder": long_encoder,
    "linear": long_linear,
    "linear backward": long_linear_backward,
    "attention backward": long_attention_backward,
    "cross entropy": long_cross_entropy,
}


def signalled(call, number=signal.SIGINT):
    """What `call` returned or raised, and the times of the signal, BEFORE seconds after the call began, and the end."""
    times = []

    def send():
        times.append(time.monotonic())
        os.kill(os.getpid(), number)

    timer = threading.Timer(BEFORE, send)
    timer.start()
    try:
        result = call()
    except BaseException as raised:
        result = raised
    ended = time.monotonic()
    timer.join()
    return result, times[0], ended


def interrupted(wanted):
    seen, right = {name: {} for name in LONG}, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, prepare in LONG.items():
            raised, sent, ended = signalled(prepare())
            seen[name][threads] = type(raised).__name__, ended - sent
            right.append(torch.equal(encoder(1), wanted))
    return seen, right


def handled(threads):
    """A handler that returns, and on its way calls the encoder and a backward, whose memory threads keep."""
    torch.set_num_threads(threads)
    short, ran = X[:256] * 2, []
    begun = time.monotonic()
    wanted, wanted_short = encoder(16), encoder(1, short)
    seconds = time.monotonic() - begun

    def handler(number, frame):
        ran.append((time.monotonic(), encoder(1, short)))

    signal.signal(signal.SIGUSR1, handler)
    got, sent, _ = signalled(lambda: encoder(16), signal.SIGUSR1)
    return {
        "ran early": len(ran) == 1 and ran[0][0] - sent < seconds / 2,
        "call equal": torch.equal(got, wanted),
        "call in the handler equal": torch.equal(ran[0][1], wanted_short),
    }


def raises_another():
    def handler(number, frame):
        raise LookupError("from the handler")

    signal.signal(signal.SIGUSR1, handler)
    raised, *_ = signalled(long_encoder(), signal.SIGUSR1)
    return f"{type(raised).__name__}: {raised}"


def in_another_thread(wanted):
    results, done = [], threading.Event()

    def run():
        results.append(encoder(10))
        done.set()

    threading.Thread(target=run).start()
    raised, *_ = signalled(done.wait)
    done.wait()
    return {"raised in main": type(raised).__name__, "call equal": torch.equal(results[0], wanted)}


torch.set_num_threads(1)
seen, right = interrupted(encoder(1))
print(
    json.dumps(
        {
            "interrupted": seen,
            "right afterwards": right,
            "handled": {threads: handled(threads) for threads in (1, 2)},
            "another exception": raises_another(),
            "another thread": in_another_thread(encoder(10)),
        }
    )
)
