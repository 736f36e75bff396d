"""The command line: fill-mask, doctor, help."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from cli_support import run
from tiny_bert import save_tiny

import fastbert


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny_lm"), fastbert.BertForMaskedLM)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fill_mask_prints_a_table_or_json(tiny_lm, folder, capsys):
    from fastbert import FillMask

    texts = ["the [MASK] sat", "[MASK] cat [MASK]"]
    fill = FillMask.from_pretrained(tiny_lm)
    code, out, err = run(capsys, "fill-mask", tiny_lm, *texts, "--top-k", 2, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["text"], row["mask"]) for row in rows] == [(texts[0], 1), (texts[1], 1), (texts[1], 2)]
    expected = [candidates for text in texts for candidates in fill(text, top_k=2)]
    assert [[c["token"] for c in row["candidates"]] for row in rows] == [[c.token for c in e] for e in expected]
    code, out, _ = run(capsys, "fill-mask", tiny_lm, texts[0], "--top-k", 2)
    best = fill(texts[0], top_k=1)[0][0]
    assert code == 0 and len(out.splitlines()) == 3
    assert f"{best.probability:.1%}  {best.token}" in out and best.sequence in out


def test_fill_mask_errors(tiny, tiny_lm, folder, capsys):
    assert "no masked-language-model head" in run(capsys, "fill-mask", tiny, "a [MASK]")[2]
    code, _, err = run(capsys, "fill-mask", tiny_lm, "a cat")
    assert code == 1 and err == "fastbert: error: the text has no [MASK]: 'a cat'\n"


def test_doctor_names_versions_backends_and_reasons(capsys, monkeypatch):
    from fastbert import native
    from fastbert.native import extension

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for part in (fastbert.__version__, metadata.version("torch"), "transformers", "threads", "gpu", "  yes"):
        assert part in out, part
    assert (native.isa() in out) if native.available() is None else ("not built" in out)
    monkeypatch.setenv("FASTBERT_ISA", "sse9")
    extension.chosen_isa.cache_clear()
    assert "FASTBERT_ISA" in run(capsys, "doctor")[1]
    extension.chosen_isa.cache_clear()


def test_help_and_version(capsys):
    assert run(capsys, "--version") == (0, f"fastbert {fastbert.__version__}\n", "")
    for command in ([], ["embed"], ["fill-mask"], ["doctor"]):
        code, out, _ = run(capsys, *command, "--help")
        assert code == 0 and "example" in out and "fastbert " + " ".join(command) in out
    assert run(capsys)[0] == 2


def test_help_imports_nothing_that_takes_time():
    """Nor do the version and usage errors."""
    for arguments in (["--help"], ["embed", "--help"], ["--version"], ["embed"], ["embed", "--no-such-option"]):
        code = (
            "import sys, fastbert.cli.main\n"
            f"try: fastbert.cli.main.main({arguments})\nexcept SystemExit: pass\n"
            "new = {name.split('.')[0] for name in sys.modules}\n"
            "assert not new & {'torch', 'numpy', 'pyarrow', 'tokenizers', 'transformers', 'huggingface_hub'}, new"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
