"""Embeds real sentences with the real all-MiniLM-L6-v2, and compares with transformers: numbers and speed.

python benchmarks/demo.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from assets import AssetUnavailable, fetch
from encoders import backends_in_use, quiet_transformers
from harness import rotated
from workload import SEED, log_normal_lengths

from fastbert.inference import Embedder

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs a song with an acoustic instrument.",
    "The cat sleeps on the warm window sill.",
    "A kitten is napping in the sun.",
    "The central bank raised interest rates by half a point.",
    "Borrowing became more expensive after the policy meeting.",
    "Heavy rain flooded the streets of the old town.",
    "The storm left several roads under water.",
    "The new vaccine protects most patients against the virus.",
    "Doctors reported that the treatment prevents infection.",
    "Their striker scored twice in the second half.",
    "The team won the match with two late goals.",
]
TRANSFORMERS_BATCH = 32  # the default batch size of SentenceTransformer.encode


class Transformers:
    """The same embeddings by transformers: padded batches, sdpa, the mean over real tokens, length 1."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, BertModel

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = BertModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        self.model = self.model.to(device).eval()

    @torch.inference_mode()
    def embed(self, texts: list[str], *, by_length: bool = False) -> np.ndarray:
        """Vectors of `texts`, in batches as they come, or sorted by length as SentenceTransformer.encode does."""
        order = list(range(len(texts)))
        if by_length:
            order.sort(key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), TRANSFORMERS_BATCH):
            rows = order[start : start + TRANSFORMERS_BATCH]
            inputs = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
            ).to(self.model.device)
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors


def texts_of_all_lengths(count: int) -> list[str]:
    """Texts made of the sentences, repeated and cut to log-normal numbers of words (mean 35, longest 180)."""
    words = random.Random(SEED)
    texts = []
    for length in log_normal_lengths(count, mean=35, longest=180):
        text: list[str] = []
        while len(text) < length:
            text += words.choice(SENTENCES).split()
        texts.append(" ".join(text[:length]))
    return texts


def neighbours_table(vectors: np.ndarray) -> str:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    width = max(map(len, SENTENCES))
    lines = [f"{'sentence':{width}}  {'cosine':>6}  nearest neighbour"]
    for i, sentence in enumerate(SENTENCES):
        nearest = int(similarity[i].argmax())
        lines.append(f"{sentence:{width}}  {similarity[i, nearest]:6.3f}  {SENTENCES[nearest]}")
    return "\n".join(lines)


def seconds_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each, one call of each a round, in rotating order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in rotated(tuple(runs), turn):
            begin = time.perf_counter()
            runs[name]()  # returns numpy arrays: a GPU has finished by then
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog="example: python benchmarks/demo.py --texts 400"
    )
    parser.add_argument("--texts", type=int, default=200, help="how many texts to time on")
    parser.add_argument("--rounds", type=int, default=3, help="how often to time each way")
    chosen = parser.parse_args(arguments)
    if min(chosen.texts, chosen.rounds) < 1:
        parser.error("--texts and --rounds must be at least 1")
    quiet_transformers()
    try:
        folder = fetch("minilm")
    except AssetUnavailable as error:
        print(f"demo: the weights of all-MiniLM-L6-v2 cannot be had: {error}", file=sys.stderr)
        return 1

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder = Embedder.from_pretrained(folder, device=device)
    reference = Transformers(folder, device)
    print("all-MiniLM-L6-v2 through fastbert\n")
    vectors = embedder.embed(SENTENCES)
    print(neighbours_table(vectors))

    texts = texts_of_all_lengths(chosen.texts)
    difference = max(
        np.abs(vectors - reference.embed(SENTENCES)).max(),
        np.abs(embedder.embed(texts) - reference.embed(texts, by_length=True)).max(),
    )
    print(f"\nlargest difference from transformers, any number of any vector: {difference:.1e} (fp32)")

    lengths = [len(ids) for ids in embedder.tokenize(texts)]
    tokens = sum(lengths)
    seconds = seconds_of(
        {
            f"transformers, batches of {TRANSFORMERS_BATCH}": lambda: reference.embed(texts),
            "transformers, sorted by length": lambda: reference.embed(texts, by_length=True),
            "fastbert": lambda: embedder.embed(texts),
        },
        chosen.rounds,
    )
    slowest = next(iter(seconds.values()))
    print(f"\n{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {tokens} in all, to vectors, fp32")
    print(f"{'':32}{'tokens/s':>10}{'speed':>8}")
    for name, taken in seconds.items():
        print(f"{name:32}{tokens / taken:10,.0f}{slowest / taken:7.1f}x")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"\n{where}; median of {chosen.rounds} interleaved runs")
    print(f"backends: {backends_in_use(embedder.model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
