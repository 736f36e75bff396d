"""The modules of a sentence-transformers model after its Transformer, except Pooling: Dense, LayerNorm, Normalize.

Each maps rows to rows. A row is a token state or the vector of a text. Weights and arithmetic are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbert import ops
from fastbert.checkpoint.load import Checkpoint
from fastbert.inference.pooling import unit
from fastbert.inference.sentence_settings import FUSED, NORM_EPS, ModuleSettings


@dataclass
class Dense:
    """y = activation(x W^T + b), plus x or its projection where the module has a residual: (M, in) -> (M, out)."""

    tensors: dict[str, Tensor]  # by their names in sentence-transformers' files
    activation: str = "Tanh"  # one of ACTIVATIONS
    residual: bool = False
    where: str = "Dense"  # prefix of error messages

    def __post_init__(self) -> None:
        self.settings = ("Dense", self.activation, self.residual)
        self._activate: Callable[[Tensor], Tensor] = getattr(nn, self.activation)()

    def width_after(self, width: int) -> int:
        out_features, in_features = self.tensors["linear.weight"].shape
        _check_width(self.where, "in_features", in_features, width)
        return out_features

    def __call__(self, x: Tensor) -> Tensor:
        fused = FUSED.get(self.activation)
        y = ops.linear(x, self.tensors["linear.weight"], self.tensors.get("linear.bias"), activation=fused)
        slope = self.tensors.get("activation_function.weight")
        if self.activation not in FUSED:
            y = self._activate(y) if slope is None else F.prelu(y, slope)
        if self.residual:
            y = y + (ops.linear(x, self.tensors["residual.weight"]) if "residual.weight" in self.tensors else x)
        return y


@dataclass
class LayerNorm:
    """torch.nn.LayerNorm over each row."""

    tensors: dict[str, Tensor]
    where: str = "LayerNorm"
    settings = ("LayerNorm",)

    def width_after(self, width: int) -> int:
        _check_width(self.where, "dimension", len(self.tensors["norm.weight"]), width)
        return width

    def __call__(self, x: Tensor) -> Tensor:
        return ops.add_layer_norm(x, None, self.tensors["norm.weight"], self.tensors["norm.bias"], eps=NORM_EPS)


@dataclass
class Normalize:
    """Scales each row to length 1."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings = ("Normalize",)

    def width_after(self, width: int) -> int:
        return width

    def __call__(self, x: Tensor) -> Tensor:
        plain = x.is_cpu and not x.requires_grad
        return torch.from_numpy(unit(x.numpy())) if plain else F.normalize(x, dim=-1)


RowModule = Dense | LayerNorm | Normalize


def apply(modules: Iterable[RowModule], x: Tensor) -> Tensor:
    """Applies `modules` to rows; the modules' tensors move to the rows' device."""
    for module in modules:
        for name, tensor in module.tensors.items():
            module.tensors[name] = tensor.to(x.device)
        x = module(x)
    return x


def made(settings: ModuleSettings) -> RowModule:
    """The module, with its tensors in float32.

    Raises:
        ValueError: a tensor is missing, unexpected or unreadable, or its shape does not match the module's config.json.
    """
    if settings.kind == "Normalize":
        return Normalize()
    tensors = _load_tensors(settings)
    if settings.kind == "LayerNorm":
        return LayerNorm(tensors, str(settings.config))
    return Dense(tensors, settings.activation, settings.residual, str(settings.config))


def _load_tensors(settings: ModuleSettings) -> dict[str, Tensor]:
    tensors = {}
    assert settings.folder is not None
    with Checkpoint(settings.folder) as stored:
        settings.check(stored)
        for name, shape in settings.shapes.items():
            if not (dtype := stored.dtype(name)).is_floating_point:
                raise ValueError(f"{stored.files[name]}: tensor {name} has dtype {dtype}; a weight is no integer")
            tensors[name] = torch.empty(shape, dtype=torch.float32)
            stored.copy_into(tensors[name], name)
    return tensors


def _check_width(where: str, field: str, value: int, width: int) -> None:
    if value != width:
        raise ValueError(f"{where}: {field} is {value}; the rows before it have {width} numbers")
