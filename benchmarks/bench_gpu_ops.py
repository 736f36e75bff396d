"""The ops of a BERT on a GPU against torch's, and the ceilings: forward and backward.

    python benchmarks/bench_gpu_ops.py
    python benchmarks/bench_gpu_ops.py --subjects attention --peers

Each op's result is held to fp32: at most twice the error of plain PyTorch in bf16. A call is timed by CUDA events on
a GPU kept busy, its L2 full of other data. benchmarks/README.md says how FLOPs and bytes are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_suite
import machine
import torch
import torch.nn.functional as F
from gpu_suite import Settings, Work, compiled, joined, sizes
from harness import Case, Prepared, Provider, Unsupported, exact_gate, relative_gate, twice_eager_gate
from torch import Tensor
from workload import SEED

from fastbert import ops
from fastbert.ops import dispatch

# As the papers of flash-attention: 16k tokens of hidden size 2048, heads of 64.
ATTENTION_TOKENS, ATTENTION_HEADS, HEAD_DIM = 16384, 32, 64
ATTENTION_LENGTHS = (512, 2048, 16384)
NORM_ROWS, NORMS = 32768, ((768, 0.0), (1024, 0.0), (1024, 0.1))  # width, dropout
LINEAR_ROWS, WIDTHS = 16384, (768, 1024)
VOCABULARY, POSITIONS, TYPES = 30522, 512, 2
EMBEDDED = 32768  # tokens
LABELLED = (2457, 4915)  # 15 % of 16,384 and of 32,768
SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
# Errors of a whole product against fp32, relative: int8 at 32 steps a unit keeps 7 bits of each operand.
MATMUL_LIMITS = {"bf16": 0.01, "fp16": 0.01, "int8": 0.03}


def normal(settings: Settings, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, device=settings.device) * scale).to(dtype)


def ceilings(settings: Settings) -> Iterator[Work]:
    """The speed of this GPU's memory and matrix units in plain torch: every other row is read next to these."""
    megabytes = settings.pick(2048, 1)
    source = torch.arange(megabytes << 18, dtype=torch.int32, device=settings.device)
    target = torch.empty_like(source)
    case = Case("copy", "", "large", f"{megabytes} MiB", 1.0, 0, 0.0, bytes=2.0 * (megabytes << 20))
    prepared = Prepared(lambda: target.copy_(source), lambda copied: (copied[::4097] - source[::4097]).float())
    expected = prepared.result(source)
    providers = [Provider("torch", lambda case: prepared, "int32")]
    yield Work(case, providers, lambda _: exact_gate(expected), machine.time_on_device)

    torch.manual_seed(SEED)
    size = settings.pick(8192, 64)
    a, b = normal(settings, size, size, dtype=torch.float32), normal(settings, size, size, dtype=torch.float32)
    dtypes = ("bf16", "fp16", "int8") if settings.device.type == "cuda" else ("bf16", "fp16")
    case = Case("matmul", "", "large", f"{size}x{size}x{size}", 1.0, 0, 2.0 * size**3)

    def multiplied(dtype: str) -> Provider:
        scale = 1024.0 if dtype == "int8" else 1.0
        return Provider("torch", lambda _: Prepared(machine.matmul(a, b, dtype), lambda c: c.float() / scale), dtype)

    expected = a @ b
    providers = [multiplied(dtype) for dtype in dtypes]
    yield Work(case, providers, lambda p: relative_gate(expected, MATMUL_LIMITS[p.dtype]), machine.time_on_device)


def same(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Call:
    """One op's work: leaves in bf16, what plain PyTorch makes of them in any dtype, and the output's gradient.

    `comparable` makes of the gradients what does not hang on where dropout fell.
    """

    op: str
    leaves: Sequence[Tensor]
    plain: Callable[..., Tensor]
    dy: Tensor
    comparable: Callable[[Sequence[Tensor]], Sequence[Tensor]] = same

    def values(self, dtype: torch.dtype, mode: str) -> Sequence[Tensor]:
        """The output, or the gradients, by plain PyTorch in `dtype`."""
        leaves = [t.detach().to(dtype).requires_grad_(mode != "forward") for t in self.leaves]
        output = self.plain(*leaves)
        return [output] if mode == "forward" else self.gradients(output, leaves, self.dy.to(dtype))

    def gradients(self, output: Tensor, leaves: Sequence[Tensor], dy: Tensor) -> Sequence[Tensor]:
        return self.comparable(torch.autograd.grad(output, leaves, dy))


@dataclass(frozen=True)
class Way:
    """How a provider does a Call, and between its layout of the tensors and the packed one."""

    name: str
    function: Callable[..., Tensor]
    split: Callable[[Sequence[Tensor]], Sequence[Tensor]] = same  # the leaves, as it takes them
    into: Callable[[Tensor], Tensor] = same  # dy, as it takes it
    out: Callable[[Tensor], Tensor] = same  # its output, packed
    joins: Callable[[Sequence[Tensor]], Sequence[Tensor]] = same  # its gradients, packed
    backend: Callable[[Sequence[Tensor]], str] = lambda leaves: ""


def own(call: Call, *rest: Any, before: Sequence[Tensor] = (), **constants: Any) -> Way:
    """fastbert's op on the leaves, with `before` in front of them and `rest` behind."""
    device = call.leaves[0].device.type
    return Way(
        "fastbert",
        lambda *leaves: getattr(ops, call.op)(*before, *leaves, *rest, **constants),
        backend=lambda leaves: dispatch.choose(call.op, device, *before, *leaves, *rest, **constants)[0],
    )


def work(call: Call, ways: Sequence[Way], **columns: Any) -> Work:
    """The case of a Call, held to twice the error of plain PyTorch in bf16, each tensor relative to its own size."""
    case = Case(op=call.op, fill=1.0, **columns)
    exact = call.values(torch.float32, case.mode)
    scales = sizes(exact)
    gate = twice_eager_gate(joined(exact, scales), joined(call.values(torch.bfloat16, case.mode), scales))

    def prepare(way: Way) -> Prepared:
        leaves = way.split([t.detach() for t in call.leaves])
        if case.mode == "forward":
            return Prepared(lambda: way.function(*leaves), lambda y: joined([way.out(y)], scales), way.backend(leaves))
        leaves = [t.detach().requires_grad_() for t in leaves]
        dy, runs = way.into(call.dy), way.backend(leaves)
        made = way.function(*leaves) if case.mode == "backward" else None

        def gradients() -> Sequence[Tensor]:
            output = way.function(*leaves) if made is None else made
            return torch.autograd.grad(output, leaves, dy, retain_graph=made is not None)

        return Prepared(gradients, lambda found: joined(call.comparable(way.joins(found)), scales), runs)

    providers = [Provider(way.name, lambda _, w=way: prepare(w), "bf16") for way in ways]
    return Work(case, providers, lambda _: gate, machine.time_on_device)


def attention(settings: Settings) -> Iterator[Work]:
    tokens, heads = settings.pick((ATTENTION_TOKENS, ATTENTION_HEADS), (64, 2))
    lengths = settings.pick(ATTENTION_LENGTHS, (32,))
    for length in lengths:
        torch.manual_seed(SEED)
        qkv, dy = normal(settings, tokens, 3, heads, HEAD_DIM), normal(settings, tokens, heads, HEAD_DIM)
        cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=settings.device)
        call = Call("attention", [qkv], lambda x, s=length: plain_attention(x, s), dy)
        ways = [
            own(call, cu_seqlens, length, scale=None, dropout_p=0.0),
            *torch_attention(settings, cu_seqlens, length),
        ]
        forward = 4.0 * length * heads * HEAD_DIM * tokens
        for mode, flops in (("forward", forward), ("backward", 2.5 * forward)):
            if mode == "backward" and length == ATTENTION_LENGTHS[-1]:
                continue  # no target, and its reference in fp32 takes most of a GPU's memory
            columns = {"model": f"H{heads} D{HEAD_DIM}", "name": f"length {length}", "mode": mode, "flops": flops}
            yield work(call, ways, shape=f"{tokens // length}x{length}", tokens=tokens, **columns)


def plain_attention(qkv: Tensor, length: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with its probabilities in memory, as many heads at a time as fit."""
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4).flatten(1, 2)  # each (B * H, S, D)
    step = max(1, 2**28 // length**2)
    parts = [
        torch.softmax(q[i : i + step] @ k[i : i + step].mT * q.shape[-1] ** -0.5, -1) @ v[i : i + step]
        for i in range(0, len(q), step)
    ]
    return torch.cat(parts).unflatten(0, (-1, qkv.shape[2])).transpose(1, 2).flatten(0, 1)


def torch_attention(settings: Settings, cu_seqlens: Tensor, length: int) -> list[Way]:
    """Each backend of torch's sdpa on views of the packed row, (B, H, S, D), and torch's kernel for unlike lengths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def views(leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        return leaves[0].unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4).unbind()

    def packed(y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(0, 1)

    def sdpa(kind: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            try:
                with sdpa_kernel(kind):
                    return F.scaled_dot_product_attention(q, k, v)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    raise Unsupported("torch has no such kernel for this call on this GPU") from error
                raise

        return run

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Unsupported("this torch has no torch.nn.attention.varlen") from error
        if q.device.type != "cuda":
            raise Unsupported("torch.nn.attention.varlen needs a CUDA device")
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, length, length)

    kinds = SDPA if settings.device.type == "cuda" else {"math": "MATH"}
    ways = [
        Way(
            f"torch-sdpa-{name}",
            sdpa(SDPBackend.__members__[kind]),
            split=views,
            into=lambda dy: dy.unflatten(0, (-1, length)).transpose(1, 2),
            out=packed,
            joins=lambda gradients: [torch.stack([packed(x) for x in gradients], 1)],
        )
        for name, kind in kinds.items()
    ]
    thirds = {"split": lambda leaves: leaves[0].unbind(1), "joins": lambda gradients: [torch.stack(list(gradients), 1)]}
    return [*ways, Way("torch-varlen", varlen, **thirds)]


def add_layer_norm(settings: Settings) -> Iterator[Work]:
    rows = settings.pick(NORM_ROWS, 64)
    for width, dropout_p in settings.pick(NORMS, ((32, 0.0), (32, 0.1))):
        torch.manual_seed(SEED)
        x, residual, dy = (normal(settings, rows, width) for _ in range(3))
        if dropout_p:
            x.zero_()  # then the result is known whatever is dropped, and memory takes no less time for zeros
        vectors = [1 + normal(settings, width, scale=0.1), normal(settings, width, scale=0.1)]

        def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float = dropout_p) -> Tensor:
            return F.layer_norm(F.dropout(x, p) + residual, weight.shape, weight, bias, 1e-12)

        def undropped(gradients: Sequence[Tensor], p: float = dropout_p) -> Sequence[Tensor]:
            dx, dresidual, *rest = gradients
            return [torch.where(dx == 0, dresidual, dx * (1 - p)), (dx == 0).mean(dtype=torch.float32)[None], *rest]

        call = Call("add_layer_norm", [x, residual, *vectors], plain, dy, undropped if dropout_p else same)
        ways = [own(call, eps=1e-12, dropout_p=dropout_p), *torch_ways(settings, plain)]
        name = f"N {width}" + (f", dropout {dropout_p:g}" if dropout_p else "")
        # What has to pass: x, residual, y; dy, the sum that was normalised, dx, with dropout the residual's gradient.
        for mode, passes in (("forward", 3), ("backward", 4 if dropout_p else 3)):
            columns = {"name": name, "mode": mode, "shape": f"{rows}x{width}", "tokens": rows, "model": ""}
            yield work(call, ways, flops=0.0, bytes=2.0 * passes * rows * width, **columns)


def linear(settings: Settings) -> Iterator[Work]:
    rows = settings.pick(LINEAR_ROWS, 32)
    for width in settings.pick(WIDTHS, (32,)):
        kinds = {
            "qkv": (3 * width, width, None),
            "up-gelu": (4 * width, width, "gelu"),
            "down": (width, 4 * width, None),
        }
        for name in settings.pick(kinds, ("up-gelu",)):
            out, inner, activation = kinds[name]
            torch.manual_seed(SEED)
            x, dy = normal(settings, rows, inner), normal(settings, rows, out)
            weight, bias = normal(settings, out, inner, scale=inner**-0.5), normal(settings, out)

            def plain(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = activation is not None) -> Tensor:
                y = F.linear(x, weight, bias)
                return F.gelu(y) if gelu else y

            call = Call("linear", [x, weight, bias], plain, dy)
            ways = [own(call, activation=activation, precision=None), *torch_ways(settings, plain)]
            forward = 2.0 * rows * out * inner
            # Backward at BERT-large's width alone: each is compiled again.
            modes = (("forward", forward), *((("backward", 2 * forward),) if width != 768 else ()))
            for mode, flops in modes:
                columns = {"name": name, "mode": mode, "model": f"E {width}", "tokens": rows, "flops": flops}
                yield work(call, ways, shape=f"{rows}x{inner}x{out}", **columns)


def embed_layer_norm(settings: Settings) -> Iterator[Work]:
    tokens, rows = settings.pick((EMBEDDED, (VOCABULARY, TYPES, POSITIONS)), (64, (100, 2, 16)))
    for width in settings.pick(WIDTHS, (32,)):
        torch.manual_seed(SEED)
        places = torch.arange(tokens, device=settings.device) % rows[2]  # in texts of every position
        ids = [torch.randint(rows[0], (tokens,), device=settings.device), (places * 2 >= rows[2]).long(), places]
        tables, dy = [normal(settings, size, width) for size in rows], normal(settings, tokens, width)
        vectors = [1 + normal(settings, width, scale=0.1), normal(settings, width, scale=0.1)]

        def plain(*leaves: Tensor, ids: Sequence[Tensor] = ids) -> Tensor:
            word, token_type, position = map(F.embedding, ids, leaves[:3])
            return F.layer_norm(word + token_type + position, leaves[0].shape[1:], *leaves[3:], 1e-12)

        call = Call("embed_layer_norm", [*tables, *vectors], plain, dy)
        ways = [own(call, before=ids, eps=1e-12), Way("torch-eager", plain)]
        # What has to pass: the ids; each row that occurs, once; y, or dy and the gradients, which are of whole tables.
        read = tokens + sum(len(x.unique()) for x in ids)
        for mode, passed in (("forward", read), ("backward", read + sum(rows))):
            columns = {"name": f"N {width}", "mode": mode, "shape": f"{tokens}x{width}", "tokens": tokens, "model": ""}
            yield work(call, ways, flops=0.0, bytes=2.0 * passed * width + 3.0 * 8 * tokens, **columns)


def linear_cross_entropy(settings: Settings) -> Iterator[Work]:
    vocabulary = settings.pick(VOCABULARY, 100)
    for width in settings.pick(WIDTHS, (32,)):
        for rows in settings.pick(LABELLED, (24,)):
            torch.manual_seed(SEED)
            x, bias = normal(settings, rows, width), normal(settings, vocabulary)
            weight = normal(settings, vocabulary, width, scale=width**-0.5)
            labels = torch.randint(vocabulary, (rows,), device=settings.device)

            def plain(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(F.linear(x, weight, bias).float(), labels).to(x.dtype)  # as transformers has it

            call = Call("linear_cross_entropy", [x, weight, bias], plain, x.new_ones(()))
            ways = [own(call, labels, ignore_index=-100), Way("torch-eager", plain)]
            forward = 2.0 * rows * vocabulary * width
            # Gradients next to the loss: fastbert makes them along with it, so that a backward alone is no figure.
            for mode, flops in (("forward", forward), ("forward+backward", 3 * forward)):
                columns = {"name": f"{rows} labels", "mode": mode, "model": f"E {width}", "tokens": rows}
                yield work(call, ways, shape=f"{rows}x{width}x{vocabulary}", flops=flops, **columns)


def torch_ways(settings: Settings, plain: Callable[..., Tensor]) -> list[Way]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # else a backward runs once
    return [Way("torch-eager", plain), Way("torch-compile", compiled(plain, settings.device))]


# Those with targets first: a stage that runs out of its time loses the others.
SUBJECTS = {
    "ceilings": ceilings,
    "attention": attention,
    "add_layer_norm": add_layer_norm,
    "linear": linear,
    "linear_cross_entropy": linear_cross_entropy,
    "embed_layer_norm": embed_layer_norm,
}


def main(arguments: list[str] | None = None) -> int:
    return gpu_suite.main(arguments, __doc__, "bench_gpu_ops", SUBJECTS)


if __name__ == "__main__":
    sys.exit(main())
