"""A tiny random model with its tokenizer, saved as a folder: for tests that need no real weights."""

from __future__ import annotations

from pathlib import Path

from support import TINY

import fastbert

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "red", "blue", ",", ".", "##s", "##ed"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def save_tiny(folder: Path, model_class: type = fastbert.BertModel, **sizes: int) -> Path:
    """Writes config, weights and vocabulary into `folder`; `sizes` are config fields."""
    config = fastbert.BertConfig(**{**TINY, "vocab_size": len(VOCAB), **sizes})
    model_class(config).save_pretrained(folder)
    fastbert.BertTokenizer(VOCAB).save_pretrained(folder)
    return folder
