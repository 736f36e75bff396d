"""`fastbert summarize`: the sentences of a text that say most, for each file."""

from __future__ import annotations

import argparse

from fastbert.cli.options import load_options
from fastbert.inference.input_files import read_text
from fastbert.tasks.pipelines import pipeline


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert summarize`; returns the exit code."""
    texts = [read_text(name) for name in args.inputs]
    given = {"ratio": args.ratio, "num_sentences": args.sentences, "min_length": args.min_length}
    given = {name: value for name, value in given.items() if value is not None}
    model = pipeline("summarization", args.model, **vars(load_options(args)), **given)
    for name, summary in zip(args.inputs, model(texts), strict=True):
        print(f"{name}: {summary}" if len(args.inputs) > 1 else summary)
    return 0
