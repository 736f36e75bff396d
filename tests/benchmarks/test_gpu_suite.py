"""The GPU suite without a GPU: its scripts at tiny sizes, what they must not let through, its targets, its command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_gpu_models
import bench_gpu_ops
import bench_gpu_training
import harness
import pytest
import torch
import tune_attention
from acceptance import gpu_targets
from gpu_suite import Settings

from fastbert import reference, use_backend
from fastbert.ops import dispatch

COMMAND = Path(__file__).parents[2] / "benchmarks" / "acceptance" / "gpu.sh"
# The figures that must hold on an H200, by what stands in their line.
WANTED = [
    *(("attention forward 512, TFLOP/s", 340), ("attention forward 2048, TFLOP/s", 400)),
    ("attention forward 16384, TFLOP/s", 480),
    *((f"attention forward {length}, best of torch", 1) for length in (512, 2048, 16384)),
    *(("attention backward 512", 240), ("attention backward 2048", 330)),
    *((f"add_layer_norm forward N {width}", 0.85) for width in (768, 1024)),
    *((f"add_layer_norm backward N {width}", 0.75) for width in (768, 1024)),
    ("BERT-base bf16 128x128", 3.0e6),
    *(("BERT-large bf16 SQuAD", 5400), ("BERT-large int8 SQuAD", 8200)),
    ("BERT-base N(256, 64)", 2),
    *(("1x128 by a graph, ms", 0.45), ("1x16 by a graph, transformers eager", 12)),
    *(("1x16 eager", 1), ("1x128 eager", 1)),
    *(("training step, tokens/s", 205e3), ("training step, best of transformers", 1.5)),
    *(("training step, memory", 0.6), ("bit-equal", 0)),
]


def run_tiny(script, file, *arguments) -> tuple[int, list[dict[str, str]]]:
    status = script.main(["--tiny", "--device", "cpu", "--seconds", "0", "--output", str(file), *arguments])
    return status, harness.read_rows(file)


def statuses(rows) -> set[str]:
    return {row["status"].split(":")[0] for row in rows}


def test_ops(tmp_path, capsys):
    status, rows = run_tiny(bench_gpu_ops, tmp_path / "ops.csv")
    assert status == 0, capsys.readouterr().out
    assert statuses(rows) == {"ok", "unsupported"}
    assert {row["provider"] for row in rows if row["status"] != "ok"} == {"torch-varlen"}
    cases = {(row["op"], row["mode"]) for row in rows if row["provider"] == "fastbert"}
    apart = ("attention", "add_layer_norm", "linear", "embed_layer_norm")
    assert cases == {
        *((op, mode) for op in apart for mode in ("forward", "backward")),
        *(("linear_cross_entropy", mode) for mode in ("forward", "forward+backward")),
    }
    assert {row["op"] for row in rows} == {"copy", "matmul", "linear_cross_entropy", *apart}
    for row in rows:
        if row["status"] == "ok":
            by_memory = row["op"] in ("copy", "add_layer_norm", "embed_layer_norm")
            assert float(row["gb_per_s" if by_memory else "tflops"]) > 0
            assert not row["ceiling_share"]  # a tiny run measures none


def test_models(tmp_path, capsys):
    status, rows = run_tiny(bench_gpu_models, tmp_path / "models.csv")
    assert status == 0, capsys.readouterr().out
    assert statuses(rows) == {"ok", "unsupported"}
    assert {row["case"] for row in rows} == {
        *("full", "one text", "one text, mask of ones", "lengths N(256, 64)", "SQuAD-like lengths")
    }
    for name in ("full", "lengths N(256, 64)", "SQuAD-like lengths", "one text"):
        assert any(row["status"] == "ok" for row in rows if (row["case"], row["provider"]) == (name, "fastbert")), name
    assert any(row["status"] == "ok" for row in rows if row["provider"] == "torch-compile-layers")


def test_training(tmp_path, capsys):
    status, rows = run_tiny(bench_gpu_training, tmp_path / "training.csv")
    assert status == 0, capsys.readouterr().out
    ok = {(row["op"], row["provider"]) for row in rows if row["status"] == "ok"}
    expected = {("training step", name) for name in ("fastbert", "transformers-sdpa", "torch-compile-layers")}
    assert ok >= {*expected, ("determinism", "fastbert")}


def test_planted_bugs_are_caught(tmp_path, monkeypatch):
    linear = dispatch._implementations["linear", "reference"].run
    broken = dispatch.Implementation(lambda *a, **k: linear(*a, **k) * 1.03, dispatch.always)
    with monkeypatch.context() as patch, use_backend("reference"):
        patch.setitem(dispatch._implementations, ("linear", "reference"), broken)
        status, rows = run_tiny(bench_gpu_ops, tmp_path / "ops.csv", "--subjects", "linear")
        assert status == 1
        assert all(row["status"].startswith("wrong") == (row["provider"] == "fastbert") for row in rows)
        status, rows = run_tiny(bench_gpu_training, tmp_path / "step.csv", "--subjects", "step")
        assert status == 1
        wrong = [row["provider"] for row in rows if row["status"].startswith("wrong")]
        assert wrong == ["fastbert", "fastbert-recompute"]
    for name, value in (("DROPOUT", 0.0), ("SEED", None)):  # no dropout at all; another seed each time
        with monkeypatch.context() as patch:
            if value is None:
                patch.setattr(torch, "manual_seed", lambda seed: torch.seed())
            else:
                patch.setattr(bench_gpu_training, name, value)
            file = tmp_path / f"{name}.csv"
            status, rows = run_tiny(bench_gpu_training, file, "--subjects", "determinism")
            assert status == 1 and statuses(rows) == {"wrong"}, name


@pytest.mark.parametrize("op", ["embed_layer_norm", "linear_cross_entropy"])
def test_op_that_is_off_by_little_is_caught(tmp_path, monkeypatch, op):
    right = getattr(reference, op)
    broken = dispatch.Implementation(lambda *a, **k: right(*a, **k) * 1.03, dispatch.always)
    monkeypatch.setitem(dispatch._implementations, (op, "reference"), broken)
    with use_backend("reference"):
        status, rows = run_tiny(bench_gpu_ops, tmp_path / "ops.csv", "--subjects", op)
    assert status == 1 and len(rows) == 4
    assert all(row["status"].startswith("wrong") == (row["provider"] == "fastbert") for row in rows)


def test_embeddings_count_each_row_that_occurs_once(monkeypatch):
    """2 bytes an element of y and of the rows read, 24 a token of ids; backward the gradients of whole tables."""
    monkeypatch.setattr(torch, "randint", lambda high, size, **kwargs: torch.arange(size[0]) % 7)
    forward, backward = (
        work.case.bytes for work in bench_gpu_ops.embed_layer_norm(Settings(torch.device("cpu"), tiny=True))
    )
    assert forward == 2 * 32 * (64 + 7 + 2 + 16) + 24 * 64
    assert backward - forward == 2 * 32 * (100 + 2 + 16)


def test_dropout_that_drops_too_much_is_caught(tmp_path, monkeypatch):
    def doubled(*args, dropout_p, **kwargs):
        return reference.add_layer_norm(*args, dropout_p=2 * dropout_p, **kwargs)

    monkeypatch.setitem(
        dispatch._implementations, ("add_layer_norm", "reference"), dispatch.Implementation(doubled, dispatch.always)
    )
    with use_backend("reference"):
        _, rows = run_tiny(bench_gpu_ops, tmp_path / "rows.csv", "--subjects", "add_layer_norm")
    wrong = {(row["case"], row["mode"]) for row in rows if row["status"].startswith("wrong")}
    assert wrong == {("N 32, dropout 0.1", "backward")}


def test_graph_that_ran_eagerly_is_no_figure(monkeypatch):
    def eagerly(**inputs):
        return None

    eagerly.outside = {"more tokens than any graph": 1}
    runs = object.__new__(bench_gpu_models.Runs)
    runs.settings = Settings(torch.device("cuda"))
    monkeypatch.setattr(runs, "fastbert", lambda dtype: None, raising=False)
    monkeypatch.setattr(bench_gpu_models.fastbert, "compile", lambda model: eagerly, raising=False)
    case = harness.Case("encoder", "", "one text", "1x16", 1.0, 16, 1.0, payload=SimpleNamespace(inputs={}))
    with pytest.raises(harness.Unsupported, match="more tokens than any graph"):
        runs.graph(case)


def test_peers_alone(tmp_path):
    status, rows = run_tiny(bench_gpu_ops, tmp_path / "ops.csv", "--peers", "--subjects", "ceilings", "attention")
    assert status == 0
    assert {row["provider"] for row in rows} == {"torch", "torch-sdpa-math", "torch-varlen"}


def test_subject_that_breaks_leaves_the_others(tmp_path, monkeypatch, capsys):
    def breaks(settings):
        raise MemoryError("no room for the reference")

    monkeypatch.setitem(bench_gpu_ops.SUBJECTS, "attention", breaks)
    status, rows = run_tiny(bench_gpu_ops, tmp_path / "ops.csv", "--subjects", "attention", "ceilings")
    assert status == 1 and {row["op"] for row in rows} == {"copy", "matmul"}
    assert "broken off: attention" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert bench_gpu_ops.main(["--output", str(tmp_path / "rows.csv")]) == 1
    assert "no GPU here; --tiny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def held_rows() -> list[dict]:
    """For every target a row of fastbert's that holds it, and of a peer's where it names any."""
    rows: dict[tuple, dict] = {}
    for target in gpu_targets.TARGETS:
        names = {target.provider: {target.figure: target.wanted * (100 if target.peers else 1)}}
        if target.peers:
            names["transformers-eager"] = {"tokens_per_s": 100.0, "tflops": 100.0, "peak_memory_mb": 100.0}
        for provider, figures in names.items():
            empty = dict.fromkeys(harness.COLUMNS) | {"status": "ok", "date": "1", "device": "here"}
            row = rows.setdefault((provider, *target.where.items()), empty | target.where | {"provider": provider})
            row |= {name: max(figure, row[name] or 0.0) for name, figure in figures.items()}
    return list(rows.values())


def test_every_line_has_its_target():
    lines = {target.line: target for target in gpu_targets.TARGETS}
    assert len(lines) == len(gpu_targets.TARGETS) == len(WANTED)
    for words, wanted in WANTED:
        (found,) = [target for line, target in lines.items() if words in line]
        assert found.wanted == wanted, words


def test_targets_find_the_rows_of_the_suite(tmp_path, monkeypatch):
    """Each target's row is one that a script writes: op, mode, case and dtype, sizes apart."""
    written = set()
    monkeypatch.setattr(harness.Harness, "run_case", lambda self, case, providers, gate: written.update(
        (case.op, case.mode, case.name, p.dtype, p.name) for p in providers) or [])  # fmt: skip
    for script in (bench_gpu_models, bench_gpu_training):
        assert script.main(["--tiny", "--device", "cpu", "--output", str(tmp_path / "rows.csv")]) == 0
    for target in gpu_targets.TARGETS:
        where = target.where
        if where["op"] in ("attention", "add_layer_norm"):  # their names hold sizes
            name, size = where["case"].split()
            known = bench_gpu_ops.ATTENTION_LENGTHS if name == "length" else [n for n, _ in bench_gpu_ops.NORMS]
            assert int(size) in known
            continue
        assert any(
            target.provider == name and where["op"] == op and where.get("case", case) == case
            and where.get("dtype", dtype) == dtype
            for op, _, case, dtype, name in written
        ), target.line  # fmt: skip


def test_command_is_bash_and_refuses_what_it_does_not_know():
    assert os.access(COMMAND, os.X_OK)
    assert subprocess.run(["bash", "-n", COMMAND]).returncode == 0
    for arguments in (["--quick"], ["--stages", "build dance"]):
        done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and arguments[-1].split()[-1] in done.stderr
    usage = subprocess.run([COMMAND, "--help"], capture_output=True, text=True)
    assert usage.returncode == 0 and "--peers" in usage.stdout


def test_command_judges_and_lays_out_a_package(tmp_path, capsys):
    rows, count, results = held_rows(), len(WANTED), tmp_path / "results"
    harness.append_rows(results / "gpu-ops.csv", rows)
    environment = os.environ | {"PYTHON": sys.executable, "BUILD": str(tmp_path / "build")}
    command = [COMMAND, "--stages", "targets", results]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert f"{count} of {count} held" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0 and (results / "gpu.log").read_text() == done.stdout
    package = tmp_path / "build" / "site" / "fastbert"
    assert (package / "__init__.py").is_file() and (package / "kernels" / "architecture.py").is_file()

    missed = tmp_path / "missed.csv"
    harness.append_rows(missed, [row for row in rows if row["op"] != "determinism"])
    assert gpu_targets.main([str(missed)]) == 1
    assert f"{count - 1} of {count} held" in capsys.readouterr().out


@pytest.mark.slow
def test_command_tunes(tmp_path):
    """Its table is one that kernels/linear_table.py reads; of attention every candidate is right and timed."""
    pytest.importorskip("triton")
    from fastbert.kernels import configs, linear_table

    environment = os.environ | {"PYTHON": sys.executable, "BUILD": str(tmp_path / "build")}
    command = [COMMAND, "--tiny", "--stages", "tune", tmp_path / "results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    committed = {row.key for row in linear_table.read(linear_table.FILE)}
    new = [row for row in linear_table.read(tmp_path / "results/linear_table.csv") if row.key not in committed]
    assert {row.keeps_z for row in new} == {False, True} and len(new) == 2
    for row in new:
        (tile,) = configs.linear_tiles(row.architecture)
        assert row.tile == (tile if row.triton_us < row.cublas_us else None)
    rows = harness.read_rows(tmp_path / "results/tune-attention.csv")
    assert statuses(rows) == {"ok"}
    found = {(row["model"], row["mode"], row["provider"].split()[0]) for row in rows}
    kernels = {"forward": ("configs.py", "fwd"), "backward": ("configs.py", "dq", "dkdv", "one")}
    assert found == {(f"H1 D{d}", mode, kernel) for d in (32, 64) for mode in kernels for kernel in kernels[mode]}


def test_candidates_suit_their_lengths():
    assert len(tune_attention.LENGTHS) == 4
    for head_dim in (32, 64):
        for length in tune_attention.LENGTHS:
            found = tune_attention.candidates(head_dim, length)
            assert len({str(c) for c in found}) == len(found)
            assert {c.kernel for c in found} == {"fwd", "dq", "dkdv", *(["one"] if length == 128 else [])}
            assert {c.config.tma for c in found} == {length > 128} and max(c.block for c in found) <= length


def test_command_goes_on_after_a_stage_that_fails(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncase $* in *bench_gpu_ops*) exit 3;; *bench_gpu_models*) sleep 60;; esac\n")
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "BUILD": str(tmp_path / "build"), "BUDGET": "12"}
    command = [COMMAND, "--stages", "ops models training", tmp_path / "results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    verdicts = {line.split()[0]: line.split(" s  ")[1] for line in done.stdout.splitlines() if " s  " in line}
    assert done.returncode == 1 and verdicts["ops"] == "failed (3)", done.stdout + done.stderr
    assert verdicts["models"].startswith("out of time") and set(verdicts) == {"ops", "models", "training"}
