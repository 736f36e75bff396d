"""Freezing parts of a model, and layer-wise decay of the learning rate."""

from __future__ import annotations

from torch import nn

from fastbert.model import BertPreTrainedModel
from fastbert.training.optimizer import LAYER, decay_groups


def depth_of(name: str, layers: int) -> int:
    """The depth of a parameter: 0 embeddings, 1 to `layers` the layers, `layers` + 1 pooler and head."""
    if match := LAYER.search(name):
        return int(match[1]) + 1
    return 0 if ".embed" in f".{name}" else layers + 1  # or embed_tokens, embeddings_project


def freeze(model: BertPreTrainedModel, *, embeddings: bool, layers: int) -> None:
    """Freezes the embeddings, if `embeddings`, and the first `layers` layers.

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
    """`decay_groups`, each split by depth. A group's `rate` is a factor of the learning rate.

    It is 1 at the head, and at each layer `layer_decay` times that of the layer above (Howard and Ruder, 2018).
    """
    layers = model.config.num_hidden_layers
    depths: dict[nn.Parameter, int] = {p: depth_of(name, layers) for name, p in model.named_parameters()}
    groups = []
    for group in decay_groups(model, weight_decay):
        for depth in sorted({depths[p] for p in group["params"]}):
            params = [p for p in group["params"] if depths[p] == depth]
            groups.append({**group, "params": params, "rate": layer_decay ** (layers + 1 - depth)})
    return groups
