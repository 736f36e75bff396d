"""Learns a WordPiece vocabulary from text, deterministically for any number of cores."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable

from fastbert.tokenizer.bert import BertTokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALPHABET = 1000  # characters that get a token; rarer ones become [UNK]
MIN_FREQUENCY = 2


def learn_vocabulary(texts: Callable[[], Iterable[str]], size: int, *, lower: bool = True) -> BertTokenizer:
    """A tokenizer of at most `size` tokens, by the trainer of the `tokenizers` library.

    By default, that trainer numbers the characters inside words in the order of a hash map, and breaks ties between
    merges by these numbers, so each run learns another vocabulary. Giving it all characters in order avoids this.

    Args:
        texts: called twice; returns all texts each time.
        size: number of tokens, including the five special ones; a small text may give fewer.

    Raises:
        ValueError: `size` is too small for the special tokens and the text's characters.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    pattern = BertTokenizer(SPECIALS, do_lower_case=lower)._backend
    backend = Tokenizer(WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer

    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(backend.normalizer.normalize_str(text))
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(common[:ALPHABET])
    tokens = [*SPECIALS, *(f"##{c}" for c in alphabet)]
    if (least := len(tokens) + len(alphabet)) > size:
        raise ValueError(f"a vocabulary of {size} tokens has no room for the text's characters; it takes {least}")
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=tokens,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    vocab = backend.get_vocab(with_added_tokens=True)
    if len(vocab) < size:
        warnings.warn(
            f"the vocabulary has {len(vocab)} tokens and not {size}: the text has no more that come up "
            f"{MIN_FREQUENCY} times or more",
            stacklevel=2,
        )
    return BertTokenizer(sorted(vocab, key=vocab.__getitem__), do_lower_case=lower)
