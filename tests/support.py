"""What several test files use: small models, masks of every kind, and the accuracy contract."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbert import native
from fastbert.native import extension

TINY = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MASKS = {
    "absent": None,
    "ones": [[1] * 8, [1] * 8, [1] * 8],
    "right": [[1] * 8, [1] * 3 + [0] * 5, [1] + [0] * 7],
    "left": [[1] * 8, [0] * 5 + [1] * 3, [0] * 7 + [1]],
    "holes": [[1, 0, 1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1, 1, 0], [1] * 8],
    "zeros": [[1] * 5 + [0] * 3, [0] * 8, [1] * 8],
}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out is NaN or the largest integer, and bytes of numpy are 255: what no one wrote shows.

    (To replace torch.empty would outlast the test: the first torch.device of a process tables what is there.)
    """

    def filled(*args: Any, **options: Any) -> np.ndarray:
        x = empty(*args, **options)
        if x.dtype == np.uint8:
            x.fill(255)
        return x

    empty = np.empty
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it, by torch.utils.deterministic
    try:
        with mock.patch.object(np, "empty", filled):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def mask_of(kind: str) -> Tensor | None:
    return None if MASKS[kind] is None else torch.tensor(MASKS[kind])


def tokens(batch: int = 3, length: int = 8, vocab: int = 120) -> Tensor:
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


DRAWS = 4


def assert_accurate(
    got: Tensor, eager: Tensor, exact: Tensor, what: str = "", inherent: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Holds `got` to the accuracy contract, see `accuracy.limits`; `exact` is in fp64."""
    from accuracy import complaint, limits  # of benchmarks/, which drivers of tests do not have on their path

    assert got.dtype == eager.dtype, (what, got.dtype, eager.dtype)
    reason = complaint(got, exact, limits(exact, eager, inherent))
    assert reason is None, f"{what}: {reason}"


def floor_of_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The error, in max and RMS, of a @ b whose first factor comes of some roundings: two eps of each element of it.

    For `inherent` of `assert_accurate` where the products cancel: what eager's error is there, is its luck.
    """
    bound = 2 * torch.finfo(dtype).eps * (a.detach().double().abs() @ b.detach().double().abs())
    return float(bound.max()), float(bound.pow(2).mean().sqrt())


def score_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> Tensor:
    """The gradient of attention's scores before `scale`, exact: (..., S, D) of each -> (..., S, S)."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    p = torch.softmax(q @ k.mT * scale, -1)
    dp = dout @ v.mT
    return scale * p * (dp - (p * dp).sum(-1, keepdim=True))


def floors_of_rounding(compute, inputs: list, exact: list, dtype: torch.dtype) -> list[tuple[float, float]]:
    """The errors, in max and RMS, of what `compute` makes in fp64 of inputs each rounded once, by eps / 2 of itself.

    For `inherent` of `assert_accurate` in fp32, where eager's error can be far below what its formula promises; the
    largest of `DRAWS` draws of the signs. None among inputs and results stays.
    """
    from accuracy import differences

    floors, generator = [(0.0, 0.0)] * len(exact), torch.Generator().manual_seed(0)
    for _ in range(DRAWS if dtype == torch.float32 else 0):
        signs = [None if x is None else torch.randint(0, 2, x.shape, generator=generator) * 2 - 1 for x in inputs]
        scales = [None if s is None else 1 + torch.finfo(dtype).eps / 2 * s for s in signs]
        drawn = compute([x if s is None else x * s.to(x.device) for x, s in zip(inputs, scales, strict=True)])
        errors = [(0.0, 0.0) if x is None else differences(y, x) for x, y in zip(exact, drawn, strict=True)]
        floors = [tuple(map(max, floor, error)) for floor, error in zip(floors, errors, strict=True)]
    return floors


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_op_accurate(
    op, naive, inputs: dict[str, Tensor], dtype: torch.dtype, backward=True, slack=None, **kwargs
) -> None:
    """Forward and every gradient of `op` by the contract, and that it changes no input and repeats bit for bit.

    `naive` is the same mathematics in eager PyTorch; in fp64 it is the truth. Eager's error is that of one thread: with
    more, torch adds up partial sums, which round less, by as much as the number of threads happens to be.

    In fp32 eager's error can be far below what its formula promises: which instructions torch was built for, or takes,
    decides how its products round. So the contract has a floor there: the error of a result computed exactly from
    inputs, dy included, each of which was rounded once, by eps / 2 of itself; the largest of `DRAWS` draws of the
    signs. `slack` adds to the floor of a result by name where its formula cancels in between.
    """

    def run(function, dtype, signs=None):
        rounded = lambda x: x if signs is None else x * (1 + unit * signs(x))  # noqa: E731
        leaves = {
            name: rounded(x.to(dtype).detach()).requires_grad_(backward) if x.is_floating_point() else x
            for name, x in inputs.items()
        }
        out = function(**leaves, **kwargs)
        if not backward:
            return {"out": out}
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
        weight = rounded(weight)
        floats = {name: x for name, x in leaves.items() if x.is_floating_point()}
        grads = torch.autograd.grad((out * weight).sum(), floats.values(), allow_unused=True)
        return {"out": out.detach(), **{f"d{name}": g for name, g in zip(floats, grads, strict=True)}}

    def inherent(name):
        errors = [draw[name] - exact[name] for draw in draws if exact[name].numel()]
        largest = max((float(error.abs().max()) for error in errors), default=0.0)
        root_mean = max((float(error.pow(2).mean().sqrt()) for error in errors), default=0.0)
        more = (slack or {}).get(name, 0.0) if dtype == torch.float32 else 0.0
        return largest + more, root_mean + more

    unit = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(0)
    signs = lambda x: torch.randint(0, 2, x.shape, generator=generator) * 2 - 1  # noqa: E731
    before = {name: x.clone() for name, x in inputs.items()}
    got, again = run(op, dtype), run(op, dtype)
    with one_thread():
        eager = run(naive, dtype)
    exact = run(naive, torch.float64)
    draws = [run(naive, torch.float64, signs) for _ in range(DRAWS if dtype == torch.float32 else 0)]
    for name, value in got.items():
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_accurate(value, eager[name], exact[name], name, inherent(name))
        assert torch.equal(value, again[name]), f"{name} differs on a repeat"
    assert all(torch.equal(x, before[name]) for name, x in inputs.items()), "an input was changed"


ISAS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable", "amx_emulated")
if platform.machine() in ("aarch64", "arm64"):
    ISAS = ("neon_bf16", "neon_dot", "neon", "portable")


def require_native() -> None:
    """Skips, or fails where FASTBERT_REQUIRE_NATIVE says that there must be an extension."""
    reason = native.available()
    if reason and os.environ.get("FASTBERT_REQUIRE_NATIVE"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def force_isa(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTBERT_ISA", name)
    extension.chosen_isa.cache_clear()
