"""The tests of Triton kernels, where there is no GPU: in the interpreter, some files in each of a few processes."""

from pathlib import Path

import pytest
from triton_support import in_the_interpreter, run_in_the_interpreter

FILES = [file for file in sorted(Path(__file__).parent.glob("test_*triton*.py")) if "\n@runs\n" in file.read_text()]
PROCESSES = 4


def test_every_file_is_found():
    names = {file.stem.removeprefix("test_") for file in FILES}
    assert {"attention_triton", "linear_triton", "triton_model", "triton_dropout", "window_triton"} < names
    assert len(FILES) == 13


@in_the_interpreter
@pytest.mark.parametrize("process", range(PROCESSES))
def test_in_the_interpreter(process):
    run_in_the_interpreter(FILES[process::PROCESSES])


@in_the_interpreter
@pytest.mark.slow
def test_in_fp16():
    run_in_the_interpreter([file for file in FILES if '"dtype", DTYPES' in file.read_text()], "slow")
