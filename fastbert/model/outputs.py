"""Model outputs: dicts whose fields are also attributes and, in transformers' order, items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from fastbert.config import BertConfig


class ModelOutput(dict):
    """A model's output: fields that are None are absent from the dict and `to_tuple()`, and None as attributes.

    `out["logits"]`, `out.logits` and `out[0]` (the first field present) all work, as in transformers.
    """

    def __init_subclass__(cls) -> None:
        """Registers a pytree, in which DistributedDataParallel and torch.export look for tensors."""
        unflatten = partial(_unflatten, cls)
        pytree.register_pytree_node(cls, _flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__name__}")

    def __init__(self, fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any) -> None:
        names, fields = type(self).__annotations__, dict(fields, **more)
        if not fields.keys() <= names.keys():
            unknown = fields.keys() - names.keys()
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        super().__init__()
        for name in names:  # in transformers' order
            if fields.get(name) is not None:
                self[name] = fields[name]

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(cls.__annotations__)

    def __getattr__(self, name: str) -> Any:
        if name in self._names():
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


Output = TypeVar("Output", bound=ModelOutput)


def returned(output: Output, config: BertConfig, return_dict: bool | None) -> Output:
    """The output; or, despite the annotation, its tuple if `return_dict`, or else the config's, is False."""
    wanted = config.return_dict if return_dict is None else return_dict
    found: Any = output if wanted else output.to_tuple()
    return found


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _unflatten(kind: type[ModelOutput], values: Iterable[Any], names: Iterable[str]) -> ModelOutput:
    return kind(zip(names, values, strict=True))


class BaseModelOutputWithPooling(ModelOutput):
    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class BertForPreTrainingOutput(ModelOutput):
    loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class HeadOutput(ModelOutput):
    """MaskedLMOutput, SequenceClassifierOutput and similar ones, which have the same fields in transformers."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class QuestionAnsweringModelOutput(ModelOutput):
    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
