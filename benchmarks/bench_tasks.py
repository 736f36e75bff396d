"""From text to answers: pipelines and vectors against transformers', sentence-transformers' and the engine alone.

    python benchmarks/bench_tasks.py --task text-classification embeddings --kind short

The encoder has MiniLM's real weights, a head random ones. Short texts are sentences of STS-B; mixed ones are as many
sentences and first paragraphs of Wikipedia, by turns. Next to each pipeline stands the engine: the same model on the
same tokens, tokenized before. What is between the two is tokenizing, windows and answers. transformers' pipeline has
the batch size that is fastest for it. `generation` is EncoderDecoderModel.generate, with fastbert.accelerate and
without.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from assets import AssetUnavailable, fetch, wiki_leads
from encoders import PRECISIONS, quiet_transformers
from gpu_suite import table
from harness import Case, Harness, Prepared, Provider, append_rows, check_columns, relative_gate
from workload import forward_flops

import fastbert
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.batching import token_budget_batches
from fastbert.inference.job import embed_records
from fastbert.inference.output import StreamOutput, make_format
from fastbert.inference.records import Reading, Records
from fastbert.inference.row_output import RowFormat
from fastbert.model.bert import picked_states
from fastbert.tasks.predict import Predicting, predict_records
from fastbert.tasks.rows import TaskReading, TaskRows

RESULTS = Path(__file__).resolve().parent / "results" / "tasks-cpu.csv"
LABELS = ["sport", "music", "cooking", "politics"]
ENGINE = 0.9  # least share of the engine's own speed
PEER = {"fp32": 2.0, "int8": 5.0}  # least multiple of the public library's speed
ZERO_SHOT = 4.0
# What makes transformers' pipelines cut texts, where they do not by themselves.
PEER_CUTS = {
    "text-classification": {"truncation": True},
    "feature-extraction": {"truncation": True},
    "fill-mask": {"tokenizer_kwargs": {"truncation": True}},
}
LIMITS = {"fp32": 1e-4, "int8": 0.2}  # RMS error of the scores, as a share of their RMS
OUTSIDE = 5 / 6  # share of tokens in no entity, about that of CoNLL-2003; of a random head it would be a third
BATCHES = (1, 8, 32)
PUBLIC = ("transformers", "sentence-transformers")
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
TASKS = (*HEADS, "embeddings", "generation")
KINDS = ("short", "mixed")


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


def texts_of(kind: str, count: int) -> list[str]:
    """Real texts of a kind."""
    if kind == "short":
        return sentences(count)
    pairs = zip(sentences(count // 2), wiki_leads()[: count // 2], strict=True)
    return [text for pair in pairs for text in pair]


def save_model(folder: Path, task: str) -> Path:
    """MiniLM with a random head of the task."""
    import transformers

    head, labels = HEADS[task]
    config = transformers.BertConfig.from_pretrained(fetch("minilm"), **labels)
    if labels:
        config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{head}").from_pretrained(fetch("minilm"), config=config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch("minilm"))
    if task == "token-classification":
        batch = tokenizer(sentences(64), padding=True, return_tensors="pt")
        with torch.no_grad():
            outside, *inside = model(**batch).logits[batch["attention_mask"] == 1].unbind(1)
            lead = torch.stack(inside).amax(0) - outside
            model.classifier.bias[0] += lead.quantile(OUTSIDE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def inputs_of(task: str, texts: list[str], mask: str) -> tuple[Any, dict[str, Any]]:
    """The arguments of a pipeline."""
    if task == "question-answering":
        return [{"question": q, "context": c} for q, c in zip(texts[::2], texts[1::2], strict=False)], {}
    if task == "fill-mask":
        return [f"{mask} {text.partition(' ')[2]}" for text in texts], {}
    if task == "zero-shot-classification":
        return texts[: len(texts) // len(LABELS)], {"candidate_labels": LABELS}
    return texts, {}


def numbers(task: str, answers: Any, lengths: list[int]) -> torch.Tensor:
    """The scores of the answers to texts of so many tokens."""
    if task == "embeddings":
        return torch.as_tensor(np.asarray(answers))
    if task == "feature-extraction":
        rows = [torch.as_tensor(answer)[0, :length] for answer, length in zip(answers, lengths, strict=True)]
        return torch.cat([row.reshape(-1) for row in rows])  # transformers' batches have pads
    if task == "zero-shot-classification":
        return torch.tensor([dict(zip(a["labels"], a["scores"], strict=True))[x] for a in answers for x in LABELS])
    if task == "token-classification":
        return torch.tensor([token["score"] for answer in answers for token in answer])
    if task == "fill-mask":
        return torch.tensor([answer[0]["score"] for answer in answers])
    return torch.tensor([answer["score"] for answer in answers])


def transformers_run(pipe: Any, inputs: Any, given: dict[str, Any]) -> Callable[[], Any]:
    """transformers' pipeline with its best batch size, on a tenth of the texts."""

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
        return embedding_providers(folder, texts, dtypes)
    if task == "generation":
        return generation_providers(texts)
    ours = load(task, folder, "fp32")
    inputs, given = inputs_of(task, texts, ours.tokenizer.mask_token)
    tags = task == "token-classification"
    chosen = {**given, "aggregation_strategy": "simple"} if tags else given
    windows = ours.prepare([ours.check(item, i) for i, item in enumerate(inputs)], ours.settings(**chosen))
    lengths = [len(window) for window in windows]

    def scores(pipe: Any, answers: Any) -> torch.Tensor:
        # Of tags each token's: how many make an entity may change with the rounding of a random head.
        return numbers(task, pipe(inputs, **given, ignore_labels=[]) if tags else answers, lengths)

    def peer(_: Case) -> Prepared:
        import transformers

        pipe = transformers.pipeline(task, str(folder), device="cpu")
        run = transformers_run(pipe, inputs, {**chosen, **PEER_CUTS.get(task, {})})
        return Prepared(run, lambda answers: scores(pipe, answers))

    def own(dtype: str) -> Provider:
        def prepare(_: Case) -> Prepared:
            pipe = load(task, folder, dtype)
            return Prepared(lambda: pipe(inputs, **chosen), lambda answers: scores(pipe, answers))

        return Provider("fastbert", prepare, dtype)

    def engine(dtype: str) -> Provider:
        def prepare(_: Case) -> Prepared:
            pipe = load(task, folder, dtype)
            found = scores(pipe, pipe(inputs, **chosen))
            return Prepared(engine_run(pipe, windows), lambda _: found)

        return Provider("engine", prepare, dtype)

    def command(dtype: str) -> Provider:
        return Provider("fastbert predict", lambda _: predict_command(folder, texts, dtype), dtype)

    ways = (own, engine, command) if task == "text-classification" else (own, engine)
    found = [] if task == "question-answering" else [Provider("transformers", peer)]
    return [*found, *(way(dtype) for dtype in dtypes for way in ways)], lengths


def predict_command(folder: Path, texts: list[str], dtype: str) -> Prepared:
    """From a csv file to lines of JSON, as `fastbert predict` does once its model is loaded."""
    pipe, file = load("text-classification", folder, dtype), write_column(folder, texts)
    reading = TaskReading(allow_empty=True)

    def run() -> list[str]:
        stream = io.BytesIO()
        rows = TaskRows([file], reading, pipe.task)
        predict_records(pipe, rows, StreamOutput(RowFormat("jsonl"), stream), Predicting())
        return stream.getvalue().decode().splitlines()

    return Prepared(run, lambda lines: torch.tensor([json.loads(line)["prediction_score"] for line in lines]))


def write_column(folder: Path, texts: list[str]) -> str:
    path = folder / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text",), *((text,) for text in texts)])
    return str(path)


def load(task: str, folder: Path, dtype: str) -> Any:
    """A pipeline that cuts texts, as transformers' do."""
    cut = {} if task == "question-answering" else {"truncation": True}
    return fastbert.pipeline(task, folder, **cut, **PRECISIONS[dtype])


def engine_run(pipe: Any, windows: list[Any]) -> Callable[[], Any]:
    """The model alone, on tokens that are packed already; of a model of masked words, at the masks alone."""
    batches = [inputs for _, inputs in pipe.runner.batches(windows)]
    mask = pipe.tokenizer.mask_token_id

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            if pipe.task == "fill-mask":
                places = (batch["input_ids"] == mask).nonzero().flatten()
                pipe.model.predictions(picked_states(pipe.model.base_model, **batch, picked=places))
            else:
                pipe.model(**batch, return_dict=True)

    return run


def embedding_providers(folder: Path, texts: list[str], dtypes: list[str]) -> tuple[list[Provider], list[int]]:
    file = write_column(folder, texts)
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
            if name == "fastbert embed":  # from a csv file to the bytes of an .npy file
                return Prepared(
                    lambda: embed_command(embedder, file),
                    lambda made: torch.frombuffer(made, dtype=torch.float32).view(len(texts), -1),
                )
            vectors = torch.as_tensor(embedder.embed(texts))
            packed = []
            for batch in token_budget_batches([len(text) for text in ids], MAX_TOKENS):
                lengths = [len(ids[i]) for i in batch]
                flat = torch.tensor([token for i in batch for token in ids[i]])
                ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
                packed.append({"input_ids": flat, "cu_seqlens": ends, "max_seqlen": max(lengths)})
            return Prepared(lambda: [embedder.model(**batch) for batch in packed], lambda _: vectors)

        return Provider(name, prepare, dtype)

    found = [own(dtype, name) for dtype in dtypes for name in ("fastbert", "engine", "fastbert embed")]
    return [Provider("sentence-transformers", peer), *found], [len(text) for text in ids]


def embed_command(embedder: fastbert.Embedder, file: str) -> bytearray:
    """The work of `fastbert embed` once its model is loaded."""
    stream, format = io.BytesIO(), make_format("npy", embedder.width, [file])
    records = Records([file], Reading(allow_empty=True))
    embed_records(embedder, records, StreamOutput(format, stream), max_tokens=MAX_TOKENS)
    return bytearray(stream.getvalue())


def generation_providers(texts: list[str]) -> tuple[list[Provider], list[int]]:
    """Titles of 16 tokens for batches of 16 texts, by MiniLM as encoder and as decoder, untrained."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch("minilm"))
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    batches = [tokenizer(texts[i : i + 16], **options) for i in range(0, min(len(texts), 128), 16)]

    def prepare(accelerated: bool) -> Prepared:
        torch.manual_seed(0)
        model: Any = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(
            str(fetch("minilm")), str(fetch("minilm"))
        ).eval()
        start = {"decoder_start_token_id": tokenizer.cls_token_id, "pad_token_id": tokenizer.pad_token_id}
        length = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, "num_beams": 1}
        model = fastbert.accelerate(model) if accelerated else model

        @torch.inference_mode()
        def run() -> list[torch.Tensor]:
            return [model.generate(**batch, **start, **length) for batch in batches]

        @torch.inference_mode()
        def states(_: Any) -> torch.Tensor:
            found = [(batch, model.encoder(**batch).last_hidden_state) for batch in batches]
            return torch.cat([hidden[batch["attention_mask"].bool()].flatten() for batch, hidden in found])

        return Prepared(run, states)

    names = {"transformers": False, "fastbert": True}
    lengths = [int(row.sum()) for batch in batches for row in batch["attention_mask"]]
    return [Provider(name, lambda _, on=on: prepare(on), "fp32") for name, on in names.items()], lengths


def measure(task: str, kind: str, texts: list[str], dtypes: list[str], harness: Harness) -> list[dict[str, Any]]:
    with TemporaryDirectory() as scratch:
        folder = save_model(Path(scratch), task) if task in HEADS else Path(scratch)
        everyone, lengths = providers(task, folder, texts, dtypes)
        config = fastbert.BertConfig.from_pretrained(fetch("minilm"))
        case = Case(
            op="text to answer",
            model="minilm",
            name=f"{task}, {kind} texts",
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
    if task == "generation":
        return
    if task == "embeddings":
        embedder = fastbert.Embedder.from_pretrained(fetch("minilm"))
        run: Callable[[], Any] = lambda: embedder.tokenize(texts)  # noqa: E731
    else:
        pipe = load(task, folder, "fp32")
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
    peer = next((speed for (name, _), speed in found.items() if name in PUBLIC), None)
    passed = True
    for (name, dtype), speed in found.items():
        if not name.startswith("fastbert"):
            continue
        if task == "generation":  # the decoder, which is transformers' own, takes most of the time
            print(f"  {speed / (peer or speed):.2f} times transformers alone")
            continue
        share = speed / found["engine", dtype]
        told, good = f"{share:.2f} of the engine's speed (at least {ENGINE:g})", share >= ENGINE
        if name == "fastbert" and peer is not None:  # a command is held to the engine alone
            least = ZERO_SHOT if task.startswith("zero") and dtype == "fp32" else PEER[dtype]
            told += f", {speed / peer:.2f} times the public library's (at least {least:g})"
            good = good and speed / peer >= least
        passed &= good
        print(f"  {'PASS' if good else 'MISS'} {name}, {dtype}: {told}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/bench_tasks.py --task embeddings"
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=TASKS)
    add("--dtype", nargs="+", choices=("fp32", "int8"), default=["fp32", "int8"])
    add("--kind", nargs="+", choices=KINDS, default=KINDS, help="of texts")
    add("--texts", type=int, default=2000)
    add("--seconds", type=float, default=30.0, help="of timing a task, past its least rounds")
    add("--output", type=Path, default=RESULTS, help="CSV to append to")
    chosen = parser.parse_args(arguments)
    quiet_transformers()
    try:
        check_columns(chosen.output)
        texts = {kind: texts_of(kind, chosen.texts) for kind in chosen.kind}
    except (ValueError, AssetUnavailable) as error:
        print(f"bench_tasks: {error}", file=sys.stderr)
        return 1
    passed = []
    for task, kind in product(chosen.task, chosen.kind):
        harness = Harness(torch.device("cpu"), seconds=chosen.seconds)
        rows = measure(task, kind, texts[kind], chosen.dtype, harness)
        append_rows(chosen.output, rows)
        passed.append(verdict(task, rows))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
