"""MultiHead: several classifiers on one encoder, which runs once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.inference.ahead import ahead
from fastbert.inference.base_embedder import MAX_TOKENS
from fastbert.inference.windows import Window
from fastbert.model.auto import AutoModel
from fastbert.model.bert import EncoderModel, run_bert
from fastbert.tasks.base import Pipeline
from fastbert.tasks.base_runner import chunks
from fastbert.tasks.pipelines import pipeline
from fastbert.tasks.runner import Runner
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer

TASKS = ("text-classification", "token-classification")


class MultiHead:
    """Texts to the answers of several models that were fine-tuned on one frozen encoder (`--freeze-layers`).

    Args:
        base: the encoder: a folder, a hub id, or a model of fastbert.
        heads: for each name a model with a head: a folder, a hub id, or a model of fastbert. Their encoders must be the
            base, bit for bit; a pooler may be a head's own. The weights are held once.
        tokenizer: the base's (default: of its folder).
        max_tokens: most real tokens of a batch.
        options: how folders are loaded: dtype, precision, quantize, device.

    Raises:
        ValueError: no heads, a head of another task than text- or token-classification, or one whose encoder or
            vocabulary differs.
    """

    def __init__(
        self,
        base: str | Path | EncoderModel,
        heads: Mapping[str, Any],
        *,
        tokenizer: Tokenizer | None = None,
        max_tokens: int = MAX_TOKENS,
        **options: Any,
    ) -> None:
        if not heads:
            raise ValueError("heads is empty; there must be a model at least")
        if isinstance(base, str | Path):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
            base = AutoModel.from_pretrained(base, add_pooling_layer=False, **options)
        if tokenizer is None:
            raise ValueError("tokenizer is missing: the base is a model, not a folder")
        self.base: Any = base
        self.runner = Runner(base, tokenizer, max_tokens=max_tokens)
        self.heads: dict[str, Pipeline] = {}
        for name, model in heads.items():
            given = options if isinstance(model, str | Path) else {}
            if given is options and AutoTokenizer.from_pretrained(model).get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"heads[{name!r}] has another vocabulary than the base")
            head = pipeline(None, model, tokenizer=tokenizer, max_tokens=max_tokens, **given)
            if head.task not in TASKS:
                raise ValueError(f"heads[{name!r}] is for {head.task}; MultiHead runs {' and '.join(TASKS)}")
            _share(name, self.base, head.model.base_model)
            self.heads[name] = head

    def __call__(self, texts: Any, **settings: Mapping[str, Any]) -> Any:
        """The answers of each head, by its name, to a text; or a list of them; or an iterator, for any other iterable.

        Args:
            settings: for a head, by its name, the arguments of its pipeline: `topics={"top_k": 3}`.
        """
        if unknown := settings.keys() - self.heads.keys():
            raise TypeError(f"there is no head {min(unknown)!r}; there are {', '.join(map(repr, self.heads))}")
        chosen = {name: head.settings(**settings.get(name, {})) for name, head in self.heads.items()}
        answers = self._stream([texts] if isinstance(texts, str) else texts, chosen)
        if isinstance(texts, str):
            return next(answers)
        return list(answers) if isinstance(texts, list | tuple) else answers

    def _stream(self, texts: Iterable[str], chosen: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        first = next(iter(self.heads.values()))
        items = (first.check(text, where) for where, text in enumerate(texts))
        for chunk, windows in ahead(chunks(items, len), self.runner.windows):
            found = self._run(windows)
            told = [head.answers(chunk, windows, found[name], chosen[name]) for name, head in self.heads.items()]
            for several in zip(*told, strict=True):
                yield dict(zip(self.heads, (answer for answer, _ in several), strict=True))

    @torch.inference_mode()
    def _run(self, windows: list[Window]) -> dict[str, list[np.ndarray]]:
        """Of each head, its logits of each window: (classes,), or (T, classes)."""
        found: dict[str, list[np.ndarray]] = {name: [np.empty(0)] * len(windows) for name in self.heads}
        for batch, inputs in self.runner.batches(windows):
            encoded = run_bert(self.base, self.base.config, precision=self.base.matmul_precision, **inputs)
            for name, head in self.heads.items():
                logits = head.model(encoded=encoded, return_dict=True).logits.float().cpu()
                lengths = [len(windows[i]) for i in batch]
                parts = logits.split(lengths) if head.task == TASKS[1] else logits.unbind()
                for i, part in zip(batch, parts, strict=True):
                    found[name][i] = part.numpy()
        return found


def _share(name: str, base: Any, own: Any) -> None:
    """Checks that a head's encoder is the base, and gives it the base's tensors, so that they are held once."""
    theirs = dict(own.named_parameters())
    for path, parameter in base.named_parameters():
        if path.startswith("pooler."):
            continue
        other = theirs.get(path)
        if other is None or other.shape != parameter.shape or not torch.equal(other, parameter):
            raise ValueError(f"heads[{name!r}] has another {path} than the base; its encoder must be the base")
        owner, _, leaf = path.rpartition(".")
        setattr(own.get_submodule(owner), leaf, parameter)
