"""Embedder: texts in, one vector each out, without a pad token in between."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastbert.checkpoint import Checkpoint
from fastbert.inference.batching import token_budget_batches
from fastbert.inference.sentence_settings import POOLINGS, read_settings
from fastbert.model import BertModel
from fastbert.tokenization import BertTokenizer

MAX_TOKENS = 8192  # a batch: past the size where more tokens a batch are faster on CPU, small on a GPU
WINDOW = 8192  # texts sorted by length together: bounds what is held beside the result
_TOKENIZED_TOGETHER = 256  # the tokenizer keeps offsets and more of each token until a call ends


class Embedder:
    """A model, its tokenizer, and the way from token states to one vector.

    Args:
        model: a BertModel, with a pooler for pooling "pooler".
        tokenizer: of that model.
        pooling: "mean" of the token states, "cls" (the first state) or "pooler" (the model's pooler_output).
        normalize: whether vectors are scaled to length 1.
        max_length: tokens a text is cut to, [CLS] and [SEP] among them; None for as many as model and
            tokenizer take.
        lower_case: whether texts are lower-cased before the tokenizer.
        prompt: put before each text.
        truncate_dim: how many leading numbers of a vector are kept, after normalize; None for all.

    Raises:
        ValueError: no such pooling, no pooler, or a max_length that the model cannot take.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: BertTokenizer,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        lower_case: bool = False,
        prompt: str = "",
        truncate_dim: int | None = None,
    ) -> None:
        positions = model.config.max_position_embeddings
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if pooling == "pooler" and model.pooler is None:
            raise ValueError("pooling is 'pooler', but the model has no pooler")
        if max_length is None:
            max_length = min(tokenizer.model_max_length, positions)
        if not 3 <= max_length <= positions:
            raise ValueError(f"max_length is {max_length}; it must be 3 to max_position_embeddings, {positions}")
        check_truncate_dim(truncate_dim, model.config.hidden_size)
        self.truncate_dim = truncate_dim
        self.model, self.tokenizer = model, tokenizer
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.lower_case, self.prompt = lower_case, prompt

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: BertTokenizer | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        inference_only: bool = False,
    ) -> Self:
        """Loads a folder or hub id; its sentence-transformers files say what pooling to max_length leave None.

        Without such files: the mean, not normalised, as many tokens as model and tokenizer take. dtype, precision,
        quantize and inference_only are those of BertModel.from_pretrained.

        Raises:
            FileNotFoundError: no config.json, weights or vocabulary there.
            ValueError: the folder asks for a pooling or module that fastbert has not, or has no pooler and
                pooling is "pooler"; and what BertModel.from_pretrained raises.
        """
        settings = read_settings(path, pooling, normalize, revision)
        if settings.pooling == "pooler":
            with Checkpoint(path, revision) as checkpoint:
                if "pooler.dense.weight" not in checkpoint:
                    raise ValueError(f"{path}: no tensor pooler.dense.weight, so no pooling 'pooler'")
        model = BertModel.from_pretrained(
            path,
            dtype=dtype,
            precision=precision,
            quantize=quantize,
            device=device,
            revision=revision,
            inference_only=inference_only,
            add_pooling_layer=settings.pooling == "pooler",
        )
        check_truncate_dim(
            settings.truncate_dim, model.config.hidden_size, f"{path}/config_sentence_transformers.json: "
        )
        if tokenizer is None:
            tokenizer = BertTokenizer.from_pretrained(path, revision=revision)
        if max_length is None:
            limits = (settings.max_length, tokenizer.model_max_length, model.config.max_position_embeddings)
            max_length = min(limit for limit in limits if limit is not None)
            if max_length < 3:
                raise ValueError(
                    f"{path}: max_seq_length in sentence_bert_config.json, model_max_length in tokenizer_config.json, "
                    f"max_position_embeddings in config.json are {', '.join(map(str, limits))}; each must be at least 3"
                )
        try:
            return cls(
                model,
                tokenizer,
                pooling=settings.pooling,
                normalize=settings.normalize,
                max_length=max_length,
                lower_case=settings.lower_case,
                prompt=settings.prompt,
                truncate_dim=settings.truncate_dim,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def width(self) -> int:
        """The length E of a vector."""
        return self.model.config.hidden_size if self.truncate_dim is None else self.truncate_dim

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, cut to `max_length`."""
        texts = [self.prompt + text for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TOKENIZED_TOGETHER):
            batch = self.tokenizer(
                texts[start : start + _TOKENIZED_TOGETHER],
                truncation=True,
                max_length=self.max_length,
                return_token_type_ids=False,
                return_attention_mask=False,
            )
            ids.extend(batch["input_ids"])
        return ids

    @torch.inference_mode()
    def embed_tokens(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """Vectors of texts given as ids with their special tokens: (B, E) float32 on the model's device.

        Raises:
            ValueError: an id outside the vocabulary, a text over max_position_embeddings.
        """
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids in batch], dtype=torch.int64, device="cpu")
        cu_seqlens = torch.zeros(len(batch) + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(lengths, dim=0, out=cu_seqlens[1:])
        ids = torch.tensor([i for text in batch for i in text], dtype=torch.int64, device=device)
        longest = int(lengths.max()) if len(batch) else 0
        output = self.model(ids, cu_seqlens=cu_seqlens.to(device), max_seqlen=longest, return_dict=True)
        if self.pooling == "pooler":
            vectors = output.pooler_output.float()
        elif self.pooling == "cls":
            vectors = _first(output.last_hidden_state, cu_seqlens.to(device), lengths.to(device)).float()
        else:
            vectors = _mean(output.last_hidden_state.float(), lengths.to(device))
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors[:, : self.width]

    def embed(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int = MAX_TOKENS,
        progress: bool | Callable[[int, int], None] = False,
    ) -> np.ndarray:
        """Vectors of texts, in their order: (N, E) float32.

        Args:
            texts: a list of str; an empty text is [CLS] [SEP].
            max_tokens: most real tokens that go through the model together.
            progress: True for a bar on stderr; or a function, called with the number of texts and of tokens
                of each batch when it is done.

        Raises:
            TypeError: texts is one string, or holds something else than str.
            ValueError: max_tokens is less than 1.
        """
        if isinstance(texts, str | bytes | dict) or not hasattr(texts, "__len__") or not hasattr(texts, "__getitem__"):
            raise TypeError(f"texts is a {type(texts).__name__}; it must be a list of str")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is a {type(text).__name__}; it must be a str")
        vectors = np.empty((len(texts), self.width), dtype=np.float32)
        with _reporting(progress, len(texts)) as report:
            for start in range(0, len(texts), WINDOW):
                ids = self.tokenize(texts[start : start + WINDOW])
                window = vectors[start : start + WINDOW]
                for batch in token_budget_batches([len(text) for text in ids], max_tokens):
                    window[batch] = self.embed_tokens([ids[i] for i in batch]).cpu().numpy()
                    report(len(batch), sum(len(ids[i]) for i in batch))
        return vectors

    def fingerprint(self) -> str:
        """A hash of all that the vectors follow from: weights, precision, vocabulary, settings (not the device)."""
        if any(p.is_meta for p in self.model.parameters()):
            raise ValueError("the model was loaded with inference_only=True and has no weights left to hash")
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        vocab = sorted(self.tokenizer.get_vocab().items())
        config = sorted(self.model.config.to_dict().items())
        digest.update(repr((vocab, repr(self.tokenizer), config, self.lower_case, self.prompt)).encode())
        digest.update(f"{self.pooling} {self.normalize} {self.max_length} {self.truncate_dim}".encode())
        digest.update(f"{self.model.matmul_precision}".encode())
        return digest.hexdigest()


def check_truncate_dim(value: object, hidden_size: int, where: str = "") -> None:
    if value is not None and (type(value) is not int or not 1 <= value <= hidden_size):
        raise ValueError(f"{where}truncate_dim is {value!r}; it must be 1 to {hidden_size}, or None")


def _first(x: Tensor, cu_seqlens: Tensor, lengths: Tensor) -> Tensor:
    """The first row of each segment, (T, E) -> (B, E); zeros for one without rows."""
    if not x.shape[0]:
        return x.new_zeros(len(lengths), x.shape[1])
    return x[cu_seqlens[:-1].long().clamp(max=x.shape[0] - 1)] * (lengths > 0)[:, None]


def _mean(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean over each segment's rows, (T, E) -> (B, E); zeros for one without rows."""
    if not x.shape[0]:
        return x.new_zeros(len(lengths), x.shape[1])
    # Unlike index_add_, each sum runs in one order, whatever stands beside the segment. `unsafe` leaves out
    # a check of the lengths that waits for the device.
    sums = torch.segment_reduce(x, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums / lengths.clamp(min=1)[:, None]


@contextmanager
def _reporting(progress: bool | Callable[[int, int], None], total: int) -> Iterator[Callable[[int, int], None]]:
    if callable(progress) or not progress:
        yield progress or (lambda texts, tokens: None)
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="text", unit_scale=True) as bar:
        tokens_done = 0

        def report(texts: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            bar.update(texts)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens_done / max(elapsed, 1e-9):,.0f} tokens/s", refresh=False)

        yield report
