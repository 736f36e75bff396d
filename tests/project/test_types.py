"""The public API as a type checker sees it from a user's program: nothing is Any, and mistakes are found.

mypy reads the package and torch once, into .mypy_cache, which `make lint` fills too: without it this takes 20 seconds.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert

ROOT = Path(__file__).resolve().parents[2]
USE = """
from contextlib import AbstractContextManager
from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor, nn

import fastbert
from fastbert import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertModel, BertTokenizer
from fastbert import CompiledModel, Embedder, FillMask, PackedBatch
from fastbert.ops.dispatch import Explanation
from fastbert.tokenizer.encoding import BatchEncoding
from fastbert.tasks import Candidate
from fastbert.model.outputs import BaseModelOutputWithPooling, HeadOutput


class Live(nn.Module):
    pass


ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8)

model = BertModel.from_pretrained("folder", quantize="int8", inference_only=True, add_pooling_layer=False)
assert_type(model, BertModel)
assert_type(model.config, BertConfig)
assert_type(model.eval(), BertModel)
output = model(ids, attention_mask=mask, output_hidden_states=True)
assert_type(output, BaseModelOutputWithPooling)
assert_type(output.last_hidden_state, Tensor)
assert_type(output.pooler_output, Tensor | None)
assert_type(output.hidden_states, tuple[Tensor, ...] | None)
states, _ = model(ids, return_dict=False)

head = BertForSequenceClassification.from_pretrained("folder", num_labels=3)
assert_type(head, BertForSequenceClassification)
assert_type(head(input_ids=ids, labels=ids[:, 0]), HeadOutput)
assert_type(head(ids).loss, Tensor | None)
assert_type(head(ids).logits, Tensor)
assert_type(BertForQuestionAnswering(BertConfig())(ids).start_logits, Tensor)

tokenizer = BertTokenizer.from_pretrained("folder")
assert_type(tokenizer(["a text"], padding=True, return_tensors="pt"), BatchEncoding)
assert_type(tokenizer.convert_tokens_to_ids("[MASK]"), int)
assert_type(tokenizer.convert_tokens_to_ids(["[MASK]"]), list[int])

assert_type(Embedder.from_pretrained("folder", pooling="mean"), Embedder)
assert_type(Embedder(model, tokenizer, normalize=True).embed(["a text"]), np.ndarray[tuple[Any, ...], np.dtype[Any]])
assert_type(Embedder(model, tokenizer).embed_tokens([[1, 2]]), Tensor)
assert_type(FillMask.from_pretrained("folder")("a [MASK]", top_k=2), list[list[Candidate]])

assert_type(fastbert.accelerate(Live(), dtype=torch.bfloat16), Live)
assert_type(fastbert.refresh(Live()), Live)
assert_type(fastbert.restore(Live()), Live)
assert_type(fastbert.explain(model), Explanation)
assert_type(fastbert.compile(model, max_tokens=512), CompiledModel)
with fastbert.use_backend("native", "linear"):
    assert_type(fastbert.ops.linear(torch.ones(2, 3), torch.ones(4, 3), activation="gelu"), Tensor)
batch = fastbert.packing.full_batch(2, 8, torch.device("cpu"))
assert_type(batch, PackedBatch)
assert_type(fastbert.unpack(fastbert.pack(ids, batch), batch), Tensor)
"""
MISTAKES = """
from typing import assert_type

import torch
from torch import Tensor

import fastbert

ids = torch.ones(2, 8, dtype=torch.int64)
model = fastbert.BertModel.from_pretrained("folder")
model.from_pretrained()  # call-arg
model(inputs=ids)  # call-arg
model(ids, attention_mask=[[1, 1]])  # arg-type
model.save_pretrained("folder", max_size="1GB")  # call-arg
model(ids).pooler_output.shape  # union-attr
assert_type(model(ids).last_hidden_state, int)  # assert-type
fastbert.BertForMaskedLM.from_pretrained("folder", ignore_mismatched_sizes="all")  # arg-type
fastbert.BertForMaskedLM(model)  # arg-type
fastbert.accelerate(model, quantise="int8")  # call-arg
wrong: fastbert.BertForMaskedLM = fastbert.accelerate(model)  # assignment
fastbert.Embedder("folder")  # call-arg arg-type
fastbert.Embedder.from_pretrained("folder").embed("a text", batch_size=8)  # call-arg
fastbert.compile(model, max_graphs="8")  # arg-type
fastbert.ops.linear(ids, ids, activation=torch.nn.GELU())  # arg-type
fastbert.pack(ids)  # call-arg
fastbert.BertModels  # attr-defined
tensor: Tensor = fastbert.BertConfig().hidden_size  # assignment
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str, str]]]:
    """What mypy finds in each program: line, kind, message."""
    folder = tmp_path_factory.mktemp("programs")
    names = [*fastbert.__all__, *fastbert._MODULES, "__version__"]
    shown = "".join(f"reveal_type(fastbert.{name})\n" for name in names)
    programs = {"use": USE, "mistakes": MISTAKES, "names": f"import fastbert\n{shown}"}
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    files = [str(folder / f"{name}.py") for name in programs]
    command = [sys.executable, "-m", "mypy", "--show-error-codes", "--no-error-summary", "--no-pretty", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and not run.stderr, f"{run.stdout}\n{run.stderr}"
    lines: dict[str, list[tuple[int, str, str]]] = {name: [] for name in programs}
    for line in run.stdout.splitlines():
        match = re.fullmatch(r"(.+?):(\d+): (error|note): (.*)", line)
        assert match and Path(match[1]).stem in programs, line  # else the package itself has an error
        lines[Path(match[1]).stem].append((int(match[2]), match[3], match[4]))
    return lines


def test_a_users_program_is_typed(found: dict[str, list[tuple[int, str, str]]]) -> None:
    assert not [one for one in found["use"] if one[1] == "error"]


def test_mistakes_are_found(found: dict[str, list[tuple[int, str, str]]]) -> None:
    expected, codes = {}, {}
    for number, line in enumerate(MISTAKES.splitlines(), start=1):
        if "  # " in line:
            expected[number] = set(line.rpartition("  # ")[2].split())
    for number, kind, message in found["mistakes"]:
        if kind == "error":
            codes.setdefault(number, set()).add(message.rpartition("[")[2].rstrip("]"))
    assert codes == expected


def test_every_public_name_is_known(found: dict[str, list[tuple[int, str, str]]]) -> None:
    known = {line for line, _, message in found["names"] if "Revealed type" in message and '"Any"' not in message}
    assert known == set(range(2, 3 + len(fastbert.__all__) + len(fastbert._MODULES))), found["names"]
