"""What is installed: the files of a wheel, life next to the package `kernels`, builds without a compiler."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastbert

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

can_build = pytest.mark.skipif(
    not importlib.util.find_spec("scikit_build_core"), reason="scikit-build-core is not installed"
)


def run_python(code, *arguments, cwd, **env):
    """Runs code in a fresh interpreter; the finished process."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTBERT_REQUIRE_NATIVE")} | env
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def output(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def build_wheel(folder, settings=None, **env):
    """Builds a wheel of the checkout into `folder`; the finished process and the wheel, or None."""
    code = (
        "import sys; from scikit_build_core.build import build_wheel\n"
        f"print(build_wheel(sys.argv[1], {settings or {}}))"
    )
    done = run_python(code, folder, cwd=ROOT, **env)
    return done, next(folder.glob("*.whl"), None)


def test_kernels_is_a_namespace_folder():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's package `kernels`"


def test_no_torch_to_build_with():
    assert not [r for r in PROJECT["build-system"]["requires"] if r.startswith("torch")]


def test_peers_are_an_extra_of_their_own():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [r for name, requirements in extras.items() if name != "peers" for r in requirements]
    runtimes = ("openvino", "onnx", "nncf", "ctranslate2")
    assert not [r for r in [*wanted, *PROJECT["project"]["dependencies"]] if r.startswith(runtimes) or "peers" in r]


def test_version_and_name():
    assert importlib.metadata.version("fastbert-engine") == fastbert.__version__


def test_beside_another_package_called_kernels(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("STAND_IN = True\n")
    code = (
        "import kernels; assert kernels.STAND_IN\n"
        "import fastbert, fastbert.kernels.add_layer_norm as k\n"
        "print(k.__name__, sys.modules['kernels'] is kernels)"
    )
    for path in ([tmp_path, ROOT], [ROOT, tmp_path]):  # a regular package wins wherever it stands
        prefix = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n"
        assert output(run_python(prefix + code, cwd=tmp_path)) == "fastbert.kernels.add_layer_norm True"


def test_transformers_imports_from_the_checkout():
    pytest.importorskip("transformers")
    assert output(run_python("from transformers import BertModel; print('fine')", cwd=ROOT)) == "fine"


@can_build
def test_files_of_the_wheel(tmp_path):
    done, wheel = build_wheel(tmp_path, {"wheel.cmake": "false"})
    output(done)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"fastbert_engine-{fastbert.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"fastbert", info}
    assert {"fastbert/__init__.py", "fastbert/py.typed", "fastbert/kernels/add_layer_norm.py"} <= names
    assert "fastbert/kernels/__init__.py" not in names
    sources = {f"fastbert/{p.relative_to(ROOT / 'fastbert')}" for p in (ROOT / "fastbert").rglob("*.py")}
    assert sources <= names
    assert not [name for name in names if name.endswith((".md", ".cpp", ".cu", ".pyc", ".so"))]
    assert "fastbert = fastbert.cli.main:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata and f"{info}/licenses/LICENSE" in names


# Stands in for an installation of the wheel: its files first, the editable install out of the way.
UNPACKED = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable_")]
sys.path.insert(0, sys.argv[1])
import torch, fastbert
from fastbert import native
assert fastbert.__file__.startswith(sys.argv[1]), fastbert.__file__
x = torch.ones(2, 8)
assert native.supports_add_layer_norm(x, x, x[0], x[0], eps=1e-12) == native.available()
assert native.isa() == "none" and native.isas() == [] and not native.has_cuda()
config = fastbert.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
print(fastbert.BertModel(config).eval()(torch.ones(1, 3, dtype=torch.int64)).last_hidden_state.shape)
print(native.available())
"""


@can_build
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_no_compiler_gives_a_wheel_that_works(tmp_path):
    broken = {"CC": "/bin/false", "CXX": "/bin/false", "FASTBERT_CUDA": "OFF"}
    done, wheel = build_wheel(tmp_path, **broken)
    output(done)
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shape, reason = output(run_python(UNPACKED, tmp_path / "site", cwd=tmp_path)).splitlines()
    assert shape == "torch.Size([1, 3, 8])"
    assert reason.startswith("native: not built")


@can_build
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_no_compiler_is_fatal_where_native_is_demanded(tmp_path):
    broken = {"CC": "/bin/false", "CXX": "/bin/false", "FASTBERT_CUDA": "OFF"}
    done, wheel = build_wheel(tmp_path, **broken, FASTBERT_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and wheel is None
    assert "CMake configuration failed" in done.stdout + done.stderr
