"""FillMask: the likeliest tokens for each [MASK] of a text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

import torch

from fastbert.checkpoint.load import Checkpoint
from fastbert.config import BertConfig, family_of
from fastbert.model.auto import AutoModelForMaskedLM
from fastbert.model.heads import ModelForMaskedLM
from fastbert.precision import LoadOptions
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer


class Candidate(NamedTuple):
    """A token for one [MASK], its probability, and the text with it in place."""

    token: str
    probability: float
    sequence: str


class FillMask:
    """A masked-language model and its tokenizer.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    def __init__(self, model: ModelForMaskedLM, tokenizer: Tokenizer) -> None:
        if tokenizer.mask_token is None:
            raise ValueError("the tokenizer has no mask token")
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        inference_only: bool = False,
    ) -> Self:
        """Loads a folder or hub id; dtype to inference_only are those of BertForMaskedLM.from_pretrained.

        Raises:
            FileNotFoundError: config.json, weights or vocabulary are missing.
            ValueError: the checkpoint has no masked-language-model head; and as BertForMaskedLM.from_pretrained.
        """
        config = BertConfig.from_pretrained(path, revision=revision)
        family = family_of(config.model_type)
        with Checkpoint(path, revision, family) as checkpoint:
            name = f"{family.masked_lm.dense or family.masked_lm.decoder}.weight"
            tied = family.masked_lm.dense is None and config.tie_word_embeddings
            if name not in checkpoint and not tied:
                raise ValueError(f"{path}: no tensor {name}: this checkpoint has no masked-language-model head")
        options = LoadOptions(dtype, precision, quantize, device, revision, inference_only)
        model = AutoModelForMaskedLM.of(config).load(path, options)
        return cls(model, tokenizer or AutoTokenizer.from_pretrained(path, revision=revision))

    @torch.inference_mode()
    def __call__(self, text: str, top_k: int = 5) -> list[list[Candidate]]:
        """The `top_k` likeliest tokens for each [MASK]: one list per mask, best first.

        As in transformers, a sequence shows special tokens only if the text has several masks: otherwise the other
        masks would vanish from it.

        Raises:
            TypeError: text is not a str.
            ValueError: the text has no mask, or more tokens than the model takes; top_k is less than 1.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; it must be a str")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        model, tokenizer = self.model, self.tokenizer
        ids = tokenizer(text)["input_ids"]
        limit = model.config.max_length
        if len(ids) > limit:
            raise ValueError(f"the text has {len(ids)} tokens; the model takes {limit}")
        places = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
        if not places:
            raise ValueError(f"the text has no {tokenizer.mask_token}: {text[:80]!r}")
        packed = torch.tensor(ids, device=model.device)
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=model.device)
        output = model.base_model(packed, cu_seqlens=cu_seqlens, max_seqlen=len(ids), return_dict=True)
        logits = model.predictions(output.last_hidden_state[places])  # (masks, V)
        best = logits.float().softmax(dim=1).topk(min(top_k, logits.shape[1]))
        return [
            [
                Candidate(tokenizer.decode([token]), probability, self._fill(ids, place, token, len(places)))
                for probability, token in zip(probabilities, tokens, strict=True)
            ]
            for place, probabilities, tokens in zip(places, best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _fill(self, ids: list[int], place: int, token: int, masks: int) -> str:
        filled = [*ids[:place], token, *ids[place + 1 :]]
        filled = [i for i in filled if i != self.tokenizer.pad_token_id]
        return self.tokenizer.decode(filled, skip_special_tokens=masks == 1)
