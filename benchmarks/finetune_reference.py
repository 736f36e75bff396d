"""The same fine-tuning recipe by transformers' own model, padded batches and torch alone: what fastbert is held to.

    python benchmarks/finetune_reference.py --task classification --model MODEL --train ... (as fastbert finetune)

It takes the arguments of `fastbert finetune`, reads and encodes the data and lays the batches out by fastbert's
`Recipe`, and begins with the same weights. Model, padding, optimizer, schedule and clipping are transformers' and
torch's. The scores are computed by the same functions from each side's logits. Prints them as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from fastbert.cli.finetune import read_recipe
from fastbert.cli.main import build_parser
from fastbert.training.finetune.features import IGNORE
from fastbert.training.finetune.recipe import Dataset, Evaluation, Recipe, better

AT_DEFAULT = {"accumulate": 1, "layer_decay": 1.0, "class_weights": "none", "precision": "fp32"} | {
    "freeze_embeddings": False,
    "freeze_layers": 0,
    "patience": None,
    "evaluate_every": None,
}


def finetune(recipe: Recipe, start: str | Path) -> dict[str, Evaluation]:
    """Trains and returns the evaluations of dev and, where there is one, test, at the best epoch.

    Raises:
        ValueError: a setting that this reference does not know.
    """
    settings = recipe.settings
    for name, value in AT_DEFAULT.items():
        if getattr(settings, name) != value:
            raise ValueError(f"{name} is {getattr(settings, name)!r}; the reference knows {value!r} alone")
    with tempfile.TemporaryDirectory() as folder:
        recipe.fresh_model(start).save_pretrained(folder)
        model = getattr(transformers, recipe.task.model.__name__).from_pretrained(folder)
    plain = ("bias", "LayerNorm.weight")
    parameters = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in parameters if not n.endswith(plain)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in parameters if n.endswith(plain)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, eps=settings.eps)
    epochs = recipe.plan()
    total = sum(map(len, epochs))
    schedule = transformers.get_scheduler(settings.schedule, optimizer, round(settings.warmup_share * total), total)
    best, best_key = {}, (-math.inf, -math.inf)
    torch.manual_seed(settings.seed)
    for steps in epochs:
        model.train()
        for (batch,) in steps:
            arguments, _ = pad(recipe, [recipe.train.features[i] for i in batch])
            model(**arguments).loss.backward()
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        scores = evaluate(recipe, model, recipe.dev).scores
        name = settings.best or recipe.task.scores[0]
        key = (better(name, scores[name]), -scores["loss"])  # of equal scores, the lower loss is better
        if key > best_key:
            best_key, best = key, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best)
    data = {"dev": recipe.dev, "test": recipe.test}
    return {name: evaluate(recipe, model, part) for name, part in data.items() if part is not None}


@torch.no_grad()
def evaluate(recipe: Recipe, model: torch.nn.Module, data: Dataset) -> Evaluation:
    """Loss and scores of the model as it is, without dropout."""
    model.eval()

    def run(features: list) -> tuple[float, float, SimpleNamespace]:
        arguments, mask = pad(recipe, features)
        output = model(**arguments)
        fields = {name: getattr(output, name, None) for name in ("logits", "start_logits", "end_logits")}
        of_tokens = {name: x[mask] if x is not None and x.shape[:2] == mask.shape else x for name, x in fields.items()}
        # Logits of sequences have no axis of tokens, even where there are as many classes.
        kept = fields if recipe.settings.task in ("classification", "multi-label", "regression") else of_tokens
        return float(output.loss), sum(feature.weight for feature in features), SimpleNamespace(**kept)

    return recipe.evaluate(data, run)


def pad(recipe: Recipe, features: list) -> tuple[dict[str, Any], Tensor]:
    """The packed arguments as (B, S) with a mask."""
    packed = dict(recipe.task.collate(features))
    if "attention_mask" in packed:  # choices come padded
        return packed, packed["attention_mask"].bool()
    lengths = packed.pop("cu_seqlens").diff()
    mask = torch.arange(packed.pop("max_seqlen")) < lengths[:, None]
    padded: dict[str, Any] = {"attention_mask": mask.long()}
    for name, tensor in packed.items():
        if len(tensor) == len(mask) and name not in ("input_ids", "token_type_ids"):
            padded[name] = tensor  # one for each sequence
        else:
            table = torch.full(mask.shape, IGNORE if name == "labels" else 0)
            table[mask] = tensor
            padded[name] = table
    return padded, mask


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = build_parser().parse_args(["finetune", *arguments])
    evaluations = finetune(read_recipe(args), args.model)
    print(json.dumps({name: evaluation.scores for name, evaluation in evaluations.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
