"""From a folder to a light encoder: config, weights and threads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastbert.config import BertConfig, family_of
from fastbert.engine.library import available
from fastbert.families.parts import HeadParts
from fastbert.light.cache import cached, default_folder
from fastbert.light.encoder import Encoder
from fastbert.light.packing import Arrays, pack_encoder, pack_head, tables
from fastbert.light.weights import Weights

PRECISIONS = (None, "int8")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """OMP_NUM_THREADS, or the number of cores that the process may run on, each counted once."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return max(1, len(cores_of(os.sched_getaffinity(0))))


def cores_of(cpus: Iterable[int]) -> list[list[int]]:
    """The cores of processors, each as those of them that share it."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault(_siblings(cpu), []).append(cpu)
    return list(cores.values())


def _siblings(cpu: int) -> str:
    try:
        return (_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def load_encoder(
    path: str | Path,
    config: BertConfig,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
    cache: str | Path | bool = False,
    with_pooler: bool = False,
    head: HeadParts | None = None,
) -> Encoder:
    """The encoder of a folder or hub id.

    Args:
        dtype: "float32" or "bfloat16"; None for the stored one.
        quantize: "int8" or None.
        threads: of each call; None for `default_threads`.
        cache: the folder that keeps packed weights, to be mapped; True for that of `cache.default_folder`.
        head: whose arrays are packed, too.

    Raises:
        RuntimeError: the extension is missing.
        ValueError: another dtype or quantize; a tensor is missing or misshapen.
    """
    if (reason := available()) is not None:
        raise RuntimeError(f"a light model runs by the extension alone: {reason}")
    if quantize not in PRECISIONS:
        raise ValueError(f"quantize is {quantize!r}; it must be None or 'int8'")
    threads = default_threads() if threads is None else threads
    weights = Weights(path, revision, family_of(config.model_type), dtype, tied=config.tie_word_embeddings)

    def make() -> Arrays:
        arrays = pack_encoder(weights, config, quantize, threads, with_pooler=with_pooler)
        return arrays if head is None else arrays | pack_head(weights, config, head, threads)

    if cache is False:
        arrays = make()
    else:
        text = json.dumps(config.to_dict(), sort_keys=True, default=str)
        what = {"dtype": weights.dtype, "quantize": quantize, "pooler": with_pooler, "head": head and list(head.out)}
        what["config"] = hashlib.sha256(text.encode()).hexdigest()
        arrays = cached(default_folder() if cache is True else Path(cache), weights.by_name(), what, make, threads)
    made = tables(weights, config) | arrays
    encoder = Encoder(made, config, dtype=weights.dtype, precision=quantize, threads=threads)
    encoder.files = weights.by_name()
    return encoder
