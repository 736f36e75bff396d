"""BERT's tokenizer: WordPiece, by its arguments or files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import collector_at_rest
from fastbert.tokenizer.files import TokenizerFiles, as_added_token, content_of, read_folder, read_vocab
from fastbert.tokenizer.tokenizer import PIPELINE, Tokenizer


class BertTokenizer(Tokenizer):
    """WordPiece tokenizer with the ids of transformers' BertTokenizer; safe to call from several threads.

    `vocab` is a dict token -> id, a list of tokens, or the path of a vocab.txt. The other arguments are those
    of tokenizer_config.json. `added_tokens` are strings or `tokenizers.AddedToken`. Raises ValueError for a
    vocabulary that is empty, is not UTF-8 or lacks a special token.
    """

    def __init__(
        self,
        vocab: dict[str, int] | Sequence[str] | str | os.PathLike,
        *,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        unk_token: Any = "[UNK]",
        sep_token: Any = "[SEP]",
        pad_token: Any = "[PAD]",
        cls_token: Any = "[CLS]",
        mask_token: Any = "[MASK]",
        added_tokens: Iterable[Any] = (),
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool | None = False,
        split_special_tokens: bool = False,
        model_input_names: Iterable[str] = ("input_ids", "token_type_ids", "attention_mask"),
        max_input_chars_per_word: int = 100,
        continuing_subword_prefix: str = "##",
    ) -> None:
        where = f" {os.fspath(vocab)}" if isinstance(vocab, str | os.PathLike) else ""
        vocab = read_vocab(vocab)
        special = dict(
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            cls_token=cls_token,
            mask_token=mask_token,
        )
        if mask_token is None:
            del special["mask_token"]
        added = [as_added_token(token) for token in added_tokens]
        known = {token.content for token in added}
        for name, token in special.items():
            if token is None or (content_of(token) not in vocab and content_of(token) not in known):
                raise ValueError(f"the vocabulary{where} has no {name} {content_of(token)!r}")
            if content_of(token) not in known:
                added.append(as_added_token(token, special=True))

        named = {content_of(token) for token in special.values()}
        for token in added:
            token.special = token.special or token.content in named
        normalization = dict(
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
        )
        shape = {
            "max_input_chars_per_word": max_input_chars_per_word,
            "continuing_subword_prefix": continuing_subword_prefix,
        }
        super().__init__(
            _word_piece(
                vocab, added, {name: content_of(token) for name, token in special.items()}, normalization, shape
            ),
            special,
            model_max_length=model_max_length,
            padding_side=padding_side,
            truncation_side=truncation_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
            model_input_names=model_input_names,
            tokenizer_class="BertTokenizer",
        )
        self._normalization = normalization

    @classmethod
    @collector_at_rest()
    def from_pretrained(cls, path_or_id: str | os.PathLike, *, revision: str | None = None) -> BertTokenizer:
        """Reads tokenizer.json or vocab.txt, and the configuration next to it, from a folder or a hub id.

        Where the files disagree, the choice is that of transformers: vocabulary and added tokens from
        tokenizer.json; lower-casing, accents and Chinese characters from tokenizer_config.json.
        """
        return cls._of(read_folder(path_or_id, revision))

    @classmethod
    def _of(cls, files: TokenizerFiles) -> BertTokenizer:
        try:
            tokenizer = cls(files.vocab, added_tokens=files.added, **files.options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{files.source}: {error}") from error
        if files.pipeline is not None:
            tokenizer._take_pipeline(files.pipeline)
        for token, index in files.added_ids.items():
            if (got := tokenizer._backend.token_to_id(token)) != index:
                raise ValueError(f"{files.source}: added token {token!r} cannot have id {index}, it gets {got}")
        return tokenizer

    def _take_pipeline(self, file: Path) -> None:
        from tokenizers import Tokenizer

        try:
            stored = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file}: {error}") from error
        for part in PIPELINE:
            setattr(self._backend, part, getattr(stored, part))
        self._tokenizer_class = "PreTrainedTokenizerFast"


def _word_piece(
    vocab: dict[str, int], added: list, special: dict[str, str], normalization: dict[str, Any], shape: dict[str, Any]
) -> Any:
    """A backend: the special tokens are strings, `shape` holds arguments of the library's WordPiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"], **shape))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=normalization["tokenize_chinese_chars"],
        strip_accents=normalization["strip_accents"],
        lowercase=normalization["do_lower_case"],
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=shape["continuing_subword_prefix"])
    backend.add_tokens(added)
    cls, sep = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    return backend
