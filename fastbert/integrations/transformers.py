"""accelerate: a live transformers encoder runs packed, in place, with its own parameters, and can be restored.

Each encoder of a known family (BertModel, RobertaModel ...) inside the given object gets an instance `forward`, which
packs the batch and runs fastbert.model.encoder over the existing modules. Classes, parameters, state_dict, hooks on
linear layers and adapters are unchanged. A call that cannot be packed falls back to transformers' forward, the original
code; `fastbert.explain(model)` reports how many calls did, and why.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import CodeType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.families import BERT, FAMILIES, Family
from fastbert.families.layer_kinds import place_count
from fastbert.integrations.parts import attention_reason, difference, foreign_part
from fastbert.model.bert import pool
from fastbert.model.encoder import encode, encode_at_once, runs_by_pointers
from fastbert.model.heads import IGNORE, answer_positions
from fastbert.model.inputs import counted_positions, prepare
from fastbert.model.layer import Products, has_global_hook
from fastbert.model.plan import EncoderPlan, encoder_plan, forget, forget_forms, freshness
from fastbert.precision import LoadOptions, check_precision, describe_setting
from fastbert.reference import ACTIVATIONS

Model = TypeVar("Model")

# Arguments of transformers that have no effect on an encoder, whatever their value.
_IDLE = {"use_cache", "num_items_in_batch"}
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_TAKEN = {*_TOKENS, "output_attentions", "output_hidden_states"}


def accelerate(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    recompute_activations: bool = False,
) -> Model:
    """Makes every transformers encoder of a known family in `model` run packed, in place, and returns `model`.

    Args:
        model: a transformers encoder (BertModel, RobertaModel, ...) or a model with a head, a SentenceTransformer, a
            pipeline.
        dtype: the new dtype of all floating-point parameters and buffers of `model`, as by `model.to(dtype)`, but for
            rotary angles, which stay in fp32. Heads are included, as a head must have the dtype of the states that it
            gets. `restore` does not undo the rounding. None: unchanged.
        precision: "high" or "highest", as for `BertModel.from_pretrained`.
        quantize: "int8", for inference, under torch.no_grad() or inference_mode(). The parameters are unchanged.
        recompute_activations: in training, as `BertModel.recompute_activations`.

    The parameters stay the same objects, on their device.
    A decoder, a subclass with a forward of its own or a model with an activation that fastbert lacks is left
    unchanged, with a warning if nothing else can be accelerated. Calls that run the original code run in the
    parameters' dtype, regardless of precision and quantize. If a model is accelerated again, the last call applies.

    Raises:
        ValueError: there is no encoder of a known family in `model`; a dtype that is not floating-point; a precision or
            quantize that is unknown or does not fit the dtype, the device or the other. The model is unchanged.
    """
    setting = LoadOptions(dtype, precision, quantize).setting
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating-point one")
    encoders = [m for m in _modules(model) if _family_of(m)]
    if not encoders:
        raise ValueError(
            f"model is a {type(model).__name__} without {_KNOWN}{_look_alike(model)}; there is nothing to do"
        )
    reasons = [_why_not(bert) for bert in encoders]
    able = [bert for bert, reason in zip(encoders, reasons, strict=True) if reason is None]
    for bert in able:
        check_precision(setting, dtype or bert.dtype, bert.device)
    if not able:
        why = "; ".join(sorted({reason for reason in reasons if reason}))
        warnings.warn(f"fastbert.accelerate left the model as it was: {why}", stacklevel=2)
    elif dtype is not None:
        angles = _angles(able)
        _root(model).to(dtype=dtype)
        for module, name, buffer in angles:  # rounded, they would move the positions of long texts
            setattr(module, name, buffer.to(device=getattr(module, name).device))
    for bert in able:
        PackedEncoder.put(bert).matmul_precision = setting
        for layer in _known_family(bert).layers(bert):
            vars(layer)["recompute_activations"] = recompute_activations
    for head in _modules(model):
        for family in FAMILIES.values():
            _put_head(head, family)
    return model


def _angles(encoders: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """The buffers with the rotary angles of encoders: module, name, buffer."""
    paths = [(bert, _known_family(bert).rotary) for bert in encoders]
    modules = [bert.get_submodule(path) for bert, path in paths if path is not None]
    return [
        (module, name, buffer) for module in modules for name, buffer in module._buffers.items() if buffer is not None
    ]


def _put_head(head: nn.Module, family: Family) -> None:
    """Replaces the forward of a head of this family whose labels or logits at pads need it."""
    packed = _packed(getattr(head, family.attribute, None) or nn.Module())
    if packed is None or type(head).__module__ != family.module:
        return
    name = next((c.__name__ for c in type(head).__mro__ if c.__module__ == family.module), "")
    kind = _HEADS.get(name.removeprefix(family.prefix))
    if family.heads_read_first and name.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        pooling = family.classes.pooling
        packed.reads_first = pooling is None or getattr(head.config, pooling) in ("cls", "bos")
    if kind is not None and type(head).forward is _forward_of(head, family):
        kind.put(head)


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every call runs the original code again, without precision or quantize; returns `model`.

    A dtype that `accelerate` has set stays.
    """
    for module in _modules(model):
        packed = _packed(module)
        if packed is not None:
            packed.active = False  # for a wrapper around it, which continues to call it
            module.__dict__.pop("_replicate_for_data_parallel", None)
            forget(module)
            if isinstance(module.__dict__.get("forward"), _Packed):
                del module.forward
                if packed.own_forward is not None:
                    module.forward = packed.own_forward
    return model


def refresh(model: Model) -> Model:
    """Notifies fastbert that weights of `model` were written to, by any means; returns `model`.

    The next call reads them again. Needed only after writes that bypass the version counter (through `.data` or numpy).
    On a CPU, fastbert detects those too, but only after up to as many calls as `explain(model)` prints.
    """
    for module in _modules(model):
        forget_forms(module)
    return model


class Verdict(NamedTuple):
    """The report on one of transformers' encoders; `runs` is its (device type, dtype, precision) if it is packed."""

    kind: str  # transformers' class
    name: str
    text: str
    runs: tuple[str, torch.dtype, str | None] | None


def explain_model(model: Any) -> list[Verdict]:
    """The verdict on every known encoder of transformers in `model`."""
    verdicts = []
    for name, module in _named_modules(model):
        if family := _family_of(module):
            packed, reason, runs = _packed(module), _why_not(module), None
            if packed is not None and reason is None:
                runs = (module.device.type, module.dtype, packed.matmul_precision)
                how = describe_setting(module.dtype, packed.matmul_precision)
                verdict = f"packed, by fastbert, in {how}; 4-D masks, causal and cross-attention run the original code"
            else:
                verdict = f"the original code: {reason or 'fastbert.accelerate was not called'}"
            if packed is not None:
                for reason, calls in packed.declined.items():
                    verdict += f"\n  {calls} calls ran the original code: {reason}"
                if seen := freshness(module):
                    verdict += f"\n  {seen}"
            verdicts.append(Verdict(family.base, name or type(module).__name__, verdict, runs))
    if not verdicts:
        raise ValueError(
            f"model is a {type(model).__name__} without {_KNOWN}{_look_alike(model)}; there is nothing to explain"
        )
    return verdicts


class _Packed:
    """A module's replaced `forward`: an object, so that the module can still be copied and pickled."""

    matmul_precision: str | None = None  # of an encoder: the setting given to `accelerate`
    reads_first = False  # of an encoder: the model's head reads the state of column 0

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.active = True
        self.declined: Counter[str] = Counter()  # why calls ran the original code
        self.own_forward = module.__dict__.get("forward")  # wrappers of HF Accelerate and others are stored there

    @classmethod
    def put(cls, module: nn.Module) -> _Packed:
        """Replaces the forward of `module` unless it is replaced already; returns the new forward."""
        packed = _packed(module)
        if packed is None:
            packed = cls(module)
            vars(module).update(forward=packed, _replicate_for_data_parallel=packed.replicate)
        return packed

    def replicate(self) -> nn.Module:
        """A replica for torch's DataParallel, which copies attributes: its forward must use its own parameters."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        replica.forward = type(self)(replica)
        replica.forward.own_forward = self.own_forward
        replica.forward.matmul_precision, replica.forward.reads_first = self.matmul_precision, self.reads_first
        return replica

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer reads it to choose the columns that it feeds.
        return _signature(type(self.module).forward)

    @property
    def __code__(self) -> CodeType:
        # torch.export reads it to say where a dynamic shape comes from.
        return inspect.unwrap(type(self.module).forward).__code__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.own_forward is not None:
            return self.own_forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call that are not None, by name."""
        given = dict(_signature(type(self.module).forward).bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        return {name: value for name, value in given.items() if value is not None}


class PackedEncoder(_Packed):
    """The forward of an encoder over packed tokens."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bert, family = self.module, _known_family(self.module)
        if not self.active:
            return self.original(*args, **kwargs)
        given = self._given(args, kwargs)
        return_dict = given.pop("return_dict", getattr(bert.config, "return_dict", True))
        tokens: Any = given.get("input_ids", given.get("inputs_embeds"))
        reason = "hooks for all modules are registered" if has_global_hook() else _declines(bert, family, given, tokens)
        plan = None
        if reason is None:
            products = Products(getattr(bert.config, family.activation), self.matmul_precision)
            plan = encoder_plan(bert, products, partial(foreign_part, family=family), family)
            reason = plan.foreign
        buffers = {} if tokens is None else _stand_ins(bert, family, given)
        if torch.compiler.is_compiling():  # a graph cannot branch on their values, but can read them
            given |= {name: buffer[:, : tokens.shape[1]] for name, buffer in buffers.items()}
        elif plan is not None and reason is None:
            reason = _buffer_reason(plan, buffers)
        has_pooler = getattr(bert, "pooler", None) is not None
        captured = [
            given.get(name, getattr(bert.config, name)) for name in ("output_attentions", "output_hidden_states")
        ]
        if plan is not None and reason is None and not any(captured):
            found = self._at_once(plan, given)
            if found is not None:
                output = _output(family, *found)
                return output if return_dict else output.to_tuple()
        if reason is None and "attention_mask" in given:
            given["attention_mask"] = ops.read_mask(given["attention_mask"], strict=False)
            if given["attention_mask"] is None:
                reason = "attention_mask holds other values than 0 and 1"
        inputs = None
        if reason is None:
            ids, mask, types, positions, embeds = map(given.get, _TOKENS)
            pad_id = bert.config.pad_token_id
            inputs = prepare(bert, ids, mask, types, positions, embeds, None, None, pad_id, True, family)
            if inputs.has_queries and family.has_windows:
                reason = "a masked token that is no pad may see no key within its window"
            if inputs.batch.leading_pads and (self.reads_first or has_pooler):
                reason = "a row begins with a pad, whose state transformers takes for the text's"
        if inputs is None or reason is not None:
            self.declined[str(reason)] += 1
            return self.original(*args, **kwargs)
        attentions, hidden_states = captured
        wanted = {"output_attentions": attentions, "output_hidden_states": hidden_states}
        activation, precision = getattr(bert.config, family.activation), self.matmul_precision
        encoded = encode(bert, inputs, activation=activation, precision=precision, plan=plan, **wanted)
        pooled, states = pool(inputs, encoded) if has_pooler else None, encoded.hidden_states
        last = inputs.give_back(encoded.last_hidden_state) if states is None else states[-1]
        output = _output(family, last, pooled, states, encoded.attentions)
        return output if return_dict else output.to_tuple()

    def _at_once(self, plan: EncoderPlan, given: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """The states and the pooled ones by one call: see `encode_at_once`; None where it does not take the call."""
        ids, mask, types, positions, embeds = map(given.get, _TOKENS)
        pad_id = self.module.config.pad_token_id
        has_pads = isinstance(pad_id, int) and pad_id >= 0  # otherwise all masked tokens are computed
        if ids is None or embeds is not None or not (mask is None or has_pads) or not runs_by_pointers():
            return None
        first = plan.first_position
        if positions is None and first:
            positions = counted_positions(ids, first)
        return encode_at_once(plan, ids, mask, types, positions, pad_id)


def _output(
    family: Family,
    last: Tensor,
    pooled: Tensor | None,
    states: tuple[Tensor, ...] | None = None,
    attentions: tuple[Tensor, ...] | None = None,
) -> Any:
    from transformers import modeling_outputs

    kind = getattr(modeling_outputs, family.output)
    fields: dict[str, Any] = {"last_hidden_state": last, "hidden_states": states, "attentions": attentions}
    if family.has_cross_attention:  # as transformers has it
        fields["cross_attentions"] = None if attentions is None else ()
    return kind(**fields) if pooled is None else kind(pooler_output=pooled, **fields)


class PackedTokenHead(_Packed):
    """The forward of a head with labels per token: labels at pads are ignored, as in fastbert's own heads."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(args, kwargs)
        mask, labels = given.get("attention_mask"), given.get("labels")
        if self.active and mask is not None and labels is not None and mask.shape == labels.shape:
            given["labels"] = labels.masked_fill(_pads(self.module.config, given), IGNORE)
        return self.original(**given)


class PackedQuestionAnswering(_Packed):
    """BertForQuestionAnswering.forward with pads' logits at the dtype's lowest number, which softmax ignores."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(args, kwargs)
        mask = given.get("attention_mask")
        return_dict = given.pop("return_dict", None)
        if not self.active or mask is None or mask.dim() != 2:
            return self.original(*args, **kwargs)
        positions = [given.pop(name, None) for name in ("start_positions", "end_positions")]
        output = self.original(**given, return_dict=True)
        losses, pads = [], _pads(self.module.config, given)
        for name, position in zip(("start_logits", "end_logits"), positions, strict=True):
            logits = output[name]
            output[name] = logits = logits.masked_fill(pads, torch.finfo(logits.dtype).min)
            if position is not None:
                length = logits.shape[1]
                target = answer_positions(position, length)
                losses.append(nn.functional.cross_entropy(logits, target, ignore_index=length))
        if len(losses) == 2:
            output = type(output)(loss=sum(losses) / 2, **output)
        wanted = self.module.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


_HEADS = {  # by their names after the family's prefix
    "ForMaskedLM": PackedTokenHead,
    "ForPreTraining": PackedTokenHead,
    "ForTokenClassification": PackedTokenHead,
    "ForQuestionAnswering": PackedQuestionAnswering,
}


def _packed(module: nn.Module) -> _Packed | None:
    """The active fastbert forward of a module, also inside other libraries' wrappers; None if there is none."""
    for found in (module.__dict__.get("forward"), module.__dict__.get("_original_forward")):
        while found is not None and not isinstance(found, _Packed):
            inner = getattr(found, "__func__", None) or getattr(found, "func", None)
            found = getattr(found, "__wrapped__", None) or inner
        if found is not None and found.active:
            return found
    return None


def _forward_of(head: nn.Module, family: Family) -> Any:
    """transformers' own forward for the class of `head`."""
    classes: tuple[Any, ...] = type(head).__mro__
    return next(c.forward for c in classes if c.__module__ == family.module)


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a class's forward, without self."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _why_not(bert: nn.Module) -> str | None:
    """Why fastbert cannot run this encoder, whatever the call; None if it can."""
    config, family = bert.config, _known_family(bert)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    if type(bert).forward is not _class_of(bert, family).forward:
        return f"its class {type(bert).__name__} has a forward of its own"
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        return f"its activation is {activation!r}; known are {', '.join(ACTIVATIONS)}"
    learned = family.embeddings.positions is not None  # others do not read the field
    if learned and getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return f"its positions are {config.position_embedding_type}"
    return foreign_part(bert, family)


def _declines(bert: nn.Module, family: Family, given: dict[str, Any], tokens: Tensor | None) -> str | None:
    """Why this call must run the original code; None if it can be packed."""
    for name in given:
        if name not in _TAKEN and name not in _IDLE and name in _names_that_count(family):
            return f"{name} is given"
    mask: Tensor | None = given.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return f"attention_mask is a {type(mask).__name__}"
    if mask is not None and mask.dim() != 2:
        return f"attention_mask is {mask.dim()}-D"
    if mask is not None and tokens is not None and mask.shape != tokens.shape[:2]:
        return f"attention_mask has shape {tuple(mask.shape)}"
    if not isinstance(given.get("output_hidden_states", bert.config.output_hidden_states), bool):
        return "output_hidden_states selects layers"
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "it is being traced"
    if mask is not None and torch.compiler.is_compiling():
        return "it is being compiled with a mask, whose lengths no graph can hold"
    if tokens is not None and (tokens.is_meta or type(tokens).__name__ == "FakeTensor"):
        return "its tensors have no memory"
    if not torch.compiler.is_compiling():
        if mask is not None and torch._C._functorch.is_functorch_wrapped_tensor(mask):
            return "attention_mask is batched by torch.func, which hides its lengths"
        if reason := ops.mode_reason():
            return reason
    if reason := attention_reason(bert.config, family):
        return reason
    without_table = family.rotary is not None or family.knows_distances
    if without_table and (reason := _too_far(bert.config, family, given, tokens)):
        return reason
    if getattr(bert.config, "is_decoder", False) or getattr(bert.config, "is_causal", None):
        return "attention is causal"
    return None


def _too_far(config: Any, family: Family, given: dict[str, Any], tokens: Tensor | None) -> str | None:
    """Why a call leaves the table of angles or biases, which transformers computes for any; None if it does not."""
    limit, positions = place_count(config, family), given.get("position_ids")
    # A bias is by column; without given positions, the table of positions ends where it does.
    by_column = positions is not None if family.rotary is None else positions is None
    if by_column and tokens is not None and tokens.dim() > 1 and tokens.shape[1] > limit:
        return f"it has {tokens.shape[1]} tokens; max_position_embeddings is {limit}"
    if family.rotary is None or positions is None or not positions.numel() or torch.compiler.is_compiling():
        return None
    low, high = (int(x) for x in positions.aminmax())
    if low < 0 or high >= limit:
        return f"position_ids holds {low if low < 0 else high}; max_position_embeddings is {limit}"
    return None


@cache
def _names_that_count(family: Family) -> frozenset[str]:
    """The keyword arguments that transformers' code of a family names; it ignores all others."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import TransformersKwargs

    module = sys.modules[family.module]
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    functions = [c.forward for c in classes if c.__module__ == family.module]
    if hasattr(module, "eager_attention_forward"):
        functions += [module.eager_attention_forward, *ALL_ATTENTION_FUNCTIONS.values()]
    named = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(named | set(TransformersKwargs.__annotations__))


def _pads(config: Any, given: dict[str, Any]) -> Tensor:
    """The pads (B, S) of a call with a mask: masked positions that hold the pad token or are in a fully masked row."""
    masked, ids = given["attention_mask"] == 0, given.get("input_ids")
    if ids is None or config.pad_token_id is None:
        return masked & masked.all(1, keepdim=True)
    return masked & ((ids == config.pad_token_id) | masked.all(1, keepdim=True))


def _stand_ins(bert: nn.Module, family: Family, given: dict[str, Any]) -> dict[str, Tensor]:
    """The buffers, (1, P), that transformers uses in place of missing arguments."""
    buffers = {}
    for name in ("token_type_ids",) if family.counts_tokens else ("position_ids", "token_type_ids"):
        buffer = bert.get_submodule(family.embeddings.owner)._buffers.get(name)
        if buffer is not None and name not in given:
            buffers[name] = buffer
    return buffers


def _buffer_reason(plan: EncoderPlan, buffers: dict[str, Tensor]) -> str | None:
    """Why the buffers for missing arguments differ from fastbert's defaults; None if they do not."""
    for name, buffer in buffers.items():
        expected, seen, version = plan.usual.get(name, (None, None, None))
        # Some writes bypass the version counter: on a CPU, where nothing waits, compare the values in every call.
        now = buffer._version if buffer.is_cuda and not buffer.is_inference() else None
        if seen is buffer and version is not None and version == now:
            continue
        kind = buffer.shape, buffer.dtype, buffer.device
        if expected is None or (expected.shape, expected.dtype, expected.device) != kind:
            make = torch.arange if name == "position_ids" else torch.zeros
            expected = make(buffer.shape[-1], dtype=buffer.dtype, device=buffer.device)[None]
        if not torch.equal(buffer, expected):
            return f"embeddings.{name} holds other values than transformers gives it"
        plan.usual[name] = expected, buffer, now
    return None


_NAMES = [family.base for family in FAMILIES.values() if family.stored_type is None]
_KNOWN = f"an encoder of transformers that is known ({', '.join(_NAMES)})"


@cache
def _of_class(kind: type) -> Family | None:
    names = {(c.__module__, c.__name__) for c in kind.__mro__}
    return next((family for family in FAMILIES.values() if (family.module, family.base) in names), None)


def _family_of(module: nn.Module) -> Family | None:
    """The family of which `module` is transformers' encoder, without importing transformers; None if of none."""
    kind: Any = type(module)
    return _of_class(kind)


def _look_alike(model: Any) -> str:
    """The differences of a class of BERT's shape from BERT, for an error; empty without such a class."""
    for name, module in _named_modules(model):
        layers = getattr(getattr(module, "encoder", None), "layer", None)
        if isinstance(layers, nn.ModuleList) and hasattr(getattr(module, "embeddings", None), "word_embeddings"):
            kind = type(module)
            return (
                f"; {name or 'model'} is a {kind.__module__}.{kind.__qualname__} of BERT's shape, but "
                f"{difference(module, BERT)}"
            )
    return ""


def _known_family(encoder: nn.Module) -> Family:
    family = _family_of(encoder)
    assert family is not None
    return family


def _class_of(module: nn.Module, family: Family) -> Any:
    """transformers' class of a family's encoder among the bases of `module`'s."""
    return next(c for c in type(module).__mro__ if c.__name__ == family.base and c.__module__ == family.module)


def _root(model: Any) -> nn.Module:
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(root, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; it must be a torch module or a pipeline around one")
    return root


def _named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    return _root(model).named_modules()


def _modules(model: Any) -> list[nn.Module]:
    return [module for _, module in _named_modules(model)]
