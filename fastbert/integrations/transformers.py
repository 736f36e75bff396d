"""accelerate: a live transformers BERT runs packed, in place, with its own parameters, and can be restored.

Each transformers BertModel inside the given object gets a `forward` of its own, which packs the batch and
runs fastbert.model.encoder over the very modules that are there. Classes, parameters, state_dict, hooks on
linear layers and adapters stay as they are. A call that cannot be packed runs the original code, and
`fastbert.explain(model)` says which calls did, and why.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert.model.bert import output_states, pool, run_bert
from fastbert.reference import ACTIVATIONS

Model = TypeVar("Model")

_BERT = "transformers.models.bert.modeling_bert"
# Arguments that change nothing for an encoder, whatever their value.
_IDLE = {"use_cache", "num_items_in_batch"}
_TAKEN = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "output_attentions",
    "output_hidden_states",
}


def accelerate(model: Model) -> Model:
    """Makes every transformers BERT encoder in `model` run packed, in place, and returns `model`.

    Args:
        model: a transformers BertModel or a model with a head, a SentenceTransformer, a pipeline.

    Queries, keys and values of a layer come to share one storage; the parameters stay the same objects.
    A decoder, a subclass with a forward of its own and an activation that fastbert lacks are left alone, with a
    warning where nothing else is there to speed up.

    Raises:
        ValueError: there is no transformers BertModel in `model`.
    """
    encoders = [m for m in _modules(model) if _is_bert(m, "BertModel")]
    if not encoders:
        raise ValueError(f"model is a {type(model).__name__} without a transformers BertModel; there is nothing to do")
    reasons = []
    for bert in encoders:
        if isinstance(bert.__dict__.get("forward"), _Packed):
            continue
        reason = _why_not(bert)
        if reason is None:
            bert.forward = PackedBert(bert)
        else:
            reasons.append(reason)
    if len(reasons) == len(encoders):
        warnings.warn(f"fastbert.accelerate left the model as it was: {'; '.join(sorted(set(reasons)))}", stacklevel=2)
    for head in _modules(model):
        if _is_bert(head, "BertForQuestionAnswering") and isinstance(head.bert.__dict__.get("forward"), PackedBert):
            head.forward = head.__dict__.get("forward") or PackedQuestionAnswering(head)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every call runs the original code again. Returns `model`."""
    for module in _modules(model):
        packed = module.__dict__.get("forward")
        if isinstance(packed, _Packed):
            del module.forward
            if packed.own_forward is not None:
                module.forward = packed.own_forward
    return model


def explain_model(model: Any) -> list[tuple[str, str]]:
    """(name, what runs and why) of every transformers BertModel in `model`."""
    verdicts = []
    for name, module in _named_modules(model):
        if _is_bert(module, "BertModel"):
            packed = module.__dict__.get("forward")
            if isinstance(packed, PackedBert):
                verdict = "packed, by fastbert; 4-D masks, causal and cross-attention run the original code"
                for reason, calls in packed.declined.items():
                    verdict += f"\n  {calls} calls ran the original code: {reason}"
            else:
                reason = _why_not(module)
                verdict = f"the original code: {reason or 'fastbert.accelerate was not called'}"
            verdicts.append((name or type(module).__name__, verdict))
    return verdicts


class _Packed:
    """A module's replaced `forward`: an object, so that the module can still be copied and pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own_forward = module.__dict__.get("forward")  # accelerate's and others' wrappers live there

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer reads it to choose the columns that it feeds.
        return _signature(type(self.module))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.own_forward is not None:
            return self.own_forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class PackedBert(_Packed):
    """BertModel.forward over packed tokens; `declined` counts why calls ran the original code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.declined: Counter[str] = Counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bert = self.module
        given = {k: v for k, v in self.__signature__.bind(*args, **kwargs).arguments.items() if v is not None}
        given.update({k: v for k, v in given.pop("kwargs", {}).items() if v is not None})
        return_dict = given.pop("return_dict", getattr(bert.config, "return_dict", True))
        reason = _declines(bert, given)
        if reason is not None:
            self.declined[reason] += 1
            return self.original(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        inputs, encoded = run_bert(bert, bert.config, **{k: v for k, v in given.items() if k in _TAKEN})
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=inputs.give_back(encoded.last_hidden_state),
            pooler_output=None if bert.pooler is None else pool(bert, bert.config, inputs, encoded),
            **output_states(inputs, encoded),
        )
        return output if return_dict else output.to_tuple()


class PackedQuestionAnswering(_Packed):
    """BertForQuestionAnswering.forward with the logits of pads at the lowest number: no softmax meets a pad."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        mask = given.get("attention_mask")
        return_dict = given.pop("return_dict", None)
        if mask is None or mask.dim() != 2:
            return self.original(*args, **kwargs)
        positions = [given.pop(name, None) for name in ("start_positions", "end_positions")]
        output = self.original(**given, return_dict=True)
        losses = []
        for name, position in zip(("start_logits", "end_logits"), positions, strict=True):
            logits = output[name]
            output[name] = logits = logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)
            if position is not None:
                length = logits.shape[1]
                target = position.reshape(-1).clamp(0, length)
                losses.append(nn.functional.cross_entropy(logits, target, ignore_index=length))
        if len(losses) == 2:
            output = type(output)(loss=sum(losses) / 2, **output)
        wanted = self.module.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


@cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """The signature of a class's forward, without self."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _why_not(bert: nn.Module) -> str | None:
    """What of this BertModel fastbert cannot run, whatever the call; None where nothing."""
    config = bert.config
    if config.is_decoder or config.add_cross_attention:
        return "it is a decoder"
    if type(bert).forward is not _class_of(bert, "BertModel").forward:
        return f"its class {type(bert).__name__} has a forward of its own"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation is {config.hidden_act!r}; known are {', '.join(ACTIVATIONS)}"
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return f"its positions are {config.position_embedding_type}"
    return _foreign_part(bert)


def _declines(bert: nn.Module, given: dict[str, Any]) -> str | None:
    """Why this call must run the original code; None where it can be packed."""
    for name in given:
        if name not in _TAKEN and name not in _IDLE:
            return f"{name} is given"
    mask: Tensor | None = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return f"attention_mask is {mask.dim()}-D"
    if not isinstance(given.get("output_hidden_states", False), bool):
        return "output_hidden_states selects layers"
    if bert.config.is_decoder or getattr(bert.config, "is_causal", None):
        return "attention is causal"
    return _foreign_part(bert)


def _foreign_part(bert: nn.Module) -> str | None:
    """Which part that fastbert would pass over is not transformers' own, or has a hook."""
    for module, name in _passed_over(bert):
        kind = type(module)
        if not kind.__module__.startswith((_BERT, "torch.nn.modules.")):
            return f"{name} is a {kind.__module__}.{kind.__name__}"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers leaves its output recorders on the layers once it has used them; they are idle here.
        hooks = [h for h in hooks if getattr(h, "__module__", "") != "transformers.utils.output_capturing"]
        if hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
            return f"{name} has a hook"
    return None


def _passed_over(bert: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose own forward never runs in a packed call, with their names."""
    embeddings = bert.embeddings
    yield embeddings, "embeddings"
    yield embeddings.position_embeddings, "embeddings.position_embeddings"
    yield embeddings.token_type_embeddings, "embeddings.token_type_embeddings"
    yield embeddings.LayerNorm, "embeddings.LayerNorm"
    yield bert.encoder, "encoder"
    for i, layer in enumerate(bert.encoder.layer):
        name = f"encoder.layer.{i}"
        yield layer, name
        yield layer.attention, f"{name}.attention"
        yield layer.attention.self, f"{name}.attention.self"
        yield layer.attention.output, f"{name}.attention.output"
        yield layer.intermediate, f"{name}.intermediate"
        yield layer.output, f"{name}.output"
    if bert.pooler is not None:
        yield bert.pooler, "pooler"


def _is_bert(module: nn.Module, name: str) -> bool:
    return _class_of(module, name) is not None


def _class_of(module: nn.Module, name: str) -> type | None:
    """transformers' class `name` among the bases of `module`'s, without importing transformers."""
    return next((c for c in type(module).__mro__ if c.__name__ == name and c.__module__ == _BERT), None)


def _named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(root, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; it must be a torch module or a pipeline around one")
    return root.named_modules()


def _modules(model: Any) -> list[nn.Module]:
    return [module for _, module in _named_modules(model)]
