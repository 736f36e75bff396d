"""Fixtures that the whole suite shares: real weights and data, and small random models."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, which reads it then: a thread that waits for the others sleeps. By default it spins for
# milliseconds, on a core that another process of `make test` has work for. Processes that a test starts have it too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from support import ISAS, force_isa, require_native

from fastbert import native
from fastbert.native import extension

# Before transformers is imported anywhere: nothing here may ask a hub.
warnings.filterwarnings("ignore", message=".*newly initialised.*")


# The threads that a test's tensors run on, `all_cores` tests included: 1 by default (all cores for those), or 2, 3, ...
# to see that no result depends on the number. Processes that a test starts follow OMP_NUM_THREADS: set both.
THREADS = os.environ.get("FASTBERT_TEST_THREADS")


def pytest_collection_finish() -> None:
    """What has been loaded by now lives to the end: a search for garbage, every few tests, need not walk it."""
    gc.collect()
    gc.freeze()


def _asset(name: str) -> Path:
    from assets import AssetUnavailable, fetch

    try:
        return fetch(name)
    except AssetUnavailable as reason:
        pytest.skip(f"{name} cannot be had: {reason}")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    return _asset("minilm")


@pytest.fixture(scope="session")
def mpnet() -> Path:
    """The folder of the real all-mpnet-base-v2."""
    return _asset("mpnet")


@pytest.fixture(scope="session")
def antiberty() -> Path:
    """The folder of a real protein BERT with its masked-language-model head."""
    return _asset("antiberty")


@pytest.fixture(scope="session")
def chinese_bert() -> Path:
    """The folder of a real Chinese BERT, as TorchScript."""
    return _asset("chinese-bert")


@pytest.fixture(scope="session")
def stsb() -> Path:
    """The folder with the STS-B csv files."""
    return _asset("stsb")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small tensors gain nothing from threads and lose much on a busy machine; `all_cores` lifts it."""
    before = torch.get_num_threads()
    if THREADS or "all_cores" not in request.fixturenames:
        torch.set_num_threads(int(THREADS or 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def all_cores() -> None:
    """For a test that runs a real model."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set that this machine has, forced."""
    require_native()
    if request.param not in native.isas():
        pytest.skip(f"no {request.param} here")
    force_isa(monkeypatch, request.param)
    assert native.isa() == request.param
    yield request.param
    extension.chosen_isa.cache_clear()
