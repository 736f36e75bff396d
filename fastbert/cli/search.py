"""`fastbert search`: the vectors of a file that are closest to queries."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.cli.options import embedder_of
from fastbert.cli.row_runs import read_texts
from fastbert.inference.input_files import InputError
from fastbert.inference.records import Reading, Records
from fastbert.tasks.vector_search import search, vectors_of

_TOGETHER = 1024  # queries


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert search`; returns the exit code."""
    if bool(args.queries) == bool(args.query_file):
        args.parser.error("give queries, or --queries FILE")
    if not Path(args.corpus).is_file():
        raise InputError(f"{args.corpus}: no such file")
    corpus = vectors_of("--corpus", args.corpus)
    texts = None if args.texts is None else _texts(args, corpus)
    embedder = embedder_of(args)
    prompt = embedder.prompt_of(args.prompt_name, args.prompt)
    queries = iter(args.queries) if args.queries else read_texts(args.query_file)
    while several := list(islice(queries, _TOGETHER)):
        vectors = embedder.embed(several, prompt=prompt)
        found = search(vectors, corpus, args.top_k, score_function=args.score, index=args.index)
        for query, hits in zip(several, found, strict=True):
            rows = [_with_text(hit, texts) for hit in hits]
            print(json.dumps({"query": query, "hits": rows}, ensure_ascii=False))
    return 0


def _texts(args: argparse.Namespace, corpus: np.ndarray) -> list[str]:
    """The text of each vector; of a line that was skipped, whose vector is of NaN, none.

    Raises:
        InputError: they are not as many, or a line that has a vector has no text.
    """
    records = Records([args.texts], Reading(field=args.field, column=args.column, allow_empty=True))
    texts = []
    for i, record in enumerate(records):
        if record.problem is not None and not (i < len(corpus) and np.isnan(corpus[i, 0])):
            raise InputError(f"{records.where(record)} {record.problem}")
        texts.append(record.text)
    if len(texts) != len(corpus):
        raise InputError(
            f"{args.texts} has {len(texts)} texts, {args.corpus} {len(corpus)} vectors; they must be as many"
        )
    return texts


def _with_text(hit: dict[str, Any], texts: list[str] | None) -> dict[str, Any]:
    return hit if texts is None else hit | {"text": texts[hit["corpus_id"]]}
