"""Run by .ci/run in a fresh environment, next to a stand-in for Hugging Face's package `kernels`."""

import sys
from pathlib import Path

import torch

import fastbert
import fastbert.kernels.add_layer_norm
import kernels
from fastbert import native
from fastbert.ops import add_layer_norm

assert kernels.STAND_IN, f"`kernels` is {kernels.__file__}, not the stand-in"
environment = Path(sys.argv[1]).resolve()
for module in (fastbert, fastbert.kernels.add_layer_norm):
    assert environment in Path(module.__file__).resolve().parents, f"{module} is not from the wheel"
assert native.available() is None, native.available()
try:
    native.extension.C.isa_id("")
except ValueError as error:
    known = str(error).partition("known: ")[2]
# What emulates AMX is test code.
assert "amx" in known.split(", ") and "emulat" not in known, known

config = fastbert.BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
torch.manual_seed(0)
model = fastbert.BertModel(config).eval()
ids = torch.randint(0, 50, (3, 7))
mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
with torch.no_grad():
    hidden = model(ids, attention_mask=mask).last_hidden_state
    alone = model(ids[1:2, :4]).last_hidden_state
    with fastbert.use_backend("native", "add_layer_norm"):
        x, weight = torch.randn(5, 32), torch.ones(32)
        y = add_layer_norm(x, None, weight, torch.zeros(32), eps=1e-12)
assert hidden.shape == (3, 7, 32) and hidden.isfinite().all()
torch.testing.assert_close(hidden[1:2, :4], alone, rtol=0, atol=1e-6)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (32,), eps=1e-12))
print(f"fastbert {fastbert.__version__} from the wheel, native {native.isa()}, CUDA {native.has_cuda()}")
