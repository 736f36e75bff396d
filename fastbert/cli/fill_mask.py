"""`fastbert fill-mask`: prints the likeliest words for each [MASK], as text or JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from fastbert.cli.options import load_options
from fastbert.tasks.fill_mask import FillMask


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert fill-mask`; returns the exit code."""
    model = FillMask.from_pretrained(args.model, **vars(replace(load_options(args), inference_only=True)))
    for text in args.texts:
        masks = model(text, top_k=args.top_k)
        for number, candidates in enumerate(masks, start=1):
            if args.json:
                rows = [candidate._asdict() for candidate in candidates]
                print(json.dumps({"text": text, "mask": number, "candidates": rows}, ensure_ascii=False))
                continue
            print(text if len(masks) == 1 else f"{text}  ({number} of {len(masks)})")
            width = max(len(candidate.token) for candidate in candidates)
            for token, probability, sequence in candidates:
                print(f"  {probability:6.1%}  {token:<{width}}  {sequence}")
    return 0
