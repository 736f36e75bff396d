"""Reads and checks a sentence-transformers folder's settings for making one vector of token states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.checkpoint import checks
from fastbert.checkpoint.hub import resolve_file
from fastbert.checkpoint.json_files import read_json, shown
from fastbert.checkpoint.stored_tensors import StoredTensors
from fastbert.inference.pooling import TOKEN_POOLINGS, pooling_modes

_PATH = re.compile(r"torch\.nn\.(?:modules\.(?:activation|linear)\.)?(\w+)")
# The activations that are elementwise and deterministic and need no argument.
ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU"),
    *("LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink"),
    *("Softsign", "Tanh", "Tanhshrink"),
)
NORM_EPS = 1e-5  # of torch.nn.LayerNorm
# Those that a product's kernel applies, by the names of ops.linear.
FUSED = {"Identity": None, "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
_LARGEST = 2**24  # limit of widths and lengths
_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"  # what a module may read and write
# Flags of a Pooling module's config.json from before sentence-transformers wrote one `pooling_mode`.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_NO_PROMPTS = {"query": "", "document": ""}  # names that sentence-transformers always defines
_OLD_TRANSFORMER = "BERT"  # type of the first versions: its max_seq_length counts neither [CLS] nor [SEP]
_OLD_LONGEST = 510
_TRANSFORMERS = ("Transformer", _OLD_TRANSFORMER)
_KINDS = ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
# Arguments of transformers' from_pretrained that do not change vectors.
_HARMLESS_ARGUMENTS = ("trust_remote_code", "attn_implementation", "add_pooling_layer", "use_safetensors")


def _is_modes(value: object) -> bool:
    modes = [value] if isinstance(value, str) else value
    return isinstance(modes, list) and bool(modes) and all(mode in TOKEN_POOLINGS for mode in modes)


def _is_arguments(value: object) -> bool:
    return isinstance(value, dict) and all(name in _HARMLESS_ARGUMENTS for name in value)


def _is_prompts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str | None) for text in value.values())


def _is_text_only(value: object) -> bool:
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    return isinstance(value, dict) and value.get("text") == text


_EMPTY: checks.Check = (lambda value: value in (None, {})), "null or an empty object"
_ARGUMENTS: checks.Check = _is_arguments, f"an object with no other names than {', '.join(_HARMLESS_ARGUMENTS)}"
_SIZE = checks.integer(1, _LARGEST)

_MODULE = dict.fromkeys(("name", "path", "type"), checks.STRING)
_MODULE["idx"] = (lambda value: type(value) is int), "an integer"
_MODULE["kwargs"] = checks.STRINGS  # names of keywords that `encode` passes on if it is given them
_TRANSFORMER = {
    "max_seq_length": checks.or_null(_SIZE),
    "do_lower_case": checks.or_null(checks.FLAG),
    "tokenizer_name_or_path": checks.one_of(None),
    "transformer_task": checks.one_of("feature-extraction"),
    "modality_config": (_is_text_only, "an object whose 'text' is the last_hidden_state of forward"),
    "module_output_name": checks.one_of(_TOKENS),
    "processing_kwargs": _EMPTY,
    "unpad_inputs": checks.or_null(checks.FLAG),  # vectors do not depend on it
    "query_length": checks.or_null(_SIZE),  # for texts with a task, which `encode` does not set by itself
    "document_length": checks.or_null(_SIZE),
    "query_expansion": _EMPTY,
    "backend": checks.one_of("torch"),
    **dict.fromkeys(("model_args", "model_kwargs", "config_args", "config_kwargs"), _ARGUMENTS),
    **dict.fromkeys(("tokenizer_args", "processor_kwargs"), _ARGUMENTS),
}
_MODEL = {  # other fields do not change vectors
    "__version__": checks.OBJECT,
    "default_prompt_name": checks.or_null(checks.STRING),
    "model_type": checks.one_of("SentenceTransformer"),
    "prompts": (_is_prompts, "an object of strings by their names"),
    "similarity_fn_name": checks.or_null(checks.STRING),
    "requirements": checks.or_null(checks.OBJECT),
}
_POOLING = {
    "embedding_dimension": _SIZE,
    "word_embedding_dimension": _SIZE,
    "pooling_mode": (_is_modes, f"one of {', '.join(TOKEN_POOLINGS)}, or a list of them"),
    "include_prompt": checks.FLAG,
    **dict.fromkeys(_SWITCHES, checks.FLAG),
}
_FEATURES = {
    "module_input_name": checks.one_of(_SENTENCE, _TOKENS),
    "module_output_name": checks.or_null(checks.one_of(_SENTENCE, _TOKENS)),
}
_DENSE = {
    "in_features": _SIZE,
    "out_features": _SIZE,
    "bias": checks.FLAG,
    "activation_function": (
        lambda value: activation_name(value) is not None,
        f"torch.nn.modules.activation.NAME, with a NAME of {', '.join(ACTIVATIONS)}",
    ),
    "use_residual": checks.FLAG,
    **_FEATURES,
}


def activation_name(path: object) -> str | None:
    """Tanh of "torch.nn.modules.activation.Tanh"; None where the path names no activation in ACTIVATIONS."""
    match = _PATH.fullmatch(path) if isinstance(path, str) else None
    return match[1] if match and match[1] in ACTIVATIONS else None


def prompt_named(prompts: Mapping[str, str], default: str, *names: str) -> str:
    """The first prompt of these names that is not empty, else the default one."""
    return next((text for name in names if (text := prompts.get(name))), default)


@dataclass(frozen=True)
class ModuleSettings:
    """A module that maps rows to rows: a Dense, LayerNorm or Normalize, and where its tensors are."""

    kind: str
    config: Path | None = None  # its config.json
    folder: Path | None = None  # of its weights
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of its tensors
    activation: str = "Tanh"  # of a Dense: one of ACTIVATIONS
    residual: bool = False

    def check(self, stored: StoredTensors) -> None:
        """Raises ValueError unless the tensors that are stored are the module's, of its shapes."""
        assert self.folder is not None
        file = next(iter(stored.files.values()), self.folder)
        for name, shape in self.shapes.items():
            if name not in stored:
                raise ValueError(f"{file}: no tensor {name}; {self.config} asks for it")
            if (found := tuple(stored.shape(name))) != shape:
                raise ValueError(f"{file}: tensor {name} has shape {found}; {self.config} makes it {shape}")
        for name in stored.files:
            if name not in self.shapes:
                raise ValueError(
                    f"{file}: tensor {name} is none of {', '.join(self.shapes)}, which {self.config} asks for"
                )


@dataclass(frozen=True)
class SentenceSettings:
    """The settings of a folder; the defaults apply to a folder without sentence-transformers files."""

    transformer: str = ""  # the Transformer's folder, relative to the model's
    modules_file: Path | None = None
    token_modules: tuple[ModuleSettings, ...] = ()  # before the pooling
    pooling: tuple[str, ...] = ("mean",)
    pooling_width: tuple[str, int] | None = None  # file and field of the Pooling module's width, and its value
    include_prompt: bool = True
    modules: tuple[ModuleSettings, ...] = ()  # after the pooling
    normalize: bool = False  # after all of them
    max_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=_NO_PROMPTS.copy)
    prompt: str = ""  # the default prompt
    truncate_dim: Any = None  # number of leading elements of a vector that are returned; not yet checked


def read_settings(
    path: str | Path, pooling: tuple[str, ...] | None, normalize: bool | None, revision: str | None = None
) -> SentenceSettings:
    """Reads modules.json and the files it names.

    An explicit `pooling` replaces the mode of the Pooling module. An explicit `normalize` replaces the Normalize module
    at the end. Both together replace all modules that follow the Transformer; these are then not read.

    Raises:
        ValueError: the folder needs a feature that fastbert does not have; or a file is not a JSON object, or has an
            unknown field or a value of the wrong kind. The message names file, field, value and limit.
    """
    modules_file = resolve_file(path, "modules.json", revision=revision, required=False)
    if modules_file is None:
        return SentenceSettings(pooling=pooling or ("mean",), normalize=bool(normalize))
    modules = _read_modules(modules_file)
    chain: dict[str, Any] = {"pooling": pooling, "normalize": normalize}
    if pooling is None or normalize is None:
        chain = _Chain(path, revision, modules_file, modules[1:]).settings(pooling, normalize)
    first = modules[0]
    folder = first.get("path", "")
    name = f"{folder}/sentence_bert_config.json" if folder else "sentence_bert_config.json"
    named_by = modules_file if folder else None
    file = resolve_file(path, name, revision=revision, required=False, named_by=named_by)
    transformer = {} if file is None else _read_fields(file, _TRANSFORMER)
    longest = transformer.get("max_seq_length")
    if longest is not None and _kind(first) == _OLD_TRANSFORMER:
        longest = min(longest, _OLD_LONGEST) + 2
    file = resolve_file(path, "config_sentence_transformers.json", revision=revision, required=False)
    model = {} if file is None else _read_fields(file, _MODEL, others=True)
    prompts, prompt = _prompts(file, model)
    return SentenceSettings(
        transformer=folder,
        modules_file=modules_file,
        max_length=longest,
        lower_case=bool(transformer.get("do_lower_case")),
        prompts=prompts,
        prompt=prompt,
        truncate_dim=model.get("truncate_dim"),
        **chain,
    )


def _read_modules(file: Path) -> list[dict[str, Any]]:
    """The entries of modules.json: a Transformer and the modules that follow it."""
    modules = read_json(file, list)
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            checks.refuse(file, "a module", module, "an object with the strings 'type' and 'path'")
        checks.fields(file, module, _MODULE)
    names = [module["name"] for module in modules if "name" in module]
    if len(set(names)) < len(names):
        checks.refuse(file, "the list of names", names, "without a name that occurs twice")
    if not modules or _kind(modules[0]) not in _TRANSFORMERS:
        found = modules[0]["type"] if modules else None
        checks.refuse(file, "the first module's type", found, "sentence_transformers.models.Transformer")
    return modules


def _kind(module: dict[str, Any]) -> str:
    """The class name of a module's type, e.g. "Pooling"; the full path for types of other packages."""
    path = module["type"]
    return path.rpartition(".")[2] if path.startswith("sentence_transformers.") else path


def _prompts(file: Path | None, model: dict[str, Any]) -> tuple[dict[str, str], str]:
    """All prompts by name, and the default one."""
    prompts = _NO_PROMPTS | {name: text or "" for name, text in model.get("prompts", {}).items()}
    name = model.get("default_prompt_name")
    if name is not None and name not in prompts:
        checks.refuse(file, "default_prompt_name", name, f"null or one of the prompts' names, {shown(list(prompts))}")
    return prompts, prompts[name] if name is not None else ""


class _Chain:
    """The modules that follow the Transformer, sorted into those before the Pooling module and those after it."""

    def __init__(self, path: str | Path, revision: str | None, modules_file: Path, modules: list[dict]) -> None:
        self._path, self._revision, self._modules_file = path, revision, modules_file
        self._pooling: dict[str, Any] | None = None
        self._before: list[ModuleSettings] = []
        self._after: list[ModuleSettings] = []
        self._pooled = all(_kind(module) != "Pooling" for module in modules)  # then by an explicit pooling
        for module in modules:
            self._add(_kind(module), module.get("path", ""))

    def settings(self, pooling: tuple[str, ...] | None, normalize: bool | None) -> dict[str, Any]:
        """The fields of SentenceSettings that follow from the chain."""
        found = self._pooling
        if found is None and pooling is None:
            checks.refuse(self._modules_file, "the list of modules", "without Pooling", "with one, or give pooling")
        last = bool(self._after) and self._after[-1].kind == "Normalize"
        return {
            **(found or {}),
            **({} if pooling is None else {"pooling": pooling}),
            "token_modules": tuple(self._before),
            "modules": tuple(self._after[:-1] if last else self._after),
            "normalize": last if normalize is None else normalize,
        }

    def _add(self, kind: str, folder: str) -> None:
        if kind not in _KINDS:
            raise ValueError(
                f"{self._modules_file} holds a {shown(kind)} module, which fastbert does not run; it runs Transformer, "
                f"{', '.join(_KINDS)}. To have the vectors of the Transformer alone, give both pooling and normalize"
            )
        if kind == "Pooling":
            if self._pooling is not None:
                raise ValueError(f"{self._modules_file} holds two Pooling modules; fastbert runs one")
            self._pooling, self._pooled = self._read_pooling(folder), True
            return
        of_tokens, module = getattr(self, f"_read_{kind.lower()}")(folder)
        if of_tokens and self._pooling is None:
            self._before.append(module)
        elif not of_tokens and self._pooled and module is not None:
            self._after.append(module)
        elif not of_tokens and not self._pooled and kind in ("Dense", "LayerNorm"):
            raise ValueError(f"{self._modules_file} holds a {kind} module of {_SENTENCE} before its Pooling module")
        # Skipped, as they change no vector: token modules after the Pooling, and Normalize of a vector before it.

    def _read(self, folder: str, known: dict[str, checks.Check], *, required: bool = True) -> tuple[Any, dict]:
        if not required and not folder:
            return None, {}
        file = resolve_file(
            self._path,
            f"{folder}/config.json",
            revision=self._revision,
            required=required,
            named_by=self._modules_file,
        )
        return file, {} if file is None else _read_fields(file, known)

    def _read_pooling(self, folder: str) -> dict[str, Any]:
        file, config = self._read(folder, _POOLING)
        modes = config.get("pooling_mode") or [m for switch, m in _SWITCHES.items() if config.get(switch)] or "mean"
        found = {"pooling": pooling_modes(modes), "include_prompt": config.get("include_prompt", True)}
        for name in ("embedding_dimension", "word_embedding_dimension"):
            if name in config:
                return {**found, "pooling_width": (f"{file}: {name}", config[name])}
        return found

    def _read_dense(self, folder: str) -> tuple[bool, ModuleSettings]:
        file, config = self._read(folder, _DENSE)
        for name in ("in_features", "out_features"):
            if name not in config:
                checks.refuse(file, name, None, _SIZE[1])
        sizes = (config["out_features"], config["in_features"])
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": sizes}
        if config.get("bias", True):
            shapes["linear.bias"] = sizes[:1]
        activation = str(activation_name(config.get("activation_function", "torch.nn.Tanh")))  # _DENSE has checked it
        if activation == "PReLU":
            shapes["activation_function.weight"] = (1,)
        residual = config.get("use_residual", False)
        if residual and sizes[0] != sizes[1]:
            shapes["residual.weight"] = sizes
        weights = self._weights(folder)
        return _of_tokens(file, config), ModuleSettings("Dense", file, weights, shapes, activation, residual)

    def _read_layernorm(self, folder: str) -> tuple[bool, ModuleSettings]:
        file, config = self._read(folder, {"dimension": _SIZE})
        if "dimension" not in config:
            checks.refuse(file, "dimension", None, _SIZE[1])
        shapes = dict.fromkeys(("norm.weight", "norm.bias"), (config["dimension"],))
        return False, ModuleSettings("LayerNorm", file, self._weights(folder), shapes)

    def _read_normalize(self, folder: str) -> tuple[bool, ModuleSettings]:
        file, config = self._read(folder, _FEATURES, required=False)
        return _of_tokens(file, config), ModuleSettings("Normalize")

    def _read_dropout(self, folder: str) -> tuple[bool, None]:
        self._read(folder, {"dropout": checks.number(0, 1)}, required=False)
        return False, None  # for training only

    def _weights(self, folder: str) -> Path:
        """The folder of a module's weights."""
        find: dict[str, Any] = {"revision": self._revision, "named_by": self._modules_file}
        weights = resolve_file(self._path, f"{folder}/model.safetensors", required=False, **find)
        if weights is None:
            weights = resolve_file(self._path, f"{folder}/pytorch_model.bin", **find)
        return weights.parent


def _of_tokens(file: Path | None, config: dict[str, Any]) -> bool:
    """True if a module maps token states, False if it maps vectors of texts."""
    source = config.get("module_input_name", _SENTENCE)
    if config.get("module_output_name") not in (None, source):
        checks.refuse(file, "module_output_name", config["module_output_name"], f"{source!r}, as module_input_name")
    return source == _TOKENS


def _read_fields(file: Path, known: dict[str, checks.Check], *, others: bool = False) -> dict[str, Any]:
    values = read_json(file)
    checks.fields(file, values, known, others=others)
    return values
