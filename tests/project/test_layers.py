"""Who may import whom: reads the imports of every file and holds the layers to them.

csrc  ->  native --+
kernels -----------+-> ops -> model -> inference, training, integrations -> tasks -> cli
reference ---------+      ^ packing, config, precision
"""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Parts of the package, and what they may import of it besides themselves. A part is a module or folder of
# fastbert/, `kernels`, or `_C`, the extension. A new one says here where it belongs.
LEAVES = {"checkpoint", "config", "families", "lazy", "packing", "precision", "progress", "reference", "weight"}
BELOW_MODEL = LEAVES | {"ops"}
ALL_OF_MODEL = BELOW_MODEL | {"diagnostics", "engine", "model", "tokenizer"}
MAY_IMPORT = {
    "kernels": set(),
    "engine": {"_C"},
    "native": {"engine", "weight"},
    "checkpoint": {"families"},
    "config": {"checkpoint", "families"},
    "families": set(),
    "lazy": set(),
    "packing": set(),
    "precision": set(),
    "progress": set(),
    "weight": set(),
    "reference": {"packing"},
    "tokenizer": {"checkpoint"},
    "ops": {"native", "kernels", "reference", "packing", "precision", "weight"},
    "model": BELOW_MODEL | {"engine"},
    "diagnostics": ALL_OF_MODEL | {"integrations", "native"},
    "inference": ALL_OF_MODEL,
    "light": {
        "__init__",
        "checkpoint",
        "config",
        "engine",
        "families",
        "inference",
        "lazy",
        "precision",
        "tasks",
        "tokenizer",
    },
    "serve": {"__init__", "checkpoint", "config", "inference", "lazy", "light", "tasks"},
    "training": ALL_OF_MODEL | {"inference", "tasks"},
    "integrations": ALL_OF_MODEL | {"inference"},
    "tasks": ALL_OF_MODEL | {"inference", "integrations"},
    "clusters": {"checkpoint", "inference", "lazy", "light", "serve", "tasks"},
    "cli": ALL_OF_MODEL | {"__init__", "inference", "light", "serve", "tasks", "training", "integrations", "native"},
    "__init__": ALL_OF_MODEL | {"inference", "light", "tasks", "training", "integrations"},
}
# Modules that are one layer together, or another than the folder that they are in.
PART_OF = {"__main__": "cli", "integrations.parquet": "clusters", "integrations.ray": "clusters"}
ABOVE_OPS = {"model", "inference", "training", "integrations", "tasks", "cli"}
THIRD_PARTY_OF_KERNELS = {"torch", "triton"}


def part_of(names):
    """The part of a module, by its names below fastbert."""
    return PART_OF.get(".".join(names[:2]), PART_OF.get(names[0], names[0]))


@cache
def files():
    """(part, path) of each Python file of the package."""
    found = [("kernels", path) for path in sorted((ROOT / "kernels").rglob("*.py"))]
    for path in sorted((ROOT / "fastbert").rglob("*.py")):
        found.append((part_of(path.relative_to(ROOT / "fastbert").with_suffix("").parts), path))
    return found


@cache
def tree(path):
    return ast.parse(path.read_text())


def at(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imports(path):
    """(node, dotted name) of everything a file imports, at its top or within a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{at(path, node)}: write imports out in full"
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def imported_parts(path):
    """(node, part) of what a file imports of fastbert; a name taken from fastbert itself is `__init__`."""
    known = {*MAY_IMPORT, *PART_OF, "_C"}
    for node, name in imports(path):
        top, *rest = name.split(".")
        if top == "kernels":
            yield node, "kernels"
        elif top == "fastbert":
            yield node, part_of(rest) if rest and rest[0] in known else "__init__"


def dotted(node):
    """`torch.cuda.is_available` of an expression like that, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def complain(problems):
    assert not problems, "\n" + "\n".join(dict.fromkeys(problems))


def test_every_part_has_a_place():
    unplaced = {part for part, _ in files()} - set(MAY_IMPORT)
    complain([f"fastbert/{part}: say in MAY_IMPORT or PART_OF what it may import" for part in sorted(unplaced)])


def test_imports_go_downwards():
    problems = []
    for part, path in files():
        allowed = MAY_IMPORT.get(part, set()) | {part}
        for node, target in imported_parts(path):
            if target not in allowed:
                problems.append(f"{at(path, node)}: {part} may not import {target}")
    complain(problems)


def test_no_import_runs_in_a_circle():
    """Of what is imported when a module is: imports within functions are for later."""
    homes = {}
    for part, path in files():
        base, name = (ROOT / "kernels", "fastbert.kernels") if part == "kernels" else (ROOT, "")
        dotted_path = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
        homes[f"{name}.{dotted_path}".strip(".")] = path

    def targets(path):
        for node in tree(path).body:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in homes else node.module

    graph = {name: {t for t in targets(path) if t in homes and t != name} for name, path in homes.items()}
    assert sum(map(len, graph.values())) > 100, "imports are not found"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_import_torch_triton_and_themselves():
    problems = []
    for part, path in files():
        if part != "kernels":
            continue
        for node, name in imports(path):
            top = name.split(".")[0]
            internal = name.startswith("fastbert.kernels.")
            standard = top in sys.stdlib_module_names and top != "os"
            if not (internal or standard or top in THIRD_PARTY_OF_KERNELS):
                problems.append(f"{at(path, node)}: a kernel imports {name}")
        for node in ast.walk(tree(path)):
            if dotted(node) in ("torch.nn.Module", "nn.Module", "torch.autograd.Function", "os.environ"):
                problems.append(f"{at(path, node)}: {dotted(node)} in a kernel file")
    complain(problems)


def test_only_ops_define_autograd_functions():
    problems = []
    for part, path in files():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ClassDef) or part == "ops":
                continue
            if any(dotted(base).split(".")[-1] == "Function" for base in node.bases):
                problems.append(f"{at(path, node)}: class {node.name}")
    complain(problems)


def test_nothing_above_ops_asks_what_the_machine_has():
    forbidden = re.compile(
        r"(cuda|mps|xpu)\.(is_available|device_count|get_device_(capability|properties|name))$|cpu\._?is_"
        r"|has_triton$|cpu_features$|cpu\.get_capabilities$"
    )
    problems = []
    for part, path in files():
        if part not in ABOVE_OPS:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and forbidden.search(dotted(node)) and part != "cli":
                problems.append(f"{at(path, node)}: {part} asks {dotted(node)}")
        for node, name in imports(path):
            if name.split(".")[0] == "triton":
                problems.append(f"{at(path, node)}: {part} imports triton")
    complain(problems)


def test_tests_and_benchmarks_are_imported_by_nothing():
    outside = {
        "tests",
        "benchmarks",
        *(p.stem for d in ("tests", "benchmarks") for p in (ROOT / d).rglob("*.py")),
    }
    problems = []
    for _, path in files():
        for node, name in imports(path):
            if name.split(".")[0] in outside:
                problems.append(f"{at(path, node)}: imports {name}")
    complain(problems)


def test_csrc_knows_neither_torch_nor_python():
    problems = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh", ".inc"):
            continue
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text()):
            foreign = re.match(r"(torch|ATen|c10|Python\.h|pybind11|numpy)", header)
            if foreign and (path.parent.name != "bindings" or foreign[1] in ("torch", "ATen", "c10")):
                problems.append(f"{path.relative_to(ROOT)}: includes {header}")
            per_isa = path.name.endswith("_rows.cpp") or path.name == "vec.h"
            if per_isa and re.fullmatch(r"cmath|algorithm|vector|string|memory", header):
                problems.append(f"{path.relative_to(ROOT)}: includes {header}, see csrc/README.md")
    complain(problems)


NOT_AT_IMPORT = ("triton", "transformers", "sentence_transformers", "matplotlib", "tokenizers", "safetensors")
NOT_AT_IMPORT += ("huggingface_hub", "pyarrow", "tqdm", "scipy", "sklearn", "pandas", "peft", "accelerate")


@pytest.fixture(scope="module")
def modules_after_import():
    # What torch brings along by itself is not ours to answer for.
    code = (
        "import sys, torch; before = set(sys.modules); import fastbert; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_fastbert_needs_torch_only(modules_after_import):
    complain([f"`import fastbert` imports {name}" for name in NOT_AT_IMPORT if name in modules_after_import])
    assert modules_after_import[-1] == "False", "`import fastbert` starts CUDA"
