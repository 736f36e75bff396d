"""What a process without torch keeps in memory after a hundred calls."""

import json
import subprocess
import sys

import pytest
import torch
from support import require_native
from tiny_bert import save_tiny

CALLS = """
import json, sys
from fastbert.light import TextEmbedder
embedder = TextEmbedder.from_pretrained(sys.argv[1], quantize=sys.argv[2] or None)
for i in range(100):
    embedder.embed([f"A man is playing a guitar on the stage {i}."])
assert "torch" not in sys.modules
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(int(status["VmRSS"].split()[0]) / 1e3))
"""
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}


def resident_mb(folder, quantize=""):
    command = [sys.executable, "-c", CALLS, str(folder), quantize]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_memory_after_a_hundred_calls(minilm, tmp_path):
    require_native()
    torch.manual_seed(0)
    base = save_tiny(tmp_path / "base", vocab_size=30522, **BASE)
    found = {
        "minilm": resident_mb(minilm),
        "minilm int8": resident_mb(minilm, "int8"),
        "base int8": resident_mb(base, "int8"),
    }
    print({name: f"{value:.0f} MB" for name, value in found.items()})
    assert found["minilm"] <= 120 and found["minilm int8"] <= 120 and found["base int8"] <= 260
