"""`fastbert rerank`: documents in the order of their scores for a query, by a cross-encoder."""

from __future__ import annotations

import argparse
import json

from fastbert.cli.options import load_options
from fastbert.cli.row_runs import read_texts
from fastbert.tasks.pipelines import pipeline


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert rerank`; returns the exit code."""
    documents = list(read_texts(args.documents))
    model = pipeline("rerank", args.model, **vars(load_options(args)))
    for row in model.rank(args.query, documents, top_k=args.top_k, return_documents=True):
        print(json.dumps(row, ensure_ascii=False))
    return 0
