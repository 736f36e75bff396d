"""The table of docs/families.md: each cell is tried here, and FASTBERT_WRITE_TABLE=1 writes it."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import test_jina_bert as jina
import torch
import transformers
from safetensors.torch import save_file
from test_families_live import CASES, CONFIGS, given, make, real
from test_triton_model import FAMILIES as IN_TRITON

import fastbert
from fastbert.families import FAMILIES
from fastbert.inference.graph_calls import Call, read_call

ROOT = Path(__file__).resolve().parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "families.md", "<!-- the table -->\n", "<!-- its end -->\n"
WRITE = "FASTBERT_WRITE_TABLE"
TITLES = (
    "family",
    "inference",
    "training",
    "bf16",
    "int8",
    "GPU",
    "CUDA graphs",
    "heads, live",
    "heads, own",
    "weights tried",
)
# Real weights that a test of this project runs.
WEIGHTS = {"bert": "all-MiniLM-L6-v2, bert-base-chinese", "mpnet": "all-mpnet-base-v2"}
SHORT = {
    "ForMaskedLM": "masked words",
    "ForPreTraining": "pre-training",
    "ForSequenceClassification": "texts",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answers",
    "ForMultipleChoice": "choices",
}


def distance(a, b):
    """The largest error of the fields of two outputs, by the largest value of each, or by 1."""
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1)) for name in b)


def outputs(model, inputs, head):
    with torch.no_grad():
        found = model(**inputs)
    return {name: real(x, inputs, head).float() for name, x in found.items()}


@cache
def pair(name, head):
    """transformers' model, its accelerated copy, and fastbert's own from its folder (None where there is none)."""
    theirs = make(name, head)
    kind = getattr(fastbert, f"AutoModel{head.removeprefix('Model')}")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, fastbert.accelerate(copy.deepcopy(theirs)), kind.from_pretrained(folder)


def same_numbers(name, head, own):
    theirs, *ours = pair(name, head)
    inputs = given(theirs, head, "right")
    return distance(outputs(ours[own], inputs, head), outputs(theirs, inputs, head)) < 1e-5


def same_gradients(name):
    found = []
    for model in pair(name, "ForTokenClassification"):
        model = copy.deepcopy(model)
        inputs = given(model, "ForTokenClassification", "right")
        labels = torch.ones_like(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        found.append({where: p.grad for where, p in model.named_parameters() if p.grad is not None})
    total = sum(g.norm() ** 2 for g in found[0].values()).sqrt()
    return all((g[where] - found[0][where]).norm() < 1e-5 * total for g in found[1:] for where in found[0])


def close_in(name, **setting):
    theirs = pair(name, "Model")[0]
    inputs = given(theirs, "Model", "right")
    fast = fastbert.accelerate(copy.deepcopy(theirs), **setting)
    return distance(outputs(fast, inputs, "Model"), outputs(theirs, inputs, "Model")) < 0.05


def a_graph_takes_it(name):
    model = pair(name, "Model")[2]
    inputs = given(model, "Model", "right")
    return isinstance(read_call(model, inputs["input_ids"], inputs["attention_mask"], None, None, None, None), Call)


def row(name):
    family = FAMILIES[name]
    heads = [head for case, head in CASES if case == name and head != "Model"]
    kinds = [", ".join(SHORT[head] for head in heads if same_numbers(name, head, own)) for own in (False, True)]
    cells = (
        all(same_numbers(name, "Model", own) for own in (False, True)),
        same_gradients(name),
        close_in(name, dtype=torch.bfloat16),
        close_in(name, quantize="int8"),
        a_graph_takes_it(name),
    )
    marks = ["yes" if cell else "no" for cell in cells]
    marks.insert(-1, "emulated" if name in IN_TRITON else "no")
    return f"{family.base} (`{name}`)", *marks, *kinds, WEIGHTS.get(name, "none")


def row_of_jina():
    """JinaBERT v2 on its own, against the reference of its test: transformers has no class of it."""
    state, head = jina.weights()
    ids, mask, types = jina.inputs("right")
    with tempfile.TemporaryDirectory() as folder:
        save_file({**{f"bert.{name}": x for name, x in state.items()}, **head}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(jina.CONFIG))
        load = fastbert.AutoModel.from_pretrained
        model, rounded, quantized = load(folder), load(folder, dtype=torch.bfloat16), load(folder, quantize="int8")
        with_head = fastbert.AutoModelForMaskedLM.from_pretrained(folder)

    def states(of):
        return {"x": of(ids, attention_mask=mask, token_type_ids=types).last_hidden_state[mask == 1].float()}

    words = state["embeddings.word_embeddings.weight"].requires_grad_()
    exact = {"x": jina.reference(state, ids, mask, types)[mask == 1]}
    mine = states(model)
    ours, theirs = (
        torch.autograd.grad(x["x"].square().sum(), table)[0]
        for x, table in ((mine, model.get_input_embeddings().weight), (exact, words))
    )
    with torch.no_grad():
        close = [distance(states(of), exact) < 0.05 for of in (rounded, quantized)]
        logits = with_head(ids, attention_mask=mask, token_type_ids=types).logits[mask == 1]
        expected = jina.masked_lm(state, head, exact["x"])
    marks = [distance(mine, exact) < 2e-5, bool((ours - theirs).norm() < 1e-5 * theirs.norm()), *close]
    marks = ["yes" if mark else "no" for mark in marks]
    graph = isinstance(read_call(model, ids, mask, types, None, None, None), Call)
    heads = SHORT["ForMaskedLM"] if distance({"x": logits}, {"x": expected}) < 2e-5 else ""
    marks += ["emulated" if "jina_bert" in IN_TRITON else "no", "yes" if graph else "no"]
    return "JinaBERT v2 (`jina_bert`)", *marks, "no class", heads, "none"


def table():
    rows = [*(row(name) for name in CONFIGS if " " not in name), row_of_jina()]
    lines = [TITLES, ["---"] * len(TITLES), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def test_the_table_is_what_passes():
    transformers.logging.set_verbosity_error()
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    written, after = rest.split(END)
    passes = table()
    if os.environ.get(WRITE):
        PAGE.write_text(f"{before}{BEGIN}\n{passes}\n{END}{after}", encoding="utf-8")
    else:
        assert written.strip() == passes.strip(), f"{WRITE}=1 in the environment of this test writes it again"


def test_a_family_is_data_of_at_most_200_lines():
    for file in (ROOT / "fastbert" / "families").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 200, file
