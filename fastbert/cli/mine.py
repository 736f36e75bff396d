"""`fastbert mine`: hard negatives for pairs of queries and their answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fastbert.checkpoint.files import atomic_path
from fastbert.cli.options import embedder_of, given
from fastbert.cli.row_runs import read_texts
from fastbert.inference.input_files import InputError
from fastbert.light.choice import load_pipeline
from fastbert.progress import say
from fastbert.tasks.mining import Mining, mine, rows_of_mined
from fastbert.training.finetune.examples import Reading
from fastbert.training.finetune.pair_examples import read_vectors


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert mine`; returns the exit code."""
    mining = Mining(**given(args, Mining))
    out = Path(args.output)
    if out.is_dir() or any(out.exists() and out.samefile(name) for name in (args.corpus, args.queries)):
        raise InputError(f"{out} is {'a folder' if out.is_dir() else 'an input, too'}")
    examples = read_vectors(Path(args.queries), Reading.of(args))
    for example in examples:
        if len(example.texts) < 2 or example.kind == "scored":
            raise InputError(f"{example.where}: the examples are no pairs of {args.anchor} and {args.positive}")
    corpus = list(read_texts(args.corpus, args.field, args.column))
    reranker = None
    if args.cross_encoder is not None:
        reranker = load_pipeline("rerank", args.cross_encoder, device=args.device)
    mined = mine(
        [(example.texts[0], example.texts[1]) for example in examples],
        corpus,
        embedder_of(args),
        mining,
        reranker=reranker,
        query_prompt=args.query_prompt,
        corpus_prompt=args.corpus_prompt,
    )
    count = 0
    with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for row in rows_of_mined(mined, args.output_format, scores=args.output_scores):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    positives = [score for one in mined for _, score in one.positives]
    negatives = [score for one in mined for _, score in one.negatives]
    told = f"scores: positives {np.mean(positives):.3f}" + (
        f", negatives {np.mean(negatives):.3f}" if negatives else ""
    )
    say(f"{count:,} rows of {len(mined):,} queries with {len(negatives):,} negatives in {out}; {told}")
    return 0
