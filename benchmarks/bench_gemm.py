"""The products of a BERT-base layer alone: fastbert's native linear against torch's, fp32, bf16 and int8.

    python benchmarks/bench_gemm.py --rows 16 128 1024 4096

x (M, K) times weight (N, K), without bias. The weight stays the same from call to call, so it is as warm as the caches
allow: an upper bound of what the encoder, whose weights come from main memory, can do with it. `torch` multiplies the
weight as it lies, `torch-packed` one that oneDNN packed before. Results are held to fp64 before they are timed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import torch
import torch.nn.functional as F
from harness import Case, Gate, Harness, Prepared, Provider, Unsupported, exact_gate, relative_gate, twice_eager_gate
from torch import Tensor
from workload import SEED

from fastbert import native, ops

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = ((768, 3072), (3072, 768))  # K, N
ROWS = (16, 128, 1024, 4096)
DTYPES = ("fp32", "bf16", "int8")
CPU = torch.device("cpu")


def cases(rows: list[int]) -> Iterator[Case]:
    """Payload: x (M, K) and weight (N, K) in fp32; int8 takes integers in proportion to them."""
    generator = torch.Generator().manual_seed(SEED)
    for inner, columns in SIZES:
        for m in rows:
            yield Case(
                op="gemm",
                model="bert-base",
                name=f"{inner}->{columns}",
                shape=f"{m}x{inner}x{columns}",
                fill=1.0,
                tokens=m,
                flops=2.0 * m * inner * columns,
                payload=(
                    torch.randn(m, inner, generator=generator),
                    torch.randn(columns, inner, generator=generator) * inner**-0.5,
                ),
                min_rounds=20,
            )


def operands(case: Case, dtype: str) -> tuple[Tensor, Tensor]:
    x, weight = case.payload
    if dtype == "int8":
        x, weight = (scaled.round().clamp(-127, 127) for scaled in (x * 40, weight * 1000))
    kind = torch.int8 if dtype == "int8" else machine.DTYPES[dtype]
    return x.to(kind), weight.to(kind)


def gate(case: Case, provider: Provider) -> Gate:
    """fp32: 1e-5, its contract everywhere; bf16: twice the error of torch's own product; int8: the exact sums.

    fastbert's int8 rounds bf16 operands itself, which its time holds and 2 % of error answer for.
    """
    if provider.name == "fastbert" and provider.dtype == "int8":
        x, weight = operands(case, "bf16")
        return relative_gate(x.double() @ weight.double().T, 0.02)
    x, weight = operands(case, provider.dtype)
    expected = x.double() @ weight.double().T
    if provider.dtype != "bf16":
        return exact_gate(expected, *([0.0] if provider.dtype == "int8" else []))
    return twice_eager_gate(expected, F.linear(x, weight))


def torch_linear(case: Case, dtype: str) -> Prepared:
    x, weight = operands(case, dtype)
    if dtype == "int8":
        return Prepared(lambda: torch._int_mm(x, weight.T))
    return Prepared(lambda: F.linear(x, weight))


def torch_packed(case: Case, dtype: str) -> Prepared:
    """A linear layer as torch.compile with freezing compiles it."""
    if dtype == "int8":
        raise Unsupported("torch packs int8 weights within its own quantised models only")
    x, weight = operands(case, dtype)
    mkldnn = torch.ops.mkldnn
    packed = mkldnn._reorder_linear_weight(weight, len(x))
    return Prepared(lambda: mkldnn._linear_pointwise(x, packed, None, "none", [], ""))


def fastbert_linear(case: Case, dtype: str) -> Prepared:
    if reason := native.available():
        raise Unsupported(reason)
    precision = "int8" if dtype == "int8" else None
    with torch.inference_mode(False):  # a weight made in inference mode does not say when it changes
        x, rows = operands(case, "bf16" if precision else dtype)
        weight = ops.Weight([rows], [None])
    if reason := native.supports_linear(x, weight, precision=precision):
        raise Unsupported(reason)
    return Prepared(lambda: native.linear(x, weight, precision=precision), backend=f"native {native.isa()}")


def providers(dtypes: list[str]) -> list[Provider]:
    kinds: dict[str, Callable[[Case, str], Prepared]] = {
        "torch": torch_linear,
        "torch-packed": torch_packed,
        "fastbert": fastbert_linear,
    }
    return [
        Provider(name, lambda case, p=prepare, d=dtype: p(case, d), dtype)
        for dtype in dtypes
        for name, prepare in kinds.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_gemm.py --rows 4096"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="M")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing a size, past its least rounds")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, default=RESULTS / "gemm-cpu.csv", help="CSV to append to")
    chosen = parser.parse_args(arguments)
    if min(chosen.rows) < 1:
        parser.error("--rows must be at least 1")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore", module="torch")
    try:
        harness = Harness(CPU, chosen.output, seconds=chosen.seconds)
    except ValueError as error:
        print(f"bench_gemm: {error}", file=sys.stderr)
        return 1
    print(f"{'M x K x N':18}{'provider':14}{'':6}{'p50 ms':>9}{'TFLOP/s':>9}{'share':>7}")
    for case in cases(chosen.rows):
        for row in harness.run_case(case, providers(chosen.dtype), lambda p, c=case: gate(c, p)):
            name = f"{row['shape']:18}{row['provider']:14}{row['dtype']:6}"
            if row["status"] != "ok":
                print(f"{name}{row['status']}")
                continue
            share = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
            print(f"{name}{row['p50_ms']:9.3f}{row['tflops']:9.3f}{share:>7}", flush=True)
    print("share: of " + "; ".join(sorted({str(row["ceiling"]) for row in harness.rows if row["ceiling"]})))
    return int(any(row["status"].startswith(("wrong", "failed")) for row in harness.rows))


if __name__ == "__main__":
    sys.exit(main())
