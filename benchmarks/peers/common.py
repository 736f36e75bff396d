"""The common part of all runtimes: the folder it reads, its conversions on disk, and the two ways a batch is given."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from assets import cache_root
from harness import Case, Prepared, Provider, Unsupported
from torch import Tensor
from workload import Batch

# Texts in one of the sorted batches: each provider takes the size that is fastest for it. On the CPU, of 4, 8 and 16,
# transformers is fastest with 4 on MiniLM and with 8 on ModernBERT-base (64 log-normal texts); for a GPU, where a small
# batch leaves most of it idle, 16 is a guess not yet measured.
SORTED_BATCHES = {"cpu": (4, 8), "cuda": (16,)}
Forward = Callable[[dict[str, Tensor]], Any]


@dataclass
class Source:
    """One model folder on one device, and what the runtimes made of it."""

    folder: Path
    device: torch.device
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make` when `key` was first requested."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @cached_property
    def fingerprint(self) -> str:
        """Tells one model from another: the configuration and the weights."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("*")):
            if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:16]

    def converted(self, name: str, packages: tuple[str, ...], convert: Callable[[Path], None]) -> Path:
        """The folder that `convert` fills, made once for these weights and these versions of the packages."""
        versions = "-".join(f"{package}{metadata.version(package)}" for package in packages)
        folder = cache_root() / "peers" / self.fingerprint / f"{name}-{versions}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
            try:
                # Outside the harness's inference mode, whose tensors cannot be traced.
                with torch.inference_mode(False), torch.no_grad(), quiet():
                    convert(partial)
                os.rename(partial, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder


@contextmanager
def quiet() -> Iterator[None]:
    """No advice and no progress bars from exporters among the results."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def pair(
    name: str,
    dtype: str,
    load: Callable[[], Forward],
    to_tensor: Callable[[Any], Tensor] = torch.as_tensor,
    **settings: Any,
) -> list[Provider]:
    """A runtime given the padded batch, and given it sorted by length in small batches.

    Args:
        load: returns the function from input_ids and attention_mask to states, in any form.
        to_tensor: from that form to a tensor (B, S, E).
    """

    def padded(case: Case) -> Prepared:
        batch: Batch = case.payload
        forward, inputs = load(), with_mask(batch)
        return Prepared(lambda: forward(inputs), lambda states: batch.real(to_tensor(states)))

    def in_chunks(case: Case) -> Prepared:
        require_sortable(case)
        return sorted_run(case, load(), to_tensor)

    return [
        Provider(name, padded, dtype, public=True, **settings),
        Provider(f"{name}-sorted", in_chunks, dtype, public=True, **settings),
    ]


def with_mask(batch: Batch) -> dict[str, Tensor]:
    """The arguments of a runtime whose graph always takes a mask."""
    return {"input_ids": batch.inputs["input_ids"], "attention_mask": batch.mask.long()}


def require_sortable(case: Case) -> None:
    batch: Batch = case.payload
    if min(batch.lengths) == max(batch.lengths):
        raise Unsupported("all texts have one length, so sorting them changes nothing")
    if len(batch.lengths) <= SORTED_BATCHES[batch.mask.device.type][0]:
        raise Unsupported("one small batch holds all texts")


def sorted_run(case: Case, forward: Forward, to_tensor: Callable[[Any], Tensor]) -> Prepared:
    """A runtime given the texts from short to long, in batches of the size that is fastest for it."""
    batch: Batch = case.payload
    sizes = SORTED_BATCHES[batch.mask.device.type]
    split = [batch.sorted_chunks(size) for size in sizes if size < len(batch.lengths)]

    def run(chunks: list[tuple[list[int], dict[str, Tensor]]]) -> list[Any]:
        return [forward(inputs) for _, inputs in chunks]

    def seconds(chunks: list[tuple[list[int], dict[str, Tensor]]]) -> float:
        """Of the second call: in the first, a runtime may still compile or allocate."""
        run(chunks)
        start = time.perf_counter()
        run(chunks)
        return time.perf_counter() - start

    chunks = min(split, key=seconds) if len(split) > 1 else split[0]
    return Prepared(
        lambda: run(chunks),
        lambda states: batch.real_of_chunks(chunks, [to_tensor(part) for part in states]),
    )


def require_cpu(source: Source) -> None:
    if source.device.type != "cpu":
        raise Unsupported("compared on the CPU only")


def load_transformers(folder: Path, attention: str, dtype: torch.dtype) -> Any:
    """transformers' encoder of a folder; MPNet computes attention in its own way, whatever is asked for."""
    from transformers import AutoConfig, AutoModel

    asked = AutoConfig.from_pretrained(folder).model_type != "mpnet"
    return AutoModel.from_pretrained(folder, dtype=dtype, **({"attn_implementation": attention} if asked else {}))


class States(torch.nn.Module):
    """transformers' encoder as a graph with two inputs and one output: what is exported."""

    def __init__(self, folder: Path, attention: str) -> None:
        super().__init__()
        self.model = load_transformers(folder, attention, torch.float32).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def example_inputs() -> dict[str, Tensor]:
    """Two texts of unlike length, so that no exporter takes a size or a mask of ones for a constant."""
    ids = torch.arange(24).view(2, 12) + 1
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}
