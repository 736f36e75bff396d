"""The modules of a sentence-transformers model after its Transformer, except Pooling, without torch: see
inference.sentence_modules. Weights and arithmetic are float32."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fastbert.engine.library import C
from fastbert.engine.memory import address_of
from fastbert.engine.packed import RowBlock, pack
from fastbert.engine.rows import layer_norm, linear
from fastbert.families import BERT
from fastbert.inference.pooling import unit
from fastbert.inference.sentence_settings import FUSED, NORM_EPS, ModuleSettings
from fastbert.lazy import needs_torch
from fastbert.light.weights import Weights


@dataclass
class Dense:
    """y = activation(x W^T + b), plus x or its projection where the module has a residual: (M, in) -> (M, out)."""

    products: dict[str, np.ndarray]  # packed, by their names in the file
    in_features: int
    out_features: int
    activation: str | None
    residual: bool
    threads: int
    where: str
    digest: bytes

    def width_after(self, width: int) -> int:
        _check_width(self.where, "in_features", self.in_features, width)
        return self.out_features

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = self._product("linear", x, self.activation)
        if self.residual:
            y = y + (self._product("residual", x, None) if "residual" in self.products else x)
        return y

    def _product(self, name: str, x: np.ndarray, activation: str | None) -> np.ndarray:
        options = {"dtype": C.F32, "threads": self.threads, "activation": activation}
        return linear(x, self.products[name], self.out_features, **options)


@dataclass
class LayerNorm:
    """torch.nn.LayerNorm over each row."""

    weight: np.ndarray
    bias: np.ndarray
    threads: int
    where: str
    digest: bytes

    def width_after(self, width: int) -> int:
        _check_width(self.where, "dimension", len(self.weight), width)
        return width

    def __call__(self, x: np.ndarray) -> np.ndarray:
        weight, bias = address_of(self.weight), address_of(self.bias)
        return layer_norm(x, weight, bias, eps=NORM_EPS, dtype=C.F32, threads=self.threads)


@dataclass
class Normalize:
    """Scales each row to length 1."""

    digest = b"Normalize"

    def width_after(self, width: int) -> int:
        return width

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return unit(x)


RowModule = Dense | LayerNorm | Normalize


def made(settings: ModuleSettings, threads: int) -> RowModule:
    """The module, with its tensors in float32.

    Raises:
        ImportError: its activation needs torch.
        ValueError: a tensor is missing, unexpected or unreadable, or its shape does not match the module's config.json.
    """
    if settings.kind == "Normalize":
        return Normalize()
    tensors = _tensors(settings)
    text = repr((settings.kind, settings.activation, settings.residual, settings.shapes))
    digest = hashlib.sha256(text.encode() + b"".join(x.tobytes() for x in tensors.values())).digest()
    if settings.kind == "LayerNorm":
        return LayerNorm(tensors["norm.weight"], tensors["norm.bias"], threads, str(settings.config), digest)
    if settings.activation not in FUSED:
        raise needs_torch(f"{settings.config}: {settings.activation}")
    products = {
        name: _packed(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), threads)
        for name in ("linear", "residual")
        if f"{name}.weight" in tensors
    }
    rows, columns = settings.shapes["linear.weight"]
    activation = FUSED[settings.activation]
    return Dense(products, columns, rows, activation, settings.residual, threads, str(settings.config), digest)


def _packed(weight: np.ndarray, bias: np.ndarray | None, threads: int) -> np.ndarray:
    block = RowBlock(len(weight), address_of(weight), weight.shape[1], 0 if bias is None else address_of(bias))
    return pack(C.F32, None, [block], weight.shape[1], threads)


def _tensors(settings: ModuleSettings) -> dict[str, np.ndarray]:
    assert settings.folder is not None
    stored = Weights(settings.folder, None, BERT, "float32")
    settings.check(stored)
    return {name: stored.get(name, shape).copy() for name, shape in settings.shapes.items()}


def _check_width(where: str, name: str, value: int, width: int) -> None:
    if value != width:
        raise ValueError(f"{where}: {name} is {value}; the rows before it have {width} numbers")
