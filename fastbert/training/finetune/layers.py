"""What of a model is trained, and how fast: frozen parts, and a learning rate that falls from layer to layer."""

from __future__ import annotations

import re

from torch import nn

from fastbert.model import BertPreTrainedModel
from fastbert.training.optimizer import decay_groups

_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")


def depth_of(name: str, layers: int) -> int:
    """Where a parameter stands: 0 the embeddings, 1 to `layers` the layers, `layers` + 1 the pooler and the head."""
    if match := _LAYER.search(name):
        return int(match[1]) + 1
    return 0 if ".embeddings." in f".{name}" else layers + 1


def freeze(model: BertPreTrainedModel, *, embeddings: bool, layers: int) -> None:
    """Trains neither the embeddings, where asked, nor the first `layers` layers.

    Raises:
        ValueError: the model has fewer layers.
    """
    count = model.config.num_hidden_layers
    if layers > count:
        raise ValueError(f"freeze_layers is {layers}; the model has {count} layers")
    for name, parameter in model.named_parameters():
        depth = depth_of(name, count)
        parameter.requires_grad_(not ((embeddings and depth == 0) or 1 <= depth <= layers))


def layer_groups(model: BertPreTrainedModel, weight_decay: float, layer_decay: float) -> list[dict]:
    """`decay_groups`, each cut by depth: `rate` is what the learning rate is multiplied with.

    1 at the head, and `layer_decay` times as much at each layer as at the one above it (Howard and Ruder, 2018).
    """
    layers = model.config.num_hidden_layers
    depths: dict[nn.Parameter, int] = {p: depth_of(name, layers) for name, p in model.named_parameters()}
    groups = []
    for group in decay_groups(model, weight_decay):
        for depth in sorted({depths[p] for p in group["params"]}):
            params = [p for p in group["params"] if depths[p] == depth]
            groups.append({**group, "params": params, "rate": layer_decay ** (layers + 1 - depth)})
    return groups
