"""A pytest plugin for other projects' tests: accelerates each transformers BERT as it is built, records each outcome.

Run in a process of its own, in the folder that holds the other project's `tests`:

    FASTBERT_OUTCOMES=out.jsonl FASTBERT_ACCELERATE=1 python -m pytest -p upstream_driver tests/...

Each line of the file is {"test", "outcome", "error"}; the last is {"packed", "declined", "models"}: how many calls of
accelerated encoders ran packed, how many ran the original code by reason, and how many models were accelerated.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import sys
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = Path(os.environ.get("FASTBERT_OUTCOMES", os.devnull))
# Modules that other projects' test files import at their top and use in few tests, which fail without them.
OPTIONAL = {"diffusers": ("StableDiffusionPipeline",), "datasets": ("load_dataset", "Dataset")}
CALLS: Counter[str] = Counter()
DECLINED: Counter[str] = Counter()


def accelerate_as_built() -> None:
    """Every BERT class of transformers accelerates its instances at the end of their construction."""
    from transformers.models.bert import modeling_bert

    from fastbert.integrations.transformers import PackedEncoder

    for kind in list(vars(modeling_bert).values()):
        if isinstance(kind, type) and issubclass(kind, modeling_bert.BertPreTrainedModel):
            kind.__init__ = _accelerating(kind, kind.__init__)
    PackedEncoder.__call__ = _counting(PackedEncoder.__call__)


def _accelerating(kind: type, init: Any) -> Any:
    @functools.wraps(init)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if kind.__name__ == "BertModel" or (type(self) is kind and kind.__name__ != "BertPreTrainedModel"):
            import fastbert

            with warnings.catch_warnings():  # of decoders, which are left alone
                warnings.filterwarnings("ignore", message="fastbert.accelerate left")
                fastbert.accelerate(self)
            CALLS["models"] += 1

    return built


def _counting(call: Any) -> Any:
    @functools.wraps(call)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = Counter(self.declined)
        try:
            return call(self, *args, **kwargs)
        finally:
            new = self.declined - before
            DECLINED.update(new)
            CALLS["packed"] += not new

    return counted


class _KnownHubModels(Counter):
    """In place of PEFT's count of hub accesses: every model counts as downloaded, so that its tests stay offline."""

    def __contains__(self, name: object) -> bool:
        return True


def _write(line: dict[str, Any]) -> None:
    with open(OUTCOMES, "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    for name, members in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            for member in members:
                setattr(module, member, type(member, (), {}))
            sys.modules[name] = module
    import torch

    torch.set_num_threads(1)
    if os.environ.get("FASTBERT_ACCELERATE") == "1":
        accelerate_as_built()


def pytest_runtest_setup() -> None:
    """The same random inputs and weights in both runs."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    utilities = sys.modules.get("tests.testing_utils")
    if hasattr(utilities, "_HUB_MODEL_ACCESSES"):
        utilities._HUB_MODEL_ACCESSES = _KnownHubModels()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        error = str(call.excinfo.value)[:600] if call.excinfo is not None else ""
        where = str(call.excinfo.traceback[-1]) if call.excinfo is not None else ""
        kind = type(call.excinfo.value).__name__ if call.excinfo is not None else ""
        line = {"test": item.nodeid, "outcome": report.outcome, "error": f"{kind}: {error}" if kind else ""}
        _write({**line, "where": where, "seconds": round(call.duration, 2)})
    return report


def pytest_sessionfinish() -> None:
    _write({"models": CALLS["models"], "packed": CALLS["packed"], "declined": dict(DECLINED)})
