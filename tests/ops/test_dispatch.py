"""Dispatch: preference, demands, reasons; and explain."""

import subprocess
import sys

import pytest
import torch
from support import require_native

import fastbert
from fastbert import ops
from fastbert.ops import dispatch


@pytest.fixture
def fake(monkeypatch):
    """An op `add_layer_norm` whose `native` version refuses tall inputs and says who ran."""
    ran = []

    def run(x, residual, weight, bias, *, eps, dropout_p):
        ran.append("native")
        return x

    def supports(x, *args, **kwargs):
        return "more than 4 rows" if x.shape[0] > 4 else None

    implementation = dispatch.Implementation(run, supports)
    monkeypatch.setitem(dispatch._implementations, ("add_layer_norm", "native"), implementation)
    return ran


def norm(rows):
    return ops.add_layer_norm(torch.zeros(rows, 3), None, torch.ones(3), torch.zeros(3), eps=1e-5)


def test_the_first_that_can_runs(fake):
    norm(4)
    assert fake == ["native"]
    norm(5)
    assert fake == ["native"]


def test_a_demand_runs_or_says_why(fake):
    with fastbert.use_backend("native", "add_layer_norm"):
        norm(4)
        with pytest.raises(
            fastbert.BackendError, match=r"add_layer_norm: backend 'native' cannot run.*more than 4 rows"
        ):
            norm(5)
        with fastbert.use_backend("auto"):
            norm(5)
    with fastbert.use_backend("reference"):
        norm(4)
    assert fake == ["native"]
    with (
        fastbert.use_backend("triton", "attention"),
        pytest.raises(fastbert.BackendError, match="'triton' has no version for cpu; there are native, reference"),
    ):
        ops.attention(torch.zeros(2, 3, 1, 4), torch.tensor([0, 2]), 2)


def test_an_exception_is_not_a_reason_to_fall_back(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    implementation = dispatch.Implementation(broken, dispatch.always)
    monkeypatch.setitem(dispatch._implementations, ("add_layer_norm", "native"), implementation)
    with pytest.raises(RuntimeError, match="a bug"):
        norm(2)


@pytest.mark.parametrize(("name", "op"), [("cuda", "linear"), ("native", "softmax")])
def test_unknown_names(name, op):
    with pytest.raises(ValueError, match="must be one of"), fastbert.use_backend(name, op):
        pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "no: reference is demanded"),
        ("add_layer_norm=reference,linear=reference", "no: reference is demanded"),
        ("tritn", "backend is 'tritn'; it must be one of triton, native, reference or auto"),
        ("linear", "backend is 'linear'"),
    ],
)
def test_environment(value, expected):
    code = "import fastbert; print(fastbert.explain())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**__import__("os").environ, "FASTBERT_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr


def test_explain_lists_every_op_with_a_verdict():
    report = fastbert.explain()
    assert {row[0] for row in report.rows} == set(dispatch.TABLE)
    for op in dispatch.TABLE:
        assert [row[3] for row in report.rows if row[0] == op and row[1] == "cpu"].count("yes") == 1
    assert "attention" in str(report) and str(report).splitlines()[0].split() == [
        "op",
        "device",
        "backend",
        "runs",
    ]


def test_explain_says_what_a_model_then_does():
    """The verdicts of fp32 inference are those of a real call."""
    require_native()
    ran = []
    for op in ("linear", "attention", "add_layer_norm", "encoder"):
        rows = [row for row in fastbert.explain().rows if row[:2] == (op, "cpu") and row[3] == "yes"]
        ran += [row[2] for row in rows]
    assert ran == ["native"] * 4
    model = fastbert.BertModel(fastbert.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)).eval()
    with torch.inference_mode(), fastbert.use_backend("native", "encoder"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_explain_of_a_model_asks_for_its_dtype():
    model = fastbert.BertModel(fastbert.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    rows = fastbert.explain(model.to(torch.float16)).rows
    native = [row[3] for row in rows if row[:3] == ("add_layer_norm", "cpu", "native")]
    assert native and native[0].startswith("no: ")


def test_every_table_entry_is_implemented():
    listed = {(op, name) for op, devices in dispatch.TABLE.items() for order in devices.values() for name in order}
    assert listed == set(dispatch._implementations)
    assert all(order[-1] == "reference" for devices in dispatch.TABLE.values() for order in devices.values())
