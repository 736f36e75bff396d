"""The base class of all models: loading, saving, initialising, resizing, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, Self, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn

from fastbert.checkpoint import load as checkpoint
from fastbert.checkpoint.files import collector_at_rest
from fastbert.checkpoint.stored_names import stored_state
from fastbert.config import CONFIG_NAME, BertConfig, family_of
from fastbert.model.layer import Products
from fastbert.model.modules import RMSNorm, place
from fastbert.model.plan import EncoderPlan, adopt
from fastbert.precision import PRECISIONS, LoadOptions, check_precision
from fastbert.reference import ACTIVATIONS

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class _Runs(Protocol[P, R]):
    def forward(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


class BertPreTrainedModel(nn.Module):
    """The base of all models: their `config`, loading and saving."""

    model_types: tuple[str, ...] = ("bert",)  # the families that a class is of

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self._check_family(config)
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"config: hidden_act is {config.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
        self.config = config

    @classmethod
    def _check_family(cls, config: BertConfig) -> None:
        if config.model_type not in cls.model_types:
            reads = ", ".join(map(repr, cls.model_types))
            raise ValueError(f"config: model_type is {config.model_type!r}; {cls.__name__} reads {reads}")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        inference_only: bool = False,
        ignore_mismatched_sizes: bool | Literal["head"] = False,
        **overrides: Any,
    ) -> Self:
        """Loads a folder or hub id in Hugging Face layout and returns the model in eval mode.

        Args:
            path: a folder with config.json and weights, or a hub id.
            config: used in place of the folder's config.json.
            dtype: of the weights; None keeps the one they were saved in.
            precision: "high" or "highest", for float32 weights: a product of the layers may be computed as three or
                six bf16 products where that is faster, with an error of at most 2e-5 or that of fp32.
            quantize: "int8", for inference: the products of the layers use int8 weights, with a scale per output
                channel, and int8 activations, with a scale per token. The parameters are unchanged.
            device: where the model lives; None is the CPU.
            inference_only: no parameter requires a gradient. If a backend reads the layers' weights in a form of its
                own, as the C++ one does, only that form is kept: half the memory, or less with `quantize`. Such a
                model cannot be saved or copied, and runs only in the dtype, precision and backend of its loading.
            revision: branch, tag or commit, for a hub id.
            ignore_mismatched_sizes: a tensor whose shape differs from the model's is initialised instead, with a
                warning; "head" allows this for the head only.
            overrides: config fields that override config.json's (num_labels=3), and the constructor's
                keywords (add_pooling_layer=False).

        Raises:
            FileNotFoundError: there is no config.json or there are no weights.
            ValueError: another model type; a missing, misshapen or unreadable tensor (the message names it and its
                file); a precision or quantize that is unknown or does not fit the dtype, the device or the other.
        """
        options = LoadOptions(dtype, precision, quantize, device, revision, inference_only)
        return cls.load(path, options, config, ignore_mismatched_sizes, **overrides)

    @classmethod
    def load(
        cls,
        path: str | Path,
        options: LoadOptions,
        config: BertConfig | None = None,
        ignore_mismatched_sizes: bool | Literal["head"] = False,
        **overrides: Any,
    ) -> Self:
        """from_pretrained, with the options that all loaders share in one object."""
        if ignore_mismatched_sizes not in (False, True, "head"):
            raise ValueError(
                f"ignore_mismatched_sizes is {ignore_mismatched_sizes!r}; it must be False, True or 'head'"
            )
        keywords = {name: overrides.pop(name) for name in cls._constructor_keywords if name in overrides}
        named = path
        if config is None:
            named = f"{path}/{CONFIG_NAME}"
            config = BertConfig.from_pretrained(path, revision=options.revision, **overrides)
        elif overrides:
            raise TypeError(f"config is given, so {', '.join(overrides)} must be set on it")
        try:
            cls._check_family(config)
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from error
        family = family_of(config.model_type)
        with checkpoint.Checkpoint(path, options.revision, family) as source:
            source.check_layers(config.num_hidden_layers)
            try:
                with torch.device("meta"), collector_at_rest():
                    model = cls(config, **keywords)
            except ValueError as error:
                raise ValueError(f"{named}: {error}") from error
            found = checkpoint.match(model, source, ignore_mismatched_sizes)
            dtype, device = options.dtype or checkpoint.stored_dtype(source), options.device or "cpu"
            check_precision(options.setting, dtype, device)
            with torch.inference_mode(False):  # else a model loaded in inference mode could never be trained
                _materialise(model, dtype, device)
                model.tie_weights()
                model.eval().matmul_precision = options.setting
                if options.inference_only:
                    plan = _plan(model.requires_grad_(False))
                    checkpoint.load_into(model, source, found, _initialise, _releaser(model, plan))
                    adopt(_base(model), plan)
                else:
                    checkpoint.load_into(model, source, found, _initialise)
        return model

    if TYPE_CHECKING:  # a call has the types of `forward`; in nn.Module they are Any

        def __call__(self: _Runs[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    _constructor_keywords: tuple[str, ...] = ()
    token_fields: tuple[str, ...] = ()  # output fields with a row per token; the others have one per text
    _matmul_precision: str | None = None  # of a BertModel: the precision of its layers' products

    @property
    def matmul_precision(self) -> str | None:
        """The precision of the layers' products: None, "high", "highest" or "int8"; set each time a model is loaded.

        Like the device, it is kept by copies and pickles but not by save_pretrained.
        """
        return _base(self)._matmul_precision

    @matmul_precision.setter
    def matmul_precision(self, value: str | None) -> None:
        if value is not None and value not in PRECISIONS:
            raise ValueError(f"matmul_precision is {value!r}; it must be None or one of {', '.join(PRECISIONS)}")
        _base(self)._matmul_precision = value

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes config.json and the weights, which transformers and fastbert load bit for bit.

        `state_dict` replaces the model's own, whose parameters may be shards.
        """
        state = self.state_dict() if state_dict is None else state_dict
        if any(tensor.is_meta for tensor in state.values()):
            raise ValueError(f"{type(self).__name__} was loaded with inference_only=True; load it without, to save it")
        if self.config.tie_word_embeddings:  # write tied parameters once, under their first name
            names = {name for name, _ in self.named_parameters()}
            state = {name: tensor for name, tensor in state.items() if name in names}
        checkpoint.save(stored_state(state, family_of(self.config.model_type)), folder, max_shard_size)
        config = BertConfig.from_dict(self.config.to_dict())
        name = type(self).__name__
        if len(self.model_types) > 1:  # transformers has a class per family
            name = family_of(config.model_type).prefix + name.removeprefix(
                "Encoder" if name == "EncoderModel" else "Model"
            )
        config.extra["architectures"] = [name]
        config.extra["dtype"] = str(self.dtype).removeprefix("torch.")
        config.extra.pop("torch_dtype", None)
        config.save_pretrained(folder)

    def pad_value(self, dtype: torch.dtype) -> float:
        """The value of the output's token fields at pads."""
        return 0.0

    @property
    def base_model(self) -> Any:
        """The encoder within a model with a head, or the model itself."""
        return _base(self)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def init_weights(self) -> None:
        """Initialises: normal of `initializer_range`, biases 0, norms 1, the pad token's row 0; then ties weights."""
        _initialise(self, [name for name, _ in self.named_parameters()])
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes tied parameters one object; only models with a language-model head have any."""

    def get_input_embeddings(self) -> nn.Embedding:
        found: Any = _base(self).get_submodule(family_of(self.config.model_type).embeddings.word)
        return found

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        place(_base(self), family_of(self.config.model_type).embeddings.word, embeddings)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Gives the vocabulary `new_num_tokens` rows, rounded up to a multiple; new rows are the mean of the old.

        (transformers' mean_resizing adds noise of 1e-9 to that mean; here it is exact.) Optimizers created
        before hold the old parameters.

        Raises:
            ValueError: fewer than one token.
        """
        old = self.get_input_embeddings()
        count = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count < 1:
            raise ValueError(f"new_num_tokens is {count}; it must be at least 1")
        if count != old.num_embeddings:
            padding_idx = old.padding_idx if old.padding_idx is not None and old.padding_idx < count else None
            new = nn.Embedding(count, old.embedding_dim, padding_idx=padding_idx, _weight=_resized(old.weight, count))
            new.weight.requires_grad_(old.weight.requires_grad)
            place(_base(self), family_of(self.config.model_type).embeddings.word, new)
            decoder = self.get_output_embeddings()
            if decoder is not None:
                self._resize_decoder(decoder, count)
        self.config.vocab_size = count
        if self.config.pad_token_id is not None and self.config.pad_token_id >= count:
            self.config.pad_token_id = None
        self.tie_weights()
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes each layer in the backward instead of saving its activations."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for layer in _layers(self):
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, **kwargs)
            layer.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        for layer in _layers(self):
            layer.gradient_checkpointing = False

    def recompute_activations(self, enable: bool = True) -> None:
        """Recomputes the output of each layer's activation, (T, F), in the backward instead of saving it.

        It saves about a quarter of a layer's memory in training and costs an elementwise pass: both are much less than
        with `gradient_checkpointing_enable`. The gradients are the same.
        """
        for layer in _layers(self):
            layer.recompute_activations = enable

    @staticmethod
    def _resize_decoder(decoder: nn.Linear, count: int) -> None:
        for name in ("weight", "bias"):
            old = getattr(decoder, name)
            if old is None:
                continue
            setattr(decoder, name, nn.Parameter(_resized(old, count), requires_grad=old.requires_grad))
        decoder.out_features = count


def _base(model: nn.Module) -> Any:
    """The encoder within a model with a head, or the model itself."""
    config: Any = model.config
    return getattr(model, family_of(config.model_type).attribute, model)


def _layers(model: nn.Module) -> list[Any]:
    config: Any = model.config
    return list(family_of(config.model_type).layers(_base(model)))


def _plan(model: BertPreTrainedModel) -> EncoderPlan:
    base = _base(model)
    products = Products(base.config.hidden_act, base.matmul_precision)
    plan = EncoderPlan(base, products, family=family_of(base.config.model_type))
    del plan.tree, plan.tensors  # they hold parameters that are to be released; `adopt` makes them again
    return plan


def _releaser(model: BertPreTrainedModel, plan: EncoderPlan) -> Callable[[str], None]:
    """A callback that frees a layer's weights once its last parameter is loaded: at most one layer waits."""
    layers = {id(list(layer.parameters())[-1]): i for i, layer in enumerate(_layers(model))}

    def loaded(name: str) -> None:
        index = layers.pop(id(model.get_parameter(name)), None)
        if index is not None:
            plan.release(index)

    return loaded


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocates uninitialised memory for parameters on the meta device; `to_empty` imports sympy for that."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))


def _resized(old: torch.Tensor, count: int) -> torch.Tensor:
    old = old.detach()
    new = old.mean(dim=0, keepdim=True).expand(count, *old.shape[1:]).clone()
    kept = min(count, len(old))
    new[:kept] = old[:kept]
    return new


@torch.no_grad()
def _initialise(model: nn.Module, names: list[str]) -> None:
    """Draws fresh weights for the named parameters, as transformers does."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module, parameter = model.get_submodule(owner), model.get_parameter(name)
        if parameter.is_meta:  # from_pretrained loads it, or initialises it once it has memory
            continue
        if isinstance(module, nn.LayerNorm | RMSNorm):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        elif family_of(model.config.model_type).scaled_init:
            _draw_scaled(model.config, name, parameter)
        else:
            parameter.normal_(0.0, model.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()


def _draw_scaled(config: BertConfig, name: str, parameter: torch.Tensor) -> None:
    """Cut normals, as ModernBERT's: narrower by the number of layers for what is added to the residual stream, and in a
    classifier by the width alone."""
    family = family_of(config.model_type)
    std = config.initializer_range
    if name.endswith(tuple(f"{path}.weight" for path in (family.layer.out, family.layer.down, family.masked_lm.dense))):
        std /= (2.0 * config.num_hidden_layers) ** 0.5
    elif name == f"{family.classes.out}.weight":
        std = config.hidden_size**-0.5
    cut = std * (config.extra.get("initializer_cutoff_factor", 2.0) or 3.0)
    nn.init.trunc_normal_(parameter, 0.0, std, -cut, cut)
