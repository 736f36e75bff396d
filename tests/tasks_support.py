"""Texts, and tiny models with tokenizers of three kinds, as folders: for the tests of tasks."""

from __future__ import annotations

import random
from functools import cache

import torch
import transformers
from made_tokenizers import LINES, roberta, xlm_roberta
from tokenizers import normalizers, pre_tokenizers

import fastbert

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LENGTH = 64  # tokens that the models take
ODD = [
    "cat",
    "",
    "😀 👩‍👩‍👧‍👦 smile",
    "cafe\u0301 Å ﬁ ½",
    "中文没有空格，快速的棕色狐狸。",
    "ｈａｌｆ ｗｉｄｔｈ",
    "שלום עולם, this is mixed العربية text",
    "tabs\tand\nnew lines   spaces",
]


def make_texts(count=200, *, seed=0, longest=25):
    """The odd ones, one of 5,000 words, and sentences of one to `longest` words."""
    draw = random.Random(seed)
    words = " ".join(LINES).split()
    sentences = [" ".join(draw.choices(words, k=draw.randint(1, longest))) for _ in range(count)]
    return [*ODD, " ".join(draw.choices(words, k=5000)), *sentences][:count]


def bert_tokenizer(**options):
    """WordPiece of the letters and of two words of three; the rest are made of pieces."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    split, lower = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    words = sorted({word for line in LINES for word, _ in split.pre_tokenize_str(lower.normalize_str(line))})
    letters = sorted({letter for word in words for letter in word})
    whole = [word for i, word in enumerate(words) if i % 3 and len(word) > 1] + ["fox"]
    tokens = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *whole])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=LENGTH, **options)


KINDS = {
    "bert": ("Bert", bert_tokenizer, {}),
    "roberta": ("Roberta", roberta, {"type_vocab_size": 1, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", xlm_roberta, {"type_vocab_size": 1, "pad_token_id": 1}),
}


@cache
def tokenizer_of(kind):
    """Trained once: twice would not give the same vocabulary."""
    return KINDS[kind][1]()


def save(folder, kind, head, **settings):
    """A model with a random head in a folder, by transformers; its path."""
    prefix, _, own = KINDS[kind]
    tokenizer = tokenizer_of(kind)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH + 2, **own}
    config = getattr(transformers, f"{prefix}Config")(**sizes, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, prefix + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        if head == "ForQuestionAnswering":  # else spans are so alike that which are the best is a matter of rounding
            model.qa_outputs.weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_head(folder, kind, head, base, seed, **settings):
    """`save`, with the state `base` as its encoder's, but for a pooler; its path."""
    path = save(folder, kind, head, **settings)
    model = fastbert.pipeline(None, path).model
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        for name, parameter in model.base_model.named_parameters():
            if not name.startswith("pooler."):
                parameter.copy_(base[name])
    model.save_pretrained(folder)
    return path


def labels(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def same(ours, theirs, where="answer", tolerance=1e-5):
    """Asserts the same fields, labels and offsets, and scores within 1e-5."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs:
            same(ours[name], theirs[name], f"{where}.{name}", tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), f"{where}: {ours} for {theirs}"
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"{where}[{i}]", tolerance)
    elif isinstance(theirs, str | int) or theirs is None:
        assert ours == theirs, f"{where}: {ours!r} for {theirs!r}"
    else:
        assert abs(float(ours) - float(theirs)) <= tolerance, f"{where}: {ours} for {theirs}"
