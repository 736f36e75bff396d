"""The public runtimes in the benchmark: how they are plugged in, how they are held, and what the ceiling is."""

from __future__ import annotations

import math
from importlib import metadata
from types import SimpleNamespace

import bench_encoder
import bench_gemm
import bench_memory
import bench_start
import encoders
import fresh
import harness
import machine
import peers
import pytest
import torch
import workload
from accuracy import root_mean_square
from peers import common
from support import require_native

from fastbert import native

CPU = torch.device("cpu")
RAGGED = [3, 9, 5, 1, 7, 2]


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    monkeypatch.setattr(machine, "ceiling", lambda device, dtype: (1e12, "a stand-in"))
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 10.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=99, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path))
    return tmp_path


def make_case(lengths, **settings) -> harness.Case:
    batch = workload.make_batch(lengths, 99, CPU)
    columns = dict(op="encoder", model="none", name="small", shape="2x2", fill=1.0, tokens=sum(lengths), flops=1e6)
    return harness.Case(**columns, payload=batch, **settings)


def states(inputs):
    """Stands in for a runtime: what a token's state is depends on its id and on its text's mask."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return ((ids * mask).float() / 10)[:, :, None].expand(-1, -1, 4)


def run_pair(load, lengths=RAGGED, limit=0.1):
    case = make_case(lengths)
    expected = case.payload.real(states(common.with_mask(case.payload)))
    providers = common.pair("runtime", "int8", load)
    rows = harness.Harness(CPU, seconds=0.0).run_case(
        case,
        providers,
        lambda provider: harness.Gate(
            expected, math.inf, harness.relative_gate(expected, limit).rms_error, case.payload.lengths
        ),
    )
    return {row["provider"]: row for row in rows}


def test_padded_and_sorted_give_the_same_states():
    shapes = []

    def load():
        def forward(inputs):
            shapes.append(tuple(inputs["input_ids"].shape))
            return states(inputs).numpy()

        return forward

    rows = run_pair(load, limit=0.0)
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    assert {row["dtype"] for row in rows.values()} == {"int8"}
    assert set(shapes) == {(6, 9), (4, 5), (2, 9)}
    assert all(row["pooled_cosine"] == pytest.approx(1) for row in rows.values())


def test_sorting_that_changes_nothing_says_so():
    for lengths, reason in (([4] * 8, "one length"), ([4, 5], "one small batch")):
        rows = run_pair(lambda: states, lengths)
        assert rows["runtime"]["status"] == "ok"
        assert reason in rows["runtime-sorted"]["status"] and rows["runtime-sorted"]["p50_ms"] is None


def test_planted_wrong_result_has_no_time():
    # Each state times 1.2, then one text's states exchanged with another's: far off, and in the sorted batches only.
    rows = run_pair(lambda: lambda inputs: states(inputs) * 1.2)
    for row in rows.values():
        assert row["status"].startswith("wrong: rms error") and row["p50_ms"] is None and row["tokens_per_s"] is None
        assert row["relative_error"] == pytest.approx(0.2, rel=1e-3)
    rows = run_pair(lambda: lambda inputs: states(inputs) if len(inputs["input_ids"]) == 6 else states(inputs).flip(0))
    assert rows["runtime"]["status"] == "ok" and rows["runtime-sorted"]["status"].startswith("wrong: rms error")


def test_not_installed_is_a_row_with_the_reason():
    provider = harness.Provider("runtime", lambda case: pytest.fail("prepared"), packages=("no_such_package",))
    (row,) = harness.Harness(CPU).run_case(make_case([2]), [provider], lambda provider: pytest.fail("no gate"))
    assert row["status"] == "unsupported: not installed: no_such_package"


def test_broken_runtime_does_not_take_the_others_along():
    def load():
        raise OSError("its library does not load")

    assert run_pair(load)["runtime"]["status"] == "failed: OSError: its library does not load"


def test_short_calls_are_made_once_untimed():
    calls = []
    provider = harness.Provider(
        "short", lambda case: harness.Prepared(lambda: calls.append(1), lambda _: torch.ones(1))
    )
    bench = harness.Harness(CPU, seconds=0.0, max_rounds=3, clock=lambda run, device: run() or 0.01)
    bench.run_case(make_case([2], min_rounds=3), [provider], lambda provider: harness.exact_gate(torch.ones(1)))
    assert len(calls) == 3 + 3 + 2  # the gate, memory, warm again; three timed; two before them


def test_class_gate_bounds_the_mean_not_one_element():
    expected = torch.linspace(-1, 1, 10_001)
    gate = harness.relative_gate(expected, 0.2)
    one_off = expected.clone()
    one_off[0] = 3
    assert gate.reason(one_off) is None and gate.reason(expected * 1.19) is None
    assert gate.reason(expected * 1.21).startswith("rms error")
    assert gate.reason(expected * float("nan")) is not None
    assert harness.pooled_cosine(torch.tensor([[1.0, 0], [0, 1]]), torch.eye(2)[[0, 0]], [1, 1]) == 0


def test_limits_by_precision_and_by_whose_it_is(tiny):
    found, case = encoders.Encoders(tiny, CPU), make_case([5, 3])
    expected = found.gate(case, harness.Provider("x", None, "fp32"))
    assert expected.max_error == 1e-5 and expected.lengths == [5, 3]
    size = root_mean_square(expected.expected)
    limits = {
        (public, dtype): found.gate(case, harness.Provider("x", None, dtype, public=public)).rms_error / size
        for public in (True, False)
        for dtype in ("fp32-high", "bf16", "int8")
        if (public, dtype) != (True, "fp32-high")
    }
    assert limits[True, "bf16"] == pytest.approx(0.03) and limits[True, "int8"] == pytest.approx(0.2)
    assert limits[False, "int8"] == pytest.approx(0.12) and limits[False, "fp32-high"] == pytest.approx(2e-5)
    assert 0 < limits[False, "bf16"] < 0.03


def test_providers_by_pattern():
    offered = [
        harness.Provider(name, None, dtype, packages=packages)
        for name, packages in (("transformers-sdpa", ()), ("openvino", ("no_such_package",)), ("fastbert", ()))
        for dtype in ("fp32", "bf16", "int8")
        if (name, dtype) != ("transformers-sdpa", "int8")
    ]

    def labels(patterns, dtypes):
        return [provider.label for provider in encoders.chosen(offered, patterns, dtypes)]

    assert labels(None, ["fp32"]) == ["transformers-sdpa-fp32", "fastbert-fp32"]
    baseline = ["transformers-sdpa-fp32", "transformers-sdpa-bf16"]  # int8 is compared with bf16
    assert labels(["openvino-int8"], ["fp32", "int8"]) == [*baseline, "openvino-int8"]
    assert labels(["open*", "fastbert"], ["bf16"]) == ["transformers-sdpa-bf16", "openvino-bf16", "fastbert-bf16"]
    with pytest.raises(ValueError, match="nothing fits typo"):
        labels(["typo", "fastbert"], ["fp32"])


def test_precision_unknown_to_this_fastbert_is_unsupported(tiny, monkeypatch):
    def from_pretrained(path, *, dtype=None, device=None, **overrides):
        pytest.fail("loaded all the same")

    for name in ("BertModel", "AutoModel"):
        monkeypatch.setattr(encoders.fastbert, name, SimpleNamespace(from_pretrained=from_pretrained))
    for dtype, word in (("int8", "quantize"), ("fp32-high", "precision")):
        with pytest.raises(harness.Unsupported, match=word):
            encoders.load_fastbert(tiny, dtype)


def test_precisions_reach_fastbert(tiny, monkeypatch):
    def from_pretrained(path, *, dtype=None, device=None, precision=None, quantize=None, **overrides):
        return dtype, precision, quantize

    for name in ("BertModel", "AutoModel"):
        monkeypatch.setattr(encoders.fastbert, name, SimpleNamespace(from_pretrained=from_pretrained))
    assert encoders.load_fastbert(tiny, "int8") == (torch.bfloat16, None, "int8")
    assert encoders.load_fastbert(tiny, "fp32-high") == (torch.float32, "high", None)


def test_conversion_is_done_once_and_a_failed_one_leaves_nothing(tiny, cache):
    source, made = peers.Source(tiny, CPU), []

    def convert(folder):
        made.append(folder)
        (folder / "graph").write_text("x")

    first = source.converted("kind", ("torch",), convert)
    assert source.converted("kind", ("torch",), convert) == first and len(made) == 1
    assert (first / "graph").read_text() == "x" and source.fingerprint in str(first)
    assert first.name == f"kind-torch{metadata.version('torch')}"

    def fail(folder):
        raise RuntimeError("no such op")

    with pytest.raises(RuntimeError, match="no such op"):
        source.converted("other", ("torch",), fail)
    assert list(first.parent.iterdir()) == [first]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ctranslate2"])
def test_runtime_on_a_tiny_model(runtime, tiny, cache):
    found = encoders.Encoders(tiny, CPU)
    providers = [
        p for p in found.providers() if p.name.startswith(runtime) and p.dtype in ("fp32", "bf16") and not p.missing()
    ]
    if not providers:
        pytest.skip(f"{runtime} is not installed")
    case = make_case(RAGGED)
    rows = harness.Harness(CPU, seconds=0.0).run_case(case, providers, lambda provider: found.gate(case, provider))
    status = {(row["provider"], row["dtype"]): row["status"] for row in rows}
    assert status[runtime, "fp32"] == status[f"{runtime}-sorted", "fp32"] == "ok"
    assert all(what == "ok" or what.startswith("unsupported") for what in status.values())


def test_target_cases_have_the_rows_of_the_table(tiny):
    config = SimpleNamespace(
        **{"vocab_size": 99, "max_position_embeddings": 512, "hidden_size": 32, "num_hidden_layers": 1},
        intermediate_size=64,
    )
    offered = encoders.Encoders(tiny, CPU).providers()
    for model, count in (("bert-base", 5), ("minilm", 3)):
        work = list(bench_encoder.target_work(bench_encoder.Cases(model, config, CPU), offered, None))
        assert len(work) == count
        for case, providers in work:
            labels = [provider.label for provider in providers]
            assert len(set(labels)) == len(labels) and "openvino-bf16" in labels and "fastbert-bf16" in labels
            assert ("openvino-sorted-bf16" in labels) == (case.name == "log-normal texts")


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_peak_is_a_rate_on_each_instruction_set(kind):
    """How large the rate is depends on the processor and on other processes, so no bound on it can hold here."""
    require_native()
    peaks = {isa: native.peak(kind, isa, 1) for isa in native.isas()} | {
        "two threads": native.peak(kind, native.isas()[0], 2)
    }
    assert all(math.isfinite(peak) and peak > 0 for peak in peaks.values()), peaks


def test_peak_refuses_what_it_cannot_measure():
    require_native()
    best = native.isas()[0]
    with pytest.raises(ValueError, match="no peak of kind 'fp8'"):
        native.peak("fp8", best, 1)
    with pytest.raises(ValueError, match="threads"):
        native.peak("fp32", best, 0)


@pytest.mark.slow
def test_no_peak_is_beyond_what_the_multipliers_do():
    """A multiply-add is one product of fp32 a word and at most four of bytes; without VNNI two, and a sum apart.

    Slow, as it holds two measured speeds against each other: a compiler that moved work out of one of the timed loops
    would show, and so would a neighbour who took the core during one of them only.
    """
    require_native()
    products = {"amx": 64, "avx512_bf16": 4, "avx512_vnni": 4}
    for isa in native.real_isas():
        int8, most = native.peak("int8", isa, 1), 1.3 * products.get(isa, 2)
        fp32 = [native.peak("fp32", isa, 1)]
        while int8 >= most * max(fp32) and len(fp32) < 8:  # a busy machine may have halved it
            fp32.append(native.peak("fp32", isa, 1))
        assert int8 < most * max(fp32), (isa, fp32, int8)
    best, most = native.real_isas()[0], 1.3 * products.get(native.real_isas()[0], 2)
    assert machine.cpu_peak("int8") < most * max(machine.cpu_peak("fp32") for _ in range(4)), best


def test_ceiling_only_grows(monkeypatch):
    require_native()
    monkeypatch.undo()  # the stand-ins
    monkeypatch.setattr(machine, "_peaks", {})
    measured = iter([2.0, 3.0, 1.0, 5.0])
    monkeypatch.setattr(machine.native, "real_isas", lambda: ["fast", "slow"])
    monkeypatch.setattr(machine.native, "peak", lambda kind, isa, threads: next(measured))
    assert machine.cpu_peak("fp32") == 3.0  # the better of the two instruction sets, which alone is asked again
    assert machine.cpu_peak("fp32") == 3.0
    assert machine.cpu_peak("fp32") == 5.0
    assert machine._peaks["fp32", torch.get_num_threads()] == (5.0, "slow")


def test_ceiling_of_each_precision(monkeypatch):
    require_native()
    monkeypatch.undo()
    peaks = {"fp32": 4.0, "bf16": 3.0, "int8": 1.0}  # where the small types are slower, the large one is the limit
    monkeypatch.setattr(machine, "cpu_peak", peaks.__getitem__)
    assert [machine.ceiling(CPU, dtype)[0] for dtype in ("fp32", "bf16", "int8", "fp32-high")] == [4.0] * 4
    peaks |= {"bf16": 60.0, "int8": 90.0}
    assert [machine.ceiling(CPU, dtype)[0] for dtype in ("fp32", "bf16", "int8", "fp32-high")] == [4.0, 60, 90, 20]


def test_gemm_rows(tmp_path):
    file = tmp_path / "gemm.csv"
    code = bench_gemm.main(["--rows", "3", "--seconds", "0", "--output", str(file)])
    rows = harness.read_rows(file)
    bad = {row["provider"] for row in rows if row["status"].startswith(("failed", "wrong"))}
    # Peers, which lack instructions or are wrong under some settings of torch's own (ONEDNN_MAX_CPU_ISA).
    assert code == bool(bad) and bad <= {"torch", "torch-packed"}
    assert {(row["case"], row["shape"]) for row in rows} == {("768->3072", "3x768x3072"), ("3072->768", "3x3072x768")}
    ran = {(row["provider"], row["dtype"]) for row in rows if row["status"] == "ok"}
    assert {("torch", "fp32"), ("fastbert", "fp32"), ("fastbert", "bf16"), ("fastbert", "int8")} <= ran


def test_fresh_process():
    done = fresh.run("held = torch.ones(64 << 20, dtype=torch.uint8)\nresult = [sys.argv[2], int(held[5])]", "word")
    assert done["result"] == ["word", 1] and done["seconds"] > 0
    assert done["peak_mb"] - done["before_mb"] > 60
    with pytest.raises(RuntimeError, match="NameError"):
        fresh.run("result = missing")


def test_memory_floor():
    config = SimpleNamespace(
        **{"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 30522},
        type_vocab_size=2,
        max_position_embeddings=512,
    )
    weights = 108_891_648  # BERT-base without its pooler
    assert bench_memory.floor_mb(config, "fp32", 0) == pytest.approx(4 * weights / 1e6)
    assert bench_memory.floor_mb(config, "bf16", 0) == pytest.approx(2 * weights / 1e6)
    assert bench_memory.floor_mb(config, "int8", 0) == pytest.approx((2 * weights - 84_934_656) / 1e6)
    assert bench_memory.floor_mb(config, "bf16", 10) > bench_memory.floor_mb(config, "bf16", 0)


def test_start_rows_hold_a_wrong_vector(monkeypatch, tmp_path, capsys):
    vectors = {"transformers": [1.0, 0.0], "fastbert.light": [1.0, 0.0], "openvino": [0.0, 1.0]}
    monkeypatch.setattr(bench_start, "fetch", lambda name: tmp_path)
    monkeypatch.setattr(bench_start, "converted", lambda folder, names: (dict.fromkeys(names, ""), {}))
    monkeypatch.setattr(bench_start, "PROGRAMS", {name: name for name in vectors})
    monkeypatch.setattr(bench_start, "whole", lambda name, *rest: (0.2, vectors[name] if rest[-1] == "time" else 100.0))
    file = tmp_path / "start.csv"
    assert bench_start.main(["--rounds", "2", "--output", str(file)]) == 0
    rows = {row["provider"]: row for row in harness.read_rows(file)}
    assert rows["fastbert.light"]["p50_ms"] == "200" and rows["fastbert.light"]["status"] == "ok"
    assert rows["openvino"]["status"].startswith("wrong: the vector differs") and not rows["openvino"]["p50_ms"]
    shown = capsys.readouterr().out
    assert "PASS fastbert.light: 200 ms (at most 250)" in shown and "PASS fastbert.light: 100 MB" in shown
    monkeypatch.setattr(bench_start, "whole", lambda name, *rest: (0.3, vectors[name] if rest[-1] == "time" else 130.0))
    assert bench_start.main(["--rounds", "2", "--output", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "MISS fastbert.light: 300 ms (at most 250)" in shown and "MISS fastbert.light: 130 MB" in shown


def test_a_whole_process_is_timed():
    seconds, vector = bench_start.whole("import time\ntime.sleep(0.2)\nresult = [1.0]", "folder", "", "kept", "time")
    assert vector == [1.0] and 0.2 < seconds < 20
    memory = bench_start.whole("again = lambda: None", "folder", "", "kept", "memory")[1]
    assert 1 < memory < 100
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bench_start.whole("1 / 0", "folder", "", "kept", "time")
