"""The table of targets, on made-up rows."""

from __future__ import annotations

import harness
import pytest
from acceptance import targets

BASE = targets.encoder("bert-base", "8x128", "bf16")


def row(provider, dtype="bf16", *, speed=None, date="1", status="ok", **columns):
    found = dict.fromkeys(harness.COLUMNS) | BASE | {"provider": provider, "dtype": dtype, "date": date}
    return found | {"status": status, "tokens_per_s": speed, "device": "here"} | columns


def judge(rows, **settings):
    target = targets.Target("a line", BASE, 2.0, **{"peers": ("bf16",)} | settings)
    (verdict,) = targets.evaluate(rows, [target])
    return verdict


def test_held_and_missed():
    rows = [row("openvino", speed=50.0), row("transformers-sdpa", speed=10.0), row("fastbert", speed=100.0)]
    verdict = judge(rows)
    assert verdict.held and verdict.value == 2.0 and (verdict.best, verdict.best_name) == (50.0, "openvino bf16")
    assert not judge([*rows, row("onnxruntime", speed=50.1)]).held
    printed = targets.report([verdict, judge([*rows, row("onnxruntime", speed=60.0)])])
    assert "openvino bf16" in printed and "2.00" in printed and "  held" in printed and "MISSED" in printed
    assert printed.endswith("1 of 2 held")


def test_only_right_rows_of_the_precision_and_run_count():
    rows = [
        row("openvino", speed=50.0),
        row("openvino", "int8", speed=500.0),
        row("ctranslate2", speed=500.0, status="wrong: max error"),
        row("onnxruntime", speed=500.0, date="2"),
        row("ctranslate2", speed=500.0, shape="1x16"),
        row("torch-compile", speed=500.0, device="another machine"),
        row("fastbert-accelerate", speed=500.0),
        row("fastbert", speed=100.0),
    ]
    assert judge(rows).best == 50.0
    assert judge(rows, peers=targets.ANY).best_name == "openvino int8"


def test_padded_and_sorted_are_apart():
    rows = [row("openvino", speed=10.0), row("openvino-sorted", speed=40.0), row("fastbert", speed=60.0)]
    assert judge(rows, sorted_only=False).value == 6.0
    assert judge(rows, sorted_only=True).value == 1.5
    assert judge(rows).value == 1.5


def test_last_run_counts():
    rows = [row("openvino", speed=10.0), row("fastbert", speed=60.0)]
    rows += [row("openvino", speed=40.0, date="2"), row("fastbert", speed=60.0, date="2")]
    assert judge(rows).value == 1.5


@pytest.mark.parametrize("status", ["wrong: max error 1", "unsupported: no int8 yet"])
def test_row_without_a_time_is_missed(status):
    verdict = judge([row("openvino", speed=1.0), row("fastbert", status=status)])
    assert not verdict.held and status in targets.report([verdict])
    assert not judge([]).held and "no row" in targets.report([judge([])])
    assert not judge([row("fastbert", speed=9.0)]).held  # no one to compare with


def test_figures_and_upper_limits():
    rows = [row("fastbert", speed=1.0, tflops="2.3", p50_ms="340", peak_memory_mb="260", memory_floor_mb="200")]
    assert judge(rows, figure="tflops", peers=()).held
    assert not judge(rows, figure="p50_ms", peers=(), at_most=True).held
    verdict = judge(rows, figure="peak_memory_mb", peers=(), floor="memory_floor_mb", at_most=True)
    assert verdict.held and verdict.value == 1.3


def test_less_memory_than_the_leanest_and_other_providers():
    rows = [row("transformers-sdpa", peak_memory_mb="100"), row("torch-compile", peak_memory_mb="50")]
    rows += [row("fastbert", peak_memory_mb="40"), row("fastbert-graph", peak_memory_mb="60")]
    settings = {"figure": "peak_memory_mb", "at_most": True}
    assert judge(rows, **settings).value == 0.8
    assert judge(rows, **settings, against="transformers-*").value == 0.4
    assert judge(rows, **settings, provider="fastbert-graph").value == 1.2


def test_streaming_bound():
    where, _ = targets.STREAMED
    rows = [row("fastbert", **{k: v for k, v in where.items() if k != "dtype"}, p50_ms="17", read_gb_s="20")]
    assert "170 MB at 20.0 GB/s are 8.5 ms; it takes 17.0 ms, 2.0 times as long" in targets.streaming(rows)
    assert "no row" in targets.streaming([])


def test_every_line_of_the_issue_is_there(tmp_path, capsys):
    lines = [target.line for target in targets.TARGETS]
    assert len(set(lines)) == len(lines)
    for words in ("GEMM 768->3072", "bf16 32x512", "MiniLM bf16 32x128", "1x16, best int8", "int8 32x128"):
        assert any(words in line for line in lines), words
    for words in ("fp32-high 8x128", "fp32 8x128", "given padded", "given sorted", "start", "memory int8"):
        assert any(words in line for line in lines), words
    file = tmp_path / "rows.csv"
    harness.append_rows(file, [row("openvino", speed=1.0), row("fastbert", speed=5.0)])
    assert targets.main([str(file)]) == 1
    assert f"1 of {len(lines)} held" in capsys.readouterr().out
    assert targets.main([str(tmp_path / "missing.csv")]) == 1
