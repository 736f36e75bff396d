"""`fastbert search`: the vectors of a file that are closest to queries."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.cli.options import load_options
from fastbert.cli.row_runs import read_texts
from fastbert.inference.embed import Embedder
from fastbert.inference.input_files import InputError
from fastbert.inference.records import Records
from fastbert.tasks.vector_search import search

_TOGETHER = 1024  # queries


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert search`; returns the exit code."""
    if bool(args.queries) == bool(args.query_file):
        args.parser.error("give queries, or --queries FILE")
    if not Path(args.corpus).is_file():
        raise InputError(f"{args.corpus}: no such file")
    count = len(np.load(args.corpus, mmap_mode="r"))
    texts = None if args.texts is None else [record.text for record in Records([args.texts])]
    if texts is not None and len(texts) != count:
        raise InputError(f"{args.texts} has {len(texts)} texts, {args.corpus} {count} vectors; they must be as many")
    embedder = Embedder.from_pretrained(args.model, **vars(load_options(args)))
    prompt = embedder.prompt_of(args.prompt_name, args.prompt)
    queries = iter(args.queries) if args.queries else read_texts(args.query_file)
    while several := list(islice(queries, _TOGETHER)):
        vectors = embedder.embed(several, prompt=prompt)
        found = search(vectors, args.corpus, args.top_k, score_function=args.score, index=args.index)
        for query, hits in zip(several, found, strict=True):
            rows = [_with_text(hit, texts) for hit in hits]
            print(json.dumps({"query": query, "hits": rows}, ensure_ascii=False))
    return 0


def _with_text(hit: dict[str, Any], texts: list[str] | None) -> dict[str, Any]:
    return hit if texts is None else hit | {"text": texts[hit["corpus_id"]]}
