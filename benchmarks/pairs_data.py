"""Pairs of questions and passages, from SQuAD v1.1, to train embedders and rerankers on.

    python benchmarks/pairs_data.py FOLDER --train 3000 --dev 500

FOLDER gets train.jsonl and dev.jsonl, {"anchor": question, "positive": passage}, and corpus.txt, all passages of the
held-out articles. The questions are drawn; those of dev are on articles that train has not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from assets import fetch

SEED = 0


def pairs_of(file: Path) -> list[tuple[str, str]]:
    """(question, passage) of each question of a SQuAD file, in its order."""
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    return [
        (" ".join(qa["question"].split()), " ".join(paragraph["context"].split()))
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
        if qa["question"].strip()
    ]


def write_pairs(folder: Path, *, train: int, dev: int) -> Path:
    """Writes the three files into a folder, which is returned.

    Raises:
        AssetUnavailable: SQuAD cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, random = fetch("squad"), np.random.default_rng(SEED)
    for name, count in (("train", train), ("dev", dev)):
        pairs = pairs_of(source / f"{name}-v1.1.json")
        chosen = np.sort(random.permutation(len(pairs))[:count])
        rows = [{"anchor": pairs[i][0], "positive": pairs[i][1]} for i in chosen]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    passages = dict.fromkeys(passage for _, passage in pairs_of(source / "dev-v1.1.json"))
    (folder / "corpus.txt").write_text("".join(f"{passage}\n" for passage in passages), encoding="utf-8")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=3000, help="questions (default: 3000)")
    parser.add_argument("--dev", type=int, default=500, help="questions (default: 500)")
    args = parser.parse_args()
    print(write_pairs(args.folder, train=args.train, dev=args.dev))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
