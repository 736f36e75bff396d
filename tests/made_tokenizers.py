"""Tokenizers of every kind as transformers makes them, trained on a few lines of many scripts."""

from __future__ import annotations

import json

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog, doesn't it? Two foxes; 3.14 and 1,000 dogs.",
    "Der Fuß des Bären, die Größe der Straße. L'été où l'on danse à Paris. ¿Qué pasó mañana?",
    "Быстрая лиса прыгает через ленивую собаку. Η γρήγορη αλεπού.",
    "สวัสดีครับ ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "नमस्ते दुनिया, हिन्दी में कुछ शब्द।",
    "مرحبا بالعالم، هذه جملة باللغة العربية.",
    "안녕하세요 세계, 한국어 문장입니다.",
    "こんにちは世界。日本語の文章です。カタカナ、ｈａｌｆ。",
    "中文没有空格，快速的棕色狐狸。",
    "def f(x):\n\treturn x ** 2  # a comment\n\n\nclass A: pass",
    "tabs\tand\t\tmore   spaces  \u00a0no-break\u2003em\u3000wide\u2028line",
    "emoji 😀 👩‍👩‍👧‍👦 🇫🇷 ☕️ ﬁ ligature ½ Å Å cafe\u0301 café",
]
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train(model, trainer, pre_tokenizer, normalizer=None):
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(LINES * 3, trainer)
    return json.loads(backend.to_str())["model"]


def roberta(**options):
    pieces = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=FAIRSEQ,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model = train(models.BPE(), pieces, pre_tokenizers.ByteLevel(add_prefix_space=False))
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=64, **options)


def unigram():
    pieces = trainers.UnigramTrainer(vocab_size=500, special_tokens=FAIRSEQ, unk_token="<unk>", show_progress=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return [tuple(piece) for piece in train(models.Unigram(), pieces, split, normalizers.NFKC())["vocab"]]


def xlm_roberta():
    return transformers.XLMRobertaTokenizer(vocab=unigram(), model_max_length=64)


def camembert():
    return transformers.CamembertTokenizer(vocab=unigram(), model_max_length=64)


def mpnet():
    pieces = trainers.WordPieceTrainer(vocab_size=500, special_tokens=[*FAIRSEQ, "[UNK]"], show_progress=False)
    normalizer = normalizers.BertNormalizer()
    model = train(models.WordPiece(unk_token="[UNK]"), pieces, pre_tokenizers.BertPreTokenizer(), normalizer)
    return transformers.MPNetTokenizer(vocab=model["vocab"], model_max_length=64)


def as_the_file_says():
    """A tokenizer.json that names no class: ModernBERT's kind."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    pieces = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = Backend(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(LINES * 3, pieces)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)
