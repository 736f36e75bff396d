"""attribute: which tokens of a text an answer rests on, by integrated gradients or by leaving them out.

Integrated gradients (Sundararajan et al., 2017) of a class's logit over the word embeddings, from a baseline of [PAD]
(special tokens stay): the arguments and the numbers of captum's LayerIntegratedGradients. All steps of a text are one
batch without pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.checkpoint.files import write_text
from fastbert.tasks.attribution_page import Attribution, page
from fastbert.tasks.base import Pipeline
from fastbert.tasks.pipelines import made_pipeline

METHODS = ("integrated_gradients", "occlusion")


def attribute(
    model: Any,
    text: Any,
    *,
    target: int | str | None = None,
    method: str = "integrated_gradients",
    n_steps: int = 50,
    internal_batch_size: int | None = None,
    baselines: int | None = None,
    return_convergence_delta: bool = False,
    **options: Any,
) -> Any:
    """Attributes a class's logit to the tokens of a text.

    Args:
        model: a text-classification pipeline; or what `pipeline` takes, with its options.
        text: a str; or a pair, as the pipeline takes it.
        target: the class, by number or name (default: the one predicted).
        method: "integrated_gradients"; or "occlusion": what the logit loses when a token is replaced by the baseline's.
        n_steps: points on the path, by Gauss-Legendre's rule.
        internal_batch_size: most copies of the text that run together (default: as many as the pipeline's max_tokens).
        baselines: the id that stands for no token (default: [PAD]'s).
        return_convergence_delta: whether to return (attribution, its delta), as captum does.

    Returns:
        An Attribution.

    Raises:
        TypeError: options for a pipeline that is made already.
        ValueError: another method or class, n_steps below 1, or a text with more tokens than the model takes.
    """
    pipe = made_pipeline("text-classification", model, options)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be {' or '.join(METHODS)}")
    for name, value in (("n_steps", n_steps), ("internal_batch_size", internal_batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    encoding = _encoding(pipe, text)
    found = _Attributing(pipe, encoding, internal_batch_size)
    logits = found.logits(found.ids[None])[0]
    wanted = _target(pipe, target, logits)
    blank = pipe.tokenizer.pad_token_id if baselines is None else baselines
    special = torch.tensor(encoding.special_tokens_mask, dtype=torch.bool)
    base = torch.where(special, found.ids, torch.full_like(found.ids, blank))
    start = float(found.logits(base[None])[0, wanted])
    if method == "occlusion":
        copies = found.ids.repeat(len(found.ids), 1)
        copies[range(len(base)), range(len(base))] = base
        scores, delta = logits[wanted] - found.logits(copies)[:, wanted], None
    else:
        scores = found.integrated(base, wanted, n_steps)
        delta = float(scores.double().sum()) - (float(logits[wanted]) - start)
    made = Attribution(
        text=text,
        tokens=list(encoding.tokens),
        offsets=list(encoding.offsets),
        scores=scores.numpy(),
        label=str(pipe.runner.config.id2label[wanted]),
        target=wanted,
        score=float(pipe.scores(logits.numpy())[wanted]),
        logit=float(logits[wanted]),
        baseline=start,
        delta=delta,
    )
    return (made, delta) if return_convergence_delta else made


def attention_maps(model: Any, text: Any, **options: Any) -> tuple[list[str], np.ndarray]:
    """The tokens of a text, and the attention of each layer and head, (L, H, T, T): of queries, then keys."""
    pipe = made_pipeline("text-classification", model, options)
    encoding = _encoding(pipe, text)
    found = _Attributing(pipe, encoding, None)
    with torch.inference_mode():
        output = pipe.model(**found.arguments(found.ids[None]), output_attentions=True, return_dict=True)
    return list(encoding.tokens), torch.cat(list(output.attentions)).float().cpu().numpy()


def nearest_tokens(model: Any, token: str | int, top_k: int = 10, **options: Any) -> list[tuple[str, float]]:
    """(token, cosine) of the vocabulary's nearest to a token, by the word embeddings.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    pipe = made_pipeline("text-classification", model, options)
    index = pipe.tokenizer.get_vocab().get(token) if isinstance(token, str) else token
    table = pipe.model.get_input_embeddings().weight.detach().float()
    if index is None or not 0 <= index < len(table):
        raise ValueError(f"token is {token!r}; the vocabulary has none such")
    cosines = torch.nn.functional.cosine_similarity(table, table[index][None])
    cosines[index] = -torch.inf
    best = cosines.topk(min(top_k, len(table) - 1))
    names = pipe.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    return list(zip(names, best.values.tolist(), strict=True))


class _Attributing:
    """A text of T tokens, copies of which run together."""

    def __init__(self, pipe: Pipeline, encoding: Any, batch: int | None) -> None:
        self.pipe, self.model = pipe, pipe.model
        self.ids = torch.tensor(encoding.ids)
        self.types = torch.tensor(encoding.type_ids) if pipe.runner.has_types else None
        self.batch = batch or max(1, pipe.runner.max_tokens // len(encoding))

    def arguments(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> dict[str, Any]:
        """Of the model, for copies that differ in their ids (B, T) or embeddings (B, T, E)."""
        given: dict[str, Any] = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        (tokens,) = given.values()
        if self.types is not None:
            given["token_type_ids"] = self.types.expand(len(tokens), -1)
        if first := self.pipe.runner.config.first_position:  # else they are counted without pads, which a baseline has
            given["position_ids"] = torch.arange(first, first + len(self.ids)).expand(len(tokens), -1)
        return {name: value.to(self.model.device) for name, value in given.items()}

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """(B, classes) float32."""
        rows = [self.model(**self.arguments(part), return_dict=True).logits for part in ids.split(self.batch)]
        return torch.cat(rows).float().cpu()

    def integrated(self, base: Tensor, target: int, n_steps: int) -> Tensor:
        """(T,) float32."""
        table: Any = self.model.get_input_embeddings()
        with frozen(self.model), torch.no_grad():
            here, there = (table(ids.to(self.model.device)) for ids in (self.ids, base))
        points, weights = np.polynomial.legendre.leggauss(n_steps)
        alphas = torch.tensor((1 + points) / 2, dtype=here.dtype, device=here.device)
        shares = torch.tensor(weights / 2, dtype=here.dtype, device=here.device)
        total = torch.zeros_like(here)
        with frozen(self.model):
            for alpha, share in zip(alphas.split(self.batch), shares.split(self.batch), strict=True):
                embeds = (there + alpha[:, None, None] * (here - there)).requires_grad_()
                output = self.model(**self.arguments(embeds=embeds), return_dict=True)
                (gradient,) = torch.autograd.grad(output.logits[:, target].sum(), embeds)
                total += torch.einsum("b,bte->te", share, gradient)
        return ((here - there) * total).sum(-1).float().cpu()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it no parameter asks for a gradient: only that of the embeddings is computed."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()


def _encoding(pipe: Pipeline, text: Any) -> Any:
    windows = pipe.windows([pipe.check(text, 0)], pipe.settings())
    if len(windows) > 1:
        raise ValueError(f"the text has more tokens than the model takes, {pipe.runner.max_length}")
    return windows[0].encoding


def _target(pipe: Pipeline, target: int | str | None, logits: Tensor) -> int:
    names = pipe.runner.config.id2label
    if target is None:
        return int(logits.argmax())
    number: Any = target
    if isinstance(target, str):  # a name, which may be a number; or else a number
        named = [i for i, name in names.items() if name == target]
        number = named[0] if named else int(target) if target.isdecimal() else None
    if number not in names:
        raise ValueError(
            f"target is {target!r}; it must be one of {', '.join(map(repr, names.values()))}, or its number"
        )
    return int(number)


def write_page(
    path: str | Path, found: Attribution, maps: np.ndarray, near: dict[str, list[tuple[str, float]]]
) -> None:
    """One self-contained HTML page: the text with what each token adds, attention by layer and head, nearest tokens."""
    write_text(Path(path), page(found, maps, near))
