"""The time per token of ModernBERT-base's layers as texts grow: local ones, which see a window, and full ones.

    python benchmarks/bench_window.py --length 1024 2048 4096 8192

A local layer must take per token at the longest what it takes at the shortest, within a tenth. Each figure is the
difference of two models of random weights, with two layers and with six, so that embeddings and the last norm drop out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from encoders import quiet_transformers
from machine import time_call
from workload import SEED

import fastbert

LOCAL, FULL = "sliding_attention", "full_attention"
FEW, MANY = 2, 6  # layers
LIMIT = 1.1  # of the longest over the shortest, for local layers
CPU = torch.device("cpu")


def make_model(kind: str, layers: int) -> fastbert.BertPreTrainedModel:
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(SEED)
    config = ModernBertConfig(pad_token_id=0, num_hidden_layers=layers, layer_types=[kind] * layers)
    with tempfile.TemporaryDirectory() as folder:
        ModernBertModel(config).save_pretrained(folder)
        return fastbert.AutoModel.from_pretrained(Path(folder)).eval()


@torch.inference_mode()
def measure(lengths: list[int], rounds: int) -> dict[str, list[float]]:
    """Microseconds per token and layer, for each kind of layer and length."""
    models = {(kind, layers): make_model(kind, layers) for kind in (LOCAL, FULL) for layers in (FEW, MANY)}
    texts = [torch.arange(length).remainder(20_000).add(1_000)[None] for length in lengths]
    times: dict[tuple[str, int, int], list[float]] = {}
    for turn in range(rounds + 1):  # the first is not kept: memory is new
        for (kind, layers), model in list(models.items())[:: 1 if turn % 2 else -1]:
            for ids in texts:
                taken = time_call(lambda model=model, ids=ids: model(ids), CPU)
                if turn:
                    times.setdefault((kind, layers, ids.numel()), []).append(taken)
    median = {key: statistics.median(values) for key, values in times.items()}
    each = (MANY - FEW) * 1e-6
    return {k: [(median[k, MANY, n] - median[k, FEW, n]) / n / each for n in lengths] for k in (LOCAL, FULL)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_window.py --length 1024 8192"
    )
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    quiet_transformers()
    found = measure(args.length, args.rounds)
    print("us per token and layer   " + "".join(f"{length:>8,}" for length in args.length))
    for kind, values in found.items():
        print(f"{kind:<25}" + "".join(f"{value:8.1f}" for value in values))
    ratio = found[LOCAL][-1] / found[LOCAL][0]
    print(f"local layers, longest over shortest: {ratio:.3f} (at most {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
