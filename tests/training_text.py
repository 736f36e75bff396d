"""Made-up documents, the same each time, for tests of pre-training data."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch

from fastbert.training.counter_random import draws, key_of
from fastbert.training.prepare import prepare

SYLLABLES = ("ba", "ke", "di", "lo", "mu", "ra", "se", "ti", "no", "pu", "ga", "vi")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Each syllable begins a word and continues one, so that words of several WordPieces abound.
VOCAB = [
    *SPECIALS,
    *SYLLABLES,
    *(f"##{s}" for s in SYLLABLES),
    ".",
    *map(str, range(10)),
    *(f"##{i}" for i in range(10)),
]


CLS, SEP = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")


def make_documents(count: int, seed: int = 0, sentences: tuple[int, int] = (1, 12)) -> list[str]:
    """Documents of lines of a sentence each; document 7's sentence 3 begins with "7 3", so that each is known again."""
    rng = Random(seed)

    def sentence(document: int, number: int) -> str:
        words = ("".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(2, 12)))
        return f"{document} {number} {' '.join(words)} ."

    return ["\n".join(sentence(d, s) for s in range(rng.randint(*sentences))) for d in range(count)]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def write_vocab(path: Path) -> Path:
    path.write_text("".join(f"{token}\n" for token in VOCAB), encoding="utf-8")
    return path


def prepared(folder: Path, settings, *, count: int = 60, **options) -> Path:
    """A folder of shards made of `count` documents."""
    source = write_documents(folder / "text.txt", make_documents(count))
    prepare([source], folder / "data", settings, vocab=write_vocab(folder / "vocab.txt"), **options)
    return folder / "data"


def rows(batch):
    """(unmasked tokens, what is seen, types, next sentence label) of each sequence."""
    ids, labels, cuts = batch.input_ids, batch.labels, batch.cu_seqlens.tolist()
    real = torch.where(labels == -100, ids, labels)
    nsp = [None] * (len(cuts) - 1) if batch.next_sentence_label is None else batch.next_sentence_label.tolist()
    return [
        (tuple(real[a:b].tolist()), tuple(ids[a:b].tolist()), tuple(batch.token_type_ids[a:b].tolist()), label)
        for a, b, label in zip(cuts[:-1], cuts[1:], nsp, strict=True)
    ]


def sequences(count, length, seed=0):
    """`count` sequences [CLS] a [SEP] b [SEP] of random ordinary tokens, with unknown ones among them."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(SPECIALS), len(VOCAB), (count, length))
    rows[rng.random(rows.shape) < 0.02] = VOCAB.index("[UNK]")
    rows[:, 0], rows[:, length // 3], rows[:, -1] = CLS, SEP, SEP
    return rows.reshape(-1), np.arange(count + 1) * length


def keys(count, epoch=0):
    return draws(key_of(5, epoch), np.arange(count))


def within(share, expected, count, sigmas=4.5):
    assert abs(share - expected) < sigmas * np.sqrt(expected * (1 - expected) / count), (share, expected, count)
