"""What every loader takes, `LoadOptions`, and how the encoder multiplies: `precision=` and `quantize=`.

The two come to one setting, the `precision` of ops.linear: a product is split into bf16 terms or quantised, never
both. None multiplies the operands as they are, in their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SPLIT = ("high", "highest")  # of precision=
QUANTIZED = ("int8", "fp8")  # of quantize=
PRECISIONS = (*SPLIT, *QUANTIZED)
DEVICES = {"int8": ("cpu", "cuda"), "fp8": ("cuda",)}  # where a quantised product is more than a slow reference
_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}  # of an NVIDIA GPU that has the products


@dataclass(frozen=True)
class LoadOptions:
    """The options that `from_pretrained` of models, Embedder and FillMask share, as BertModel's describes them.

    Raises:
        ValueError: precision and quantize are both given, or one has an unknown value.
    """

    dtype: torch.dtype | None = None
    precision: str | None = None
    quantize: str | None = None
    device: torch.device | str | None = None
    revision: str | None = None
    inference_only: bool = False

    def __post_init__(self) -> None:
        for name, known in (("precision", SPLIT), ("quantize", QUANTIZED)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} is {value!r}; it must be None, {' or '.join(map(repr, known))}")
        if self.precision is not None and self.quantize is not None:
            raise ValueError(
                f"precision is {self.precision!r} and quantize is {self.quantize!r}; at most one of them may be given"
            )

    @property
    def setting(self) -> str | None:
        """The one setting that precision and quantize come to."""
        return self.precision or self.quantize


def describe_setting(dtype: torch.dtype, setting: str | None) -> str:
    """What a model runs in, as the user asked for it: float32, quantize='int8'."""
    words = str(dtype).removeprefix("torch.")
    if setting is None:
        return words
    return f"{words}, {'quantize' if setting in QUANTIZED else 'precision'}={setting!r}"


def check_precision(setting: str | None, dtype: torch.dtype, device: torch.device | str) -> None:
    """Holds weights of `dtype` on `device` to what a setting takes.

    Raises:
        ValueError: precision= and weights that are not float32, or quantize= on a device that lacks its products.
    """
    import torch

    if setting in SPLIT and dtype != torch.float32:
        raise ValueError(
            f"precision is {setting!r} and the weights are {str(dtype).removeprefix('torch.')}; "
            "it is for float32 weights: give dtype=torch.float32, or no precision"
        )
    kind = torch.device(device).type
    if setting in DEVICES and kind not in DEVICES[setting]:
        needed = ".".join(map(str, _CAPABILITY[setting]))
        known = f"{', '.join(DEVICES[setting])} from compute capability {needed}"
        raise ValueError(f"quantize is {setting!r} and the device is {kind}; it runs on {known}")
    if setting in QUANTIZED and kind == "cuda" and (reason := quantized_reason(setting, torch.device(device))):
        raise ValueError(f"quantize is {setting!r} and {device} is {reason}")


@cache
def quantized_reason(setting: str, device: torch.device) -> str | None:
    """Why a GPU has no products of this quantize=; None where it has."""
    import torch

    if torch.version.hip:
        # AMD's float8 before gfx950 is e4m3fnuz: half the range, another bias; numbers would not be the reference's.
        return None if setting == "int8" else "an AMD GPU; fp8 is NVIDIA's float8_e4m3fn, and int8 runs"
    capability = torch.cuda.get_device_capability(device)
    needed = _CAPABILITY[setting]
    if capability >= needed:
        return None
    return f"of compute capability {capability[0]}.{capability[1]}; it needs {needed[0]}.{needed[1]}"
