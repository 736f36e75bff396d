"""From text to answers: pipelines and vectors against transformers', sentence-transformers' and the engine alone.

    python benchmarks/bench_tasks.py --task text-classification embeddings

The encoder has MiniLM's real weights, a head random ones; the texts are real sentences, as they come. Next to each
pipeline stands the engine: the same model on the same tokens, tokenized before. What is between the two is
tokenizing, windows and answers. transformers' pipeline has the batch size that is fastest for it.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from assets import AssetUnavailable, fetch
from encoders import PRECISIONS, quiet_transformers
from gpu_suite import table
from harness import Case, Harness, Prepared, Provider, append_rows, check_columns, relative_gate
from workload import forward_flops

import fastbert

RESULTS = Path(__file__).resolve().parent / "results" / "tasks-cpu.csv"
LABELS = ["sport", "music", "cooking", "politics"]
ENGINE = 0.9  # least share of the engine's own speed
PEER = {"fp32": 2.0, "int8": 5.0}  # least multiple of the public library's speed
ZERO_SHOT = 4.0
LIMITS = {"fp32": 1e-4, "int8": 0.2}  # RMS error of the scores, as a share of their RMS
BATCHES = (1, 8, 32)
HEADS = {
    "text-classification": ("ForSequenceClassification", {"id2label": dict(enumerate("abc"))}),
    "token-classification": ("ForTokenClassification", {"id2label": dict(enumerate(("O", "B-X", "I-X")))}),
    "question-answering": ("ForQuestionAnswering", {}),
    "fill-mask": ("ForMaskedLM", {}),
    "zero-shot-classification": (
        "ForSequenceClassification",
        {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}},
    ),
    "feature-extraction": ("Model", {}),
}
TASKS = (*HEADS, "embeddings")


def sentences(count: int) -> list[str]:
    """Real sentences, short and middling."""
    found: list[str] = []
    for name in ("train", "dev", "test"):
        for path in sorted(fetch("stsb").glob(f"*{name}*.csv")):
            with path.open(encoding="utf-8") as file:
                rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                found += [text for row in rows for text in row[5:7]]
    if len(found) < count:
        raise AssetUnavailable(f"STS-B has {len(found)} sentences, not {count}")
    return found[:: len(found) // count][:count]


def save_model(folder: Path, task: str) -> Path:
    """MiniLM with a random head of the task."""
    import transformers

    head, labels = HEADS[task]
    config = transformers.BertConfig.from_pretrained(fetch("minilm"), **labels)
    if labels:
        config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(0)
    kind = getattr(transformers, f"Bert{head}")
    kind.from_pretrained(fetch("minilm"), config=config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(fetch("minilm")).save_pretrained(folder)
    return folder


def inputs_of(task: str, texts: list[str], mask: str) -> tuple[Any, dict[str, Any]]:
    """What a pipeline is called with."""
    if task == "question-answering":
        return [{"question": q, "context": c} for q, c in zip(texts[::2], texts[1::2], strict=False)], {}
    if task == "fill-mask":
        return [f"{mask} {text.partition(' ')[2]}" for text in texts], {}
    if task == "zero-shot-classification":
        return texts[: len(texts) // len(LABELS)], {"candidate_labels": LABELS}
    return texts, {}


def numbers(task: str, answers: Any) -> torch.Tensor:
    """The scores of the answers."""
    if task == "embeddings":
        return torch.as_tensor(np.asarray(answers))
    if task == "feature-extraction":
        return torch.cat([torch.as_tensor(answer).reshape(-1) for answer in answers])
    if task == "zero-shot-classification":
        return torch.tensor([dict(zip(a["labels"], a["scores"], strict=True))[x] for a in answers for x in LABELS])
    if task == "token-classification":
        return torch.tensor([token["score"] for answer in answers for token in answer])
    if task == "fill-mask":
        return torch.tensor([answer[0]["score"] for answer in answers])
    return torch.tensor([answer["score"] for answer in answers])


def transformers_run(task: str, folder: Path, inputs: Any, given: dict[str, Any]) -> Callable[[], Any]:
    """transformers' pipeline with its best batch size, on a tenth of the texts."""
    import transformers

    pipe: Any = transformers.pipeline(task, str(folder), device="cpu")

    def seconds(size: int) -> float:
        start = time.perf_counter()
        pipe(inputs[: max(64, len(inputs) // 10)], batch_size=size, **given)
        return time.perf_counter() - start

    seconds(8)
    best = min(BATCHES, key=seconds)
    return lambda: pipe(inputs, batch_size=best, **given)


def providers(task: str, folder: Path, texts: list[str], dtypes: list[str]) -> tuple[list[Provider], list[int]]:
    """Everyone, and the lengths in tokens of what the model sees."""
    if task == "embeddings":
        return embedding_providers(texts, dtypes)
    ours = fastbert.pipeline(task, folder)
    inputs, given = inputs_of(task, texts, ours.tokenizer.mask_token)
    chosen = {**given, "aggregation_strategy": "simple"} if task == "token-classification" else given
    windows = ours.prepare([ours.check(item, i) for i, item in enumerate(inputs)], ours.settings(**chosen))

    def peer(_: Case) -> Prepared:
        return Prepared(transformers_run(task, folder, inputs, chosen), lambda answers: numbers(task, answers))

    def own(dtype: str) -> Provider:
        def prepare(_: Case) -> Prepared:
            pipe = fastbert.pipeline(task, folder, **PRECISIONS[dtype])
            return Prepared(lambda: pipe(inputs, **chosen), lambda answers: numbers(task, answers))

        return Provider("fastbert", prepare, dtype)

    def engine(dtype: str) -> Provider:
        def prepare(_: Case) -> Prepared:
            pipe = fastbert.pipeline(task, folder, **PRECISIONS[dtype])
            scores = numbers(task, pipe(inputs, **chosen))
            return Prepared(engine_run(pipe, windows), lambda _: scores)

        return Provider("engine", prepare, dtype)

    found = [] if task == "question-answering" else [Provider("transformers", peer)]
    return [*found, *(p(dtype) for dtype in dtypes for p in (own, engine))], [len(window) for window in windows]


def engine_run(pipe: Any, windows: list[Any]) -> Callable[[], Any]:
    """The model alone, on tokens that are packed already."""
    module = pipe.model.base_model if pipe.task == "fill-mask" else pipe.model
    batches = [inputs for _, inputs in pipe.runner.batches(windows)]
    mask = pipe.tokenizer.mask_token_id

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            output = module(**batch, return_dict=True)
            if pipe.task == "fill-mask":
                pipe.model.predictions(output.last_hidden_state[batch["input_ids"] == mask])

    return run


def embedding_providers(texts: list[str], dtypes: list[str]) -> tuple[list[Provider], list[int]]:
    from fastbert.inference.batching import token_budget_batches
    from fastbert.inference.embed import MAX_TOKENS

    ids = fastbert.Embedder.from_pretrained(fetch("minilm")).tokenize(texts)

    def peer(_: Case) -> Prepared:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(fetch("minilm")), device="cpu")
        return Prepared(lambda: model.encode(texts), torch.as_tensor)

    def own(dtype: str, name: str) -> Provider:
        def prepare(_: Case) -> Prepared:
            embedder = fastbert.Embedder.from_pretrained(fetch("minilm"), **PRECISIONS[dtype])
            if name == "fastbert":
                return Prepared(lambda: embedder.embed(texts), torch.as_tensor)
            vectors = torch.as_tensor(embedder.embed(texts))
            packed = []
            for batch in token_budget_batches([len(text) for text in ids], MAX_TOKENS):
                lengths = [len(ids[i]) for i in batch]
                flat = torch.tensor([token for i in batch for token in ids[i]])
                ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
                packed.append({"input_ids": flat, "cu_seqlens": ends, "max_seqlen": max(lengths)})
            return Prepared(lambda: [embedder.model(**batch) for batch in packed], lambda _: vectors)

        return Provider(name, prepare, dtype)

    found = [own(dtype, name) for dtype in dtypes for name in ("fastbert", "engine")]
    return [Provider("sentence-transformers", peer), *found], [len(text) for text in ids]


def measure(task: str, texts: list[str], dtypes: list[str], harness: Harness) -> list[dict[str, Any]]:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if task == "embeddings" else save_model(Path(scratch), task)
        everyone, lengths = providers(task, folder, texts, dtypes)
        config = fastbert.BertConfig.from_pretrained(fetch("minilm"))
        case = Case(
            op="text to answer",
            model="minilm",
            name=task,
            shape=f"{len(lengths)}x{max(lengths)}",
            fill=sum(lengths) / (len(lengths) * max(lengths)),
            tokens=sum(lengths),
            texts=len(texts),
            flops=forward_flops(config, lengths),
            min_rounds=3,
        )
        expected: list[torch.Tensor] = []

        def gate(provider: Provider) -> Any:
            if not expected:
                first = everyone[0].prepare(case)
                expected.append(first.result(first.run()))
            return relative_gate(expected[0], LIMITS[provider.dtype])

        rows = harness.run_case(case, everyone, gate)
        print(table(case, rows), flush=True)
        say_tokenization(task, folder, texts, rows)
        return rows


def say_tokenization(task: str, folder: Path, texts: list[str], rows: list[dict[str, Any]]) -> None:
    """How long tokenizing takes alone, against the whole."""
    if task == "embeddings":
        embedder = fastbert.Embedder.from_pretrained(fetch("minilm"))
        run: Callable[[], Any] = lambda: embedder.tokenize(texts)  # noqa: E731
    else:
        pipe = fastbert.pipeline(task, folder)
        inputs, given = inputs_of(task, texts, pipe.tokenizer.mask_token)
        items = [pipe.check(item, i) for i, item in enumerate(inputs)]
        run = lambda: pipe.prepare(items, pipe.settings(**given))  # noqa: E731
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    for row in rows:
        if row["provider"] == "fastbert" and row["status"] == "ok":
            share = sorted(times)[2] / (row["p50_ms"] / 1000)
            print(f"  {row['dtype']}: tokenizing alone takes {share:.1%} of the time")


def verdict(task: str, rows: list[dict[str, Any]]) -> bool:
    found = {(row["provider"], row["dtype"]): row["tokens_per_s"] for row in rows if row["status"] == "ok"}
    peer = next((speed for (name, _), speed in found.items() if name not in ("fastbert", "engine")), None)
    passed = True
    for (name, dtype), speed in found.items():
        if name != "fastbert":
            continue
        share = speed / found["engine", dtype]
        least = ZERO_SHOT if task.startswith("zero") and dtype == "fp32" else PEER[dtype]
        times = "" if peer is None else f", {speed / peer:.2f} times the public library's (at least {least:g})"
        good = share >= ENGINE and (peer is None or speed / peer >= least)
        passed &= good
        print(f"  {'PASS' if good else 'MISS'} {dtype}: {share:.2f} of the engine's speed (at least {ENGINE:g}){times}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_tasks.py --task embeddings"
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=TASKS)
    add("--dtype", nargs="+", choices=("fp32", "int8"), default=["fp32", "int8"])
    add("--texts", type=int, default=1000)
    add("--seconds", type=float, default=30.0, help="of timing a task, past its least rounds")
    add("--output", type=Path, default=RESULTS, help="CSV to append to")
    chosen = parser.parse_args(arguments)
    quiet_transformers()
    try:
        check_columns(chosen.output)
        texts = sentences(chosen.texts)
    except (ValueError, AssetUnavailable) as error:
        print(f"bench_tasks: {error}", file=sys.stderr)
        return 1
    passed = []
    for task in chosen.task:
        rows = measure(task, texts, chosen.dtype, Harness(torch.device("cpu"), seconds=chosen.seconds))
        append_rows(chosen.output, rows)
        passed.append(verdict(task, rows))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
