"""`LoadOptions`, which every loader takes, and the precision of the encoder's products: `precision=` and `quantize=`.

The two are merged into one setting, the `precision` of ops.linear: a product is split into bf16 terms or quantised,
never both. None multiplies the operands as they are, in their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

SPLIT = ("high", "highest")  # of precision=
QUANTIZED = ("int8",)  # of quantize=
PRECISIONS = (*SPLIT, *QUANTIZED)
_CAPABILITY = (8, 0)  # the least compute capability of an NVIDIA GPU for int8 products


@dataclass(frozen=True)
class LoadOptions:
    """The options shared by `from_pretrained` of models, Embedder and FillMask; BertModel's describes them.

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
                names = ", ".join(["None", *map(repr, known[:-1])])
                raise ValueError(f"{name} is {value!r}; it must be {names} or {known[-1]!r}")
        if self.precision is not None and self.quantize is not None:
            raise ValueError(
                f"precision is {self.precision!r} and quantize is {self.quantize!r}; at most one of them may be given"
            )

    @classmethod
    def named(cls, device: str | None, dtype: str | None, **options: Any) -> Self:
        """Of the names of a device, see `torch_device`, and of a dtype: "float32", say.

        Raises:
            ValueError: there is no such device; and as above.
        """
        import torch

        return cls(getattr(torch, dtype) if dtype else None, device=torch_device(device), **options)

    @property
    def setting(self) -> str | None:
        """precision or quantize, whichever is given."""
        return self.precision or self.quantize


def torch_device(name: str | None) -> str:
    """The device of that name; without a name a GPU, if there is one.

    Raises:
        ValueError: the device does not exist.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {device!r}: {' '.join(str(error).split())}") from error
    return device


def describe_setting(dtype: torch.dtype, setting: str | None) -> str:
    """A dtype and a setting in the user's terms: float32, quantize='int8'."""
    words = str(dtype).removeprefix("torch.")
    if setting is None:
        return words
    return f"{words}, {'quantize' if setting in QUANTIZED else 'precision'}={setting!r}"


def check_precision(setting: str | None, dtype: torch.dtype, device: torch.device | str) -> None:
    """Checks that a setting supports weights of `dtype` on `device`.

    Raises:
        ValueError: precision= with weights that are not float32, or quantize= on a device without int8 products.
    """
    import torch

    if setting in SPLIT and dtype != torch.float32:
        raise ValueError(
            f"precision is {setting!r} and the weights are {str(dtype).removeprefix('torch.')}; "
            "it is for float32 weights: give dtype=torch.float32, or no precision"
        )
    kind = torch.device(device).type
    if setting not in QUANTIZED or kind == "cpu":
        return
    if kind != "cuda":
        known = f"cpu, cuda from compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}"
        raise ValueError(f"quantize is {setting!r} and the device is {kind}; it runs on {known}")
    if reason := quantized_reason(torch.device(device)):
        raise ValueError(f"quantize is {setting!r} and {device} is {reason}")


@cache
def quantized_reason(device: torch.device) -> str | None:
    """Why a GPU cannot run int8 products; None if it can."""
    import torch

    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= _CAPABILITY:
        return None
    return f"of compute capability {capability[0]}.{capability[1]}; it needs {_CAPABILITY[0]}.{_CAPABILITY[1]}"
