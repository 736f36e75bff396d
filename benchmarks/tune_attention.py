"""Which tiles of attention are fastest on this GPU: candidates next to those of kernels/configs.py, both ways.

    python benchmarks/tune_attention.py --subjects D64
    benchmarks/acceptance/gpu.sh --stages tune FOLDER                   # rows in FOLDER/tune-attention.csv

A row's provider is a kernel and its tiles, ROWSxSTEP-WARPS-STAGES, with tma where whole steps come through descriptors;
a backward's other kernel keeps its own step. Each is held to twice the error of plain PyTorch, then timed in turns with
the others. Nothing reads these rows: configs.py is changed by hand. --tiny needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_gpu_ops
import gpu_suite
import machine
import torch
from gpu_suite import Settings, Work
from harness import Case, Prepared, Provider, twice_eager_gate
from torch import Tensor
from workload import SEED

from fastbert.kernels import attention, attention_bwd, configs

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (128, 512, 2048, 16384)
# Rows of a tile, of a step, warps, stages, by kernel; `one` is a dK/dV kernel that writes dQ too. On sm_90 none spills;
# kernels/README.md names those that do.
CANDIDATES = {
    "fwd": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (256, 64, 8, 3)),
    "dq": ((128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)),
    "dkdv": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
    "one": ((128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2), (128, 32, 8, 1), (128, 16, 8, 2)),
}
WITH_TMA_AT_64 = {"fwd": ((128, 128, 4, 3), (128, 128, 4, 2))}
TINY = dict.fromkeys(CANDIDATES, ((32, 16, 1, 1),))


@dataclass(frozen=True)
class Candidate:
    """A kernel with its tiles: `fwd`, `dq`, `dkdv`, or `one`."""

    kernel: str
    block: int
    config: configs.Attention

    def __str__(self) -> str:
        c = self.config
        return f"{self.kernel} {self.block}x{c.step}-{c.num_warps}-{c.num_stages}" + ("-tma" if c.tma else "")

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it configs.py answers with this candidate, and for a backward's other kernel as ever."""
        names = ("attention", "attention_block", "attention_in_one_launch")
        own = {name: getattr(configs, name) for name in names}
        kernel = "dkdv" if self.kernel == "one" else self.kernel

        def config(asked: str, *shape: Any, plain: bool = True) -> configs.Attention:
            return self.config if asked == kernel else own["attention"](asked, *shape, plain=plain)

        configs.attention = config
        configs.attention_block = lambda *shape: self.block
        configs.attention_in_one_launch = lambda *shape: self.kernel == "one"
        try:
            yield
        finally:
            for name in names:
                setattr(configs, name, own[name])


def candidates(head_dim: int, length: int, *, tiny: bool = False) -> list[Candidate]:
    """Those that suit sequences of `length`: no tile is longer, and `one` has all of a sequence in its tile."""
    tma = length >= 256
    found = []
    for kernel, tiles in (TINY if tiny else CANDIDATES).items():
        more = WITH_TMA_AT_64.get(kernel, ()) if tma and head_dim == 64 else ()
        for block, step, num_warps, num_stages in (*more, *tiles):
            if block <= length and (kernel != "one" or block == length):
                found.append(Candidate(kernel, block, configs.Attention(step, num_warps, num_stages, tma)))
    return found


def plain(qkv: Tensor, dout: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and dqkv by plain PyTorch in `dtype`, a head at a time: the probabilities of all would fill a GPU."""
    outs, gradients = [], []
    for h in range(qkv.shape[2]):
        leaf = qkv[:, :, h : h + 1].to(dtype).requires_grad_()
        out = bench_gpu_ops.plain_attention(leaf, length)
        gradients += torch.autograd.grad(out, leaf, dout[:, h : h + 1].to(dtype))
        outs.append(out.detach())
    return torch.cat(outs, 1), torch.cat(gradients, 2)


def tiles(head_dim: int, settings: Settings) -> Iterator[Work]:
    # bf16 is wrong in the interpreter.
    name, dtype = settings.pick(("bf16", torch.bfloat16), ("fp16", torch.float16))
    tokens, heads = settings.pick((TOKENS, HIDDEN // head_dim), (32, 1))
    for length in settings.pick(LENGTHS, (32,)):
        torch.manual_seed(SEED)
        qkv = bench_gpu_ops.normal(settings, tokens, 3, heads, head_dim, dtype=dtype)
        dout = bench_gpu_ops.normal(settings, tokens, heads, head_dim, dtype=dtype)
        cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=settings.device)
        exact, eager = (plain(qkv, dout, length, kind) for kind in (torch.float32, dtype))
        constants = {"cu_seqlens": cu_seqlens, "max_seqlen": length, "scale": head_dim**-0.5}
        out, statistics = attention.attention_fwd(qkv, **constants)
        calls = {
            "forward": lambda qkv=qkv, known=constants, **k: attention.attention_fwd(qkv, **known, **k)[0],
            "backward": partial(attention_bwd.attention_bwd, dout, qkv, out, statistics, **constants),
        }
        schedule = partial(attention.attention_schedule, qkv, cu_seqlens, length)
        flops = 4.0 * length * heads * head_dim * tokens
        for i, (mode, run) in enumerate(calls.items()):
            suiting = [c for c in candidates(head_dim, length, tiny=settings.tiny) if (c.kernel == "fwd") == (i == 0)]
            providers = [
                Provider(str(way), partial(prepared, taken, run, schedule), name)
                for way, taken in [("configs.py", nullcontext), *((c, c.taken) for c in suiting)]
            ]
            columns = {"model": f"H{heads} D{head_dim}", "name": f"length {length}", "mode": mode}
            columns |= {"shape": f"{tokens // length}x{length}", "flops": flops * (1, 2.5)[i]}
            case = Case("attention", fill=1.0, tokens=tokens, **columns)
            gate = twice_eager_gate(exact[i], eager[i])
            yield Work(case, providers, lambda _, gate=gate: gate, machine.time_on_device)


def prepared(
    taken: Callable[[], AbstractContextManager], run: Callable[..., Tensor], schedule: Callable[[], Any], case: Case
) -> Prepared:
    with taken():
        table = schedule()

    def call() -> Tensor:
        with taken():
            return run(schedule=table)

    return Prepared(call)


SUBJECTS = {"D64": partial(tiles, 64), "D32": partial(tiles, 32)}


def main(arguments: list[str] | None = None) -> int:
    return gpu_suite.main(arguments, __doc__, "tune_attention", SUBJECTS)


if __name__ == "__main__":
    sys.exit(main())
