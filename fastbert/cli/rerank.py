"""`fastbert rerank`: documents in the order of their scores for a query, by a cross-encoder."""

from __future__ import annotations

import argparse
import json

from fastbert.cli.options import pipeline_of
from fastbert.cli.row_runs import read_texts


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert rerank`; returns the exit code."""
    documents = list(read_texts(args.documents))
    model = pipeline_of(args, "rerank")
    for row in model.rank(args.query, documents, top_k=args.top_k, return_documents=True):
        print(json.dumps(row, ensure_ascii=False))
    return 0
