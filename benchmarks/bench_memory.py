"""Peak memory of loading BERT-base and running a batch, in fresh processes, torch's own import apart.

    python benchmarks/bench_memory.py --dtype fp32 bf16 int8

The peak of the resident set, mapped files and all, above what the process had with torch imported; as a multiple of
what cannot be done without: the weights in the running precision, and one layer's activations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fresh
import torch
from encoders import PRECISIONS, quiet_transformers, require_precision
from harness import Unsupported, append_rows, check_columns
from workload import SEED

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 1.3
BATCH, LENGTH = 8, 128
DTYPES = ("fp32", "bf16", "int8")
_RUN = """
ids = torch.arange(int(sys.argv[4]) * int(sys.argv[5])).view(int(sys.argv[4]), -1) % 20000 + 1000
with torch.inference_mode():
    for _ in range(2):
        result = float(model(ids, torch.ones_like(ids)).last_hidden_state.float().square().mean())
"""
# sys.argv: threads, the model's folder, the precision, batch, length.
PROGRAMS = {
    "fastbert": f"""
import fastbert
options = {PRECISIONS!r}[sys.argv[3]]
model = fastbert.BertModel.from_pretrained(sys.argv[2], add_pooling_layer=False, inference_only=True, **options)
{_RUN}""",
    "transformers": f"""
from transformers import BertModel
dtype = {{"fp32": torch.float32, "bf16": torch.bfloat16}}[sys.argv[3]]
model = BertModel.from_pretrained(sys.argv[2], dtype=dtype, add_pooling_layer=False).eval()
{_RUN}""",
}


def floor_mb(config: Any, dtype: str, tokens: int) -> float:
    """The weights in the running precision and the most of one layer's activations that live at once, in MB.

    int8 has the layers' matrices in a byte, all else and the activations in bf16. Activations: the layer's input, and
    the wider of Q, K, V with the context, and of the intermediate with its input.
    """
    width, inner = config.hidden_size, config.intermediate_size
    matrices = config.num_hidden_layers * (4 * width * width + 2 * width * inner)
    tables = (config.vocab_size + config.type_vocab_size + config.max_position_embeddings) * width
    vectors = config.num_hidden_layers * (9 * width + inner) + 2 * width
    item = 4 if dtype == "fp32" else 2
    weights = matrices * (1 if dtype == "int8" else item) + (tables + vectors) * item
    return (weights + tokens * (width + max(4 * width, width + inner)) * item) / 1e6


def measure(name: str, folder: Path, config: Any, dtype: str, rounds: int) -> dict[str, Any]:
    """The row of one provider: the median peak of so many processes."""
    columns: dict[str, Any] = {"op": "memory", "provider": name, "model": "bert-base", "dtype": dtype}
    columns |= {"case": "load and run", "shape": f"{BATCH}x{LENGTH}", "fill": "1.000", "tokens": BATCH * LENGTH}
    try:
        if name == "fastbert":
            require_precision(dtype)
        elif dtype == "int8":
            raise Unsupported("transformers has no int8 of its own")
        done = [fresh.run(PROGRAMS[name], folder, dtype, BATCH, LENGTH) for _ in range(rounds)]
    except Unsupported as reason:
        return fresh.row(**columns, status=f"unsupported: {reason}")
    except RuntimeError as error:
        return fresh.row(**columns, status=f"failed: {error}")
    peak = sorted(found["peak_mb"] - found["before_mb"] for found in done)[len(done) // 2]
    columns |= {"status": "ok", "rounds": rounds, "peak_memory_mb": peak}
    columns |= {"peak_memory_kind": "process RSS, above torch's import"}
    columns |= {"memory_floor_mb": floor_mb(config, dtype, BATCH * LENGTH)}
    return fresh.row(**columns)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_memory.py --dtype bf16"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.csv", help="CSV to append to")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    from transformers import BertConfig, BertModel

    quiet_transformers()
    try:
        check_columns(chosen.output)
    except ValueError as error:
        print(f"bench_memory: {error}", file=sys.stderr)
        return 1
    rows, config = [], BertConfig()
    with TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        BertModel(config).save_pretrained(folder)
        for dtype in chosen.dtype:
            for name in PROGRAMS:
                rows.append(found := measure(name, Path(folder), config, dtype, chosen.rounds))
                figures = found["status"]
                if figures == "ok":
                    peak, floor = found["peak_memory_mb"], found["memory_floor_mb"]
                    figures = f"{peak:7.0f} MB, {peak / floor:.2f} times the {floor:.0f} MB of weights and activations"
                print(f"{dtype:6}{name:16}{figures}", flush=True)
    append_rows(chosen.output, rows)
    own = [found for found in rows if found["provider"] == "fastbert"]
    passed = all(
        found["status"] == "ok" and found["peak_memory_mb"] <= LIMIT * found["memory_floor_mb"] for found in own
    )
    print(f"{'PASS' if passed else 'MISS'} (fastbert <= {LIMIT:g} times)")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
