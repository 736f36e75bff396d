"""Each op on each backend that runs here, at BERT-base shapes: forward, backward, and both as a step.

    pytest benchmarks/bench_ops.py                                   # all of them
    pytest benchmarks/bench_ops.py -k "attention and bf16" --benchmark-json ops.json

The default test run does not collect this file. Results are held to the reference in fp64 before they are
timed. A backend that refuses a call is skipped with its reason. `extra_info` in the JSON has TFLOP/s and GB/s
with their share of the machine's peak and of a copy; bytes count each operand once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import machine
import pytest
import torch
import torch.nn.functional as F
from harness import exact_gate, twice_eager_gate
from torch import Tensor
from workload import log_normal_lengths

import fastbert
from fastbert import ops, reference
from fastbert.ops import dispatch

DEVICE = machine.pick_device()
DTYPES = ("fp32", "bf16")
# BERT-base; 16 texts with log-normal lengths, mean 50, longest 256.
E, FFN, H, V, P = 768, 3072, 12, 30522, 512
LENGTHS = log_normal_lengths(16)
T = sum(LENGTHS)


@dataclass
class Call:
    """One op's arguments, its reference, and the FLOPs it needs at least."""

    run: Callable[..., Any]
    plain: Callable[..., Any]  # the reference, with every argument explicit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flops: float
    gathers: bool = False  # reads T rows of its tables, not the tables

    def cast(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(cast(x, dtype) for x in self.args)


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, ops.Weight):
        return ops.Weight(cast(x.weights, dtype), cast(x.biases, dtype))
    if isinstance(x, ops.EncoderWeights):
        return ops.EncoderWeights([cast(layer, dtype) for layer in x.layers])
    if isinstance(x, ops.LayerWeights):
        return ops.LayerWeights(*(cast(part, dtype) for part in x))
    if isinstance(x, tuple):
        return tuple(cast(part, dtype) for part in x)
    return x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, ops.Weight):
        return list(x.tensors)
    parts = x.layers if isinstance(x, ops.EncoderWeights) else x
    return [t for part in parts for t in tensors(part)] if isinstance(parts, list | tuple) else []


def differentiable(x: Any) -> list[Tensor]:
    """The floating-point tensors of arguments, asked for a gradient."""
    return [t.requires_grad_() for t in tensors(x) if t.is_floating_point()]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE) * scale


def ids(limit: int) -> Tensor:
    return torch.randint(0, limit, (T,), device=DEVICE)


def layer() -> ops.LayerWeights:
    def linear(out: int, width: int) -> ops.Weight:
        return ops.Weight([normal(out, width, scale=0.02)], [normal(out, scale=0.02)])

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + normal(E, scale=0.02), normal(E, scale=0.02)

    return ops.LayerWeights(
        *(linear(3 * E, E), linear(E, E), norm(), linear(FFN, E), linear(E, FFN), norm()),
        num_heads=H,
        activation="gelu",
        eps=1e-12,
    )


def plain_linear(x: Tensor, weight: ops.Weight, activation: str | None) -> Tensor:
    return reference.linear(x, *weight.stacked(), activation=activation)


def plain_encoder(x: Tensor, weights: ops.EncoderWeights, cu_seqlens: Tensor, longest: int) -> Tensor:
    with fastbert.use_backend("reference"):
        return ops.encoder(x, weights, cu_seqlens, longest)


def make_call(name: str) -> Call:
    """The arguments of an op in fp32, by the benchmark's name for it."""
    torch.manual_seed(0)
    cu_seqlens = F.pad(torch.tensor(LENGTHS, device=DEVICE).cumsum(0), (1, 0)).int()
    pairs, longest = sum(n * n for n in LENGTHS), max(LENGTHS)
    vectors = (1 + normal(E, scale=0.02), normal(E, scale=0.02))
    norm = {"eps": 1e-12, "dropout_p": 0.0}
    if name == "embed_layer_norm":
        tables = (normal(V, E, scale=0.02), normal(2, E, scale=0.02), normal(P, E, scale=0.02))
        args = (ids(V), ids(2), ids(P), *tables, *vectors)
        return Call(ops.embed_layer_norm, reference.embed_layer_norm, args, norm, 10.0 * T * E, gathers=True)
    if name.startswith("linear_") and name != "linear_cross_entropy":
        out, width, activation = {
            "linear_qkv": (3 * E, E, None),
            "linear_up_gelu": (FFN, E, "gelu"),
            "linear_down": (E, FFN, None),
        }[name]
        weight = ops.Weight([normal(out, width, scale=0.02)], [normal(out, scale=0.02)])
        args = (normal(T, width), weight)
        return Call(ops.linear, plain_linear, args, {"activation": activation}, 2.0 * T * out * width)
    if name == "attention":
        args = (normal(T, 3, H, E // H), cu_seqlens, longest)
        return Call(ops.attention, reference.attention, args, {}, 4.0 * E * pairs)
    if name == "add_layer_norm":
        args = (normal(T, E), normal(T, E), *vectors)
        return Call(ops.add_layer_norm, reference.add_layer_norm, args, norm, 8.0 * T * E)
    if name == "linear_cross_entropy":
        args = (normal(T, E), normal(V, E, scale=0.02), normal(V, scale=0.02), ids(V))
        return Call(ops.linear_cross_entropy, reference.linear_cross_entropy, args, {}, 2.0 * T * E * V)
    args = (normal(T, E), ops.EncoderWeights([layer(), layer()]), cu_seqlens, longest)
    flops = 2 * (2.0 * T * (4 * E * E + 2 * E * FFN) + 4.0 * E * pairs)
    return Call(ops.encoder, plain_encoder, args, {}, flops)


OPS = {
    "embed_layer_norm": "embed_layer_norm",
    "linear_qkv": "linear",
    "linear_up_gelu": "linear",
    "linear_down": "linear",
    "attention": "attention",
    "add_layer_norm": "add_layer_norm",
    "linear_cross_entropy": "linear_cross_entropy",
    "encoder": "encoder",
}
FORWARDS = [(name, b) for name, op in OPS.items() for b in dispatch.TABLE[op].get(DEVICE.type, ("reference",))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "chosen"), FORWARDS)
@torch.inference_mode()
def test_forward(benchmark: Any, name: str, chosen: str, dtype: str) -> None:
    call = make_call(name)
    args = call.cast(machine.DTYPES[dtype])
    with fastbert.use_backend(chosen, OPS[name]):
        try:
            actual = call.run(*args, **call.kwargs)
        except fastbert.BackendError as reason:
            pytest.skip(str(reason))
        check(call, args, actual)

        def run() -> Tensor:
            result = call.run(*args, **call.kwargs)
            machine.synchronize(DEVICE)
            return result

        benchmark.group = f"{name} {dtype} forward"
        benchmark(run)
    touched = [actual] * 4 if call.gathers else tensors([*args, actual])
    note_figures(benchmark, call.flops, touched, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "chosen"), [(n, b) for n, b in FORWARDS if n != "encoder"])  # that is for inference
def test_backward(benchmark: Any, name: str, chosen: str, dtype: str) -> None:
    """The gradient of every floating-point argument; the graph is made once and kept."""
    call = make_call(name)
    args = call.cast(machine.DTYPES[dtype])
    wanted = differentiable(args)
    with fastbert.use_backend(chosen, OPS[name]):
        try:
            output = call.run(*args, **call.kwargs)
        except fastbert.BackendError as reason:
            pytest.skip(str(reason))
    dy = torch.randn_like(output)
    if chosen != "reference":
        check_gradients(call, args, dy, torch.autograd.grad(output, wanted, dy, retain_graph=True))

    def run() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(output, wanted, dy, retain_graph=True)
        machine.synchronize(DEVICE)
        return gradients

    benchmark.group = f"{name} {dtype} backward"
    gradients = benchmark(run)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    touched = [dy, *gradients] if call.gathers else tensors([*args, dy, *gradients])
    note_figures(benchmark, 2 * call.flops, touched, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "chosen"), [(name, b) for name, b in FORWARDS if name != "encoder"])
def test_step(benchmark: Any, name: str, chosen: str, dtype: str) -> None:
    """Forward and the gradient of every floating-point argument, as in training: what one makes the other may use."""
    call = make_call(name)
    args = call.cast(machine.DTYPES[dtype])
    wanted = differentiable(args)
    dy = None

    def run() -> tuple[Tensor, ...]:
        nonlocal dy
        output = call.run(*args, **call.kwargs)
        dy = torch.ones_like(output) if dy is None else dy
        gradients = torch.autograd.grad(output, wanted, dy)
        machine.synchronize(DEVICE)
        return gradients

    with fastbert.use_backend(chosen, OPS[name]):
        try:
            gradients = run()
        except fastbert.BackendError as reason:
            pytest.skip(str(reason))
        benchmark.group = f"{name} {dtype} step"
        benchmark(run)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    touched = [dy, *gradients] if call.gathers else tensors([*args, dy, *gradients])
    note_figures(benchmark, 3 * call.flops, touched, dtype)


def check_gradients(call: Call, args: tuple[Any, ...], dy: Tensor, actual: tuple[Tensor, ...]) -> None:
    """The gate of `check` for every gradient; in fp32 each relative to its largest value."""

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [cast(x, dtype) for x in args]
        return torch.autograd.grad(call.plain(*leaves, **call.kwargs), differentiable(leaves), dy.to(dtype))

    for mine, exact, eager in zip(actual, gradients(torch.float64), gradients(dy.dtype), strict=True):
        reason = twice_eager_gate(exact, eager).reason(mine)
        if reason is not None and mine.dtype == torch.float32:
            largest = exact.abs().max()
            reason = exact_gate(exact / largest).reason(mine / largest)
        assert reason is None, reason


def check(call: Call, args: tuple[Any, ...], actual: Tensor) -> None:
    """The gate: twice the error of eager PyTorch in the dtype, both against fp64; in fp32 at least 1e-5."""
    expected = call.plain(*(cast(x, torch.float64) for x in args), **call.kwargs)
    eager = call.plain(*args, **call.kwargs)
    gate = twice_eager_gate(expected, eager)
    reason = gate.reason(actual)
    if reason is not None and actual.dtype == torch.float32:
        reason = exact_gate(expected).reason(actual)
    assert reason is None, reason


def note_figures(benchmark: Any, flops: float, touched: list[Tensor], dtype: str) -> None:
    """Adds TFLOP/s and GB/s, with their shares of the ceilings, to the benchmark's record."""
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    size = sum(t.numel() * t.element_size() for t in touched)
    peak, peak_what = machine.ceiling(DEVICE, dtype)
    copy, copy_what = machine.copy_ceiling(DEVICE)
    matmul, matmul_what = machine.matmul_ceiling(DEVICE, dtype)  # a peer, for comparison
    benchmark.extra_info.update(
        {
            "tokens": T,
            "tokens_per_s": T / median,
            "tflops": flops / median / 1e12,
            "tflops_share": flops / median / peak,
            "torch_matmul": f"{matmul_what}: {matmul / 1e12:.2f} TFLOP/s",
            "gbps": size / median / 1e9,
            "gbps_share": size / median / copy,
            "ceilings": f"{peak_what}: {peak / 1e12:.2f} TFLOP/s; {copy_what}: {copy / 1e9:.1f} GB/s",
            **machine.environment(DEVICE),
        }
    )
