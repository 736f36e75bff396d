"""`fastbert explain-text`: what a prediction rests on, as a table and an HTML page."""

from __future__ import annotations

import argparse
import json

from fastbert.cli.options import load_options
from fastbert.progress import say
from fastbert.tasks.attribution import attention_maps, attribute, nearest_tokens, write_page
from fastbert.tasks.pipelines import pipeline

_SHOWN = 20  # tokens


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert explain-text`; returns the exit code."""
    pipe = pipeline("text-classification", args.model, **vars(load_options(args)))
    text = args.text if args.pair is None else (args.text, args.pair)
    found = attribute(pipe, text, target=args.target, method=args.method, n_steps=args.steps)
    if args.json:
        names = ("label", "score", "logit", "baseline", "delta")
        rows = [{"token": t, "score": float(s)} for t, s in zip(found.tokens, found.scores, strict=True)]
        print(json.dumps({name: getattr(found, name) for name in names} | {"tokens": rows}, ensure_ascii=False))
    else:
        print(f"{found.label}: {found.score:.4f}")
        for token, score in found.ranked()[:_SHOWN]:
            print(f"  {score:+8.4f}  {token}")
        if found.delta is not None:
            print(f"completeness error {found.completeness_error:.3%} after {args.steps} steps")
    if args.html is not None:
        near = {token: nearest_tokens(pipe, token, 5) for token in dict.fromkeys(found.tokens)}
        write_page(args.html, found, attention_maps(pipe, text)[1], near)
        say(f"the page is {args.html}")
    return 0
