"""transformers' common model tests, from its source package, with each BERT accelerated as it is built."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from assets import cache_root

HERE = Path(__file__).parent
TRANSFORMERS = "5.24.0", "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3"
PARAMETERIZED = "0.9.0", "4e0758e3d41bea3bbd05ec14fc2c24736723f243b28d702081aef438c9372b1b"
# Mixins that the source package lacks; their tests are not run.
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
EXCEPTIONS = {
    "test_can_capture_specific_layers_hidden_states": "captured layers hold other values at pads",
}


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


def outcomes(folder: Path, accelerated: bool, wheel: Path) -> tuple[dict[str, str], dict]:
    """Test -> outcome, failed where any of its subtests failed; and the driver's counts."""
    file = folder / f"outcomes-{accelerated:d}.jsonl"
    environment = os.environ | {
        "FASTBERT_OUTCOMES": str(file),
        "FASTBERT_ACCELERATE": f"{accelerated:d}",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(wheel)]),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_driver", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-c", os.devnull, "--rootdir=.", "tests/models/bert/test_modeling_bert.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    *lines, counts = map(json.loads, file.read_text().splitlines())
    found: dict[str, str] = {}
    for line in lines:
        if found.get(line["test"]) != "failed":
            found[line["test"]] = line["outcome"]
    return {test.split("::")[-1]: outcome for test, outcome in found.items()}, counts


@pytest.mark.slow
def test_common_model_tests_of_transformers(tmp_path):
    if version("transformers") != TRANSFORMERS[0]:
        pytest.skip(f"its tests are of {TRANSFORMERS[0]}, installed is {version('transformers')}")
    wheel = package("parameterized", PARAMETERIZED)
    with tarfile.open(package("transformers", TRANSFORMERS, "--no-binary=transformers")) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / f"transformers-{TRANSFORMERS[0]}"
    shutil.rmtree(folder / "src")  # the installed one is meant
    for relative, mixin in MISSING.items():
        (folder / "tests" / relative).parent.mkdir()
        (folder / "tests" / relative).write_text(f"class {mixin}: pass\n")
    target = folder / "tests/models/bert/test_modeling_bert.py"
    target.parent.mkdir(parents=True)
    shutil.copy(HERE / "upstream_bert.py", target)
    for relative in ("", "models", "models/bert", "exporters", "generation"):
        (folder / "tests" / relative / "__init__.py").touch()
    without, _ = outcomes(folder, False, wheel)
    fast, counts = outcomes(folder, True, wheel)
    passed = {test for test, outcome in without.items() if outcome == "passed"}
    assert len(passed) > 100 and counts["packed"] > 500, (len(passed), counts)
    worse = {test for test in passed if fast.get(test) != "passed"}
    assert worse <= set(EXCEPTIONS), sorted(worse - set(EXCEPTIONS))
