"""Builds the extension under sanitizers, next to the installed one, and runs tests on it: `make sanitize`.

    python tests/sanitize.py address [pytest arguments]   # AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/sanitize.py thread [pytest arguments]    # ThreadSanitizer
    python tests/sanitize.py                              # both

It needs Linux, GCC and cmake. This file is also the pytest plugin that puts the extension so built in the place of
the installed one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("ops/test_*native*.py", "native/test_[!c]*.py", "ops/test_packing.py")
FILES = [str(path) for pattern in TESTED for path in sorted((ROOT / "tests").glob(pattern))]
TESTS = {"address": FILES, "thread": [*FILES, "-k", "thread"]}
OPTIONS = {
    # Python frees little at its end. What torch and Python do with their own memory is not for us to judge either.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    # torch's threads meet in libgomp, which ThreadSanitizer does not see: what torch does is left out.
    "thread": {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1"},
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def build(kind: str) -> Path:
    """The extension under the sanitizers of `kind`, built or brought up to date."""
    folder = ROOT / "build" / "sanitize" / kind
    configure = [
        *("cmake", "-S", ROOT / "csrc", "-B", folder, f"-DFASTBERT_SANITIZE={kind}", "-DFASTBERT_CUDA=OFF"),
        "-DFASTBERT_AMX_EMULATION=ON",
        *(f"-DPython_EXECUTABLE={sys.executable}", "--log-level=WARNING"),
        f"-Dpybind11_DIR={output(sys.executable, '-m', 'pybind11', '--cmakedir')}",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "CXX": "g++"})
    subprocess.run(["cmake", "--build", folder, "--parallel", str(os.cpu_count())], check=True)
    extension = next(folder.glob("_C.*.so"))
    if kind == "thread":
        wanted = [name for name in output("nm", "-uD", str(extension)).split() if name.startswith(("GOMP_", "omp_"))]
        assert not wanted, f"tests/openmp_threads.cpp lacks {', '.join(wanted)}: libgomp itself would be taken"
    return extension


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(kind: str, extension: Path, arguments: list[str]) -> int:
    """pytest on `extension`; its exit code."""
    libraries = [output("g++", f"-print-file-name={name}") for name in (*RUNTIMES[kind], "libstdc++.so")]
    environment = {
        **os.environ,
        **OPTIONS[kind],
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(ROOT / "tests"),
        "FASTBERT_EXTENSION": str(extension),
        "FASTBERT_REQUIRE_NATIVE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sanitize", "-s", *(arguments or TESTS[kind])]
    # With its addresses drawn at random, a process may have none left where ThreadSanitizer wants its own.
    still = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*still, "true"], capture_output=True).returncode == 0:
        command = [*still, *command]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def main() -> int:
    for tool in ("cmake", "g++"):
        if not shutil.which(tool):
            print(f"make sanitize: no {tool} here", file=sys.stderr)
            return 1
    kinds, arguments = (sys.argv[1:2], sys.argv[2:]) if len(sys.argv) > 1 else (list(TESTS), [])
    for kind in kinds:
        print(f"== {kind}: building", flush=True)
        extension = build(kind)
        print(f"== {kind}: testing", flush=True)
        if code := run(kind, extension, arguments):
            return code
    return 0


def pytest_sessionstart() -> None:
    from fastbert.native import extension

    assert extension.C.__file__ == os.environ["FASTBERT_EXTENSION"], "the tests run on another extension"


def _load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("fastbert._C", path)
    sys.modules["fastbert._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
elif "FASTBERT_EXTENSION" in os.environ:
    _load(os.environ["FASTBERT_EXTENSION"])
