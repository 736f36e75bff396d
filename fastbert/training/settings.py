"""The settings of a pre-training run: a TOML file read into frozen dataclasses, each key checked by name."""

from __future__ import annotations

import math
import operator
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

MOST_SEED = 2**63 - 1  # limit of torch's generators


class SettingsError(ValueError):
    """A key is unknown, missing, of the wrong type or out of range; the message names it."""


def limited(default: Any = MISSING, **limits: float) -> Any:
    """A dataclass field with limits on its value: `least`, `most`, `above`, `below`."""
    return field(default=default, metadata=limits)


def option(default: Any, help: str, **more: Any) -> Any:
    """A field that is also a command-line option. `more`: limits, `metavar`, `spelling` if not the field's name."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class ModelSettings:
    """The model to train: a checkpoint to start from, or a config.json; sizes given here override either's.

    With neither, fresh weights with BertConfig's default sizes, the shards' vocabulary, and the sizes given here.
    """

    checkpoint: str | None = None  # a folder or hub id in Hugging Face layout
    config: str | None = None  # a config.json, or the folder with it
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    hidden_act: str | None = None
    generator_share: float = limited(0.25, above=0.0, most=1.0)  # of the sizes, that of RTD's generator

    def sizes(self) -> dict[str, Any]:
        """The fields of BertConfig that are set here."""
        others = ("checkpoint", "config", "generator_share")
        return {k: v for k, v in asdict(self).items() if k not in others and v is not None}


@dataclass(frozen=True)
class DataSettings:
    shards: str  # a folder that `fastbert prepare` wrote
    heldout: str | None = None  # another folder, whose held-out split is evaluated instead
    tokens_per_batch: int = limited(16384, least=1)  # all processes together; a step has `accumulate` batches
    heldout_batches: int = limited(32, least=0)  # most batches of an evaluation; 0: no evaluation
    more_shards: tuple[str, ...] = ()  # further folders of the same vocabulary
    weights: tuple[float, ...] = ()  # of `shards` and each of more_shards: their shares of the tokens
    anneal_weights: tuple[float, ...] = ()  # the same, in the last `anneal_share` of the steps
    anneal_share: float = limited(0.1, above=0.0, below=1.0)
    batch_start: int | None = limited(None, least=1)  # tokens of the first batch, which grows to tokens_per_batch
    batch_warmup_steps: int = limited(0, least=0)
    length_start: int | None = limited(None, least=8)  # tokens to which sequences are cut at first, up to their own
    length_warmup_steps: int = limited(0, least=0)
    mask_probability: float = limited(0.15, above=0.0, most=1.0)
    mask_probability_end: float | None = limited(None, above=0.0, most=1.0)  # of the last step, in a straight line
    whole_words: bool = False
    span_length: float = limited(1.0, least=1.0, most=10.0)  # mean, in tokens or words, of what is masked together


@dataclass(frozen=True)
class OptimizerSettings:
    name: Literal["adamw", "lamb", "stable_adamw", "muon"] = "adamw"
    lr: float = limited(1e-4, least=0.0)  # peak of the schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = limited(1e-6, above=0.0)
    weight_decay: float = limited(0.01, least=0.0)  # except for biases and LayerNorm
    max_grad_norm: float = limited(1.0, least=0.0)  # 0: gradients are not clipped


@dataclass(frozen=True)
class ScheduleSettings:
    shape: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    decay: Literal["linear", "1-sqrt"] = "1-sqrt"  # of "wsd"
    decay_share: float = limited(0.2, above=0.0, most=1.0)  # of total_steps, at their end, in which "wsd" decays
    warmup_steps: int | None = limited(None, least=0)
    warmup_share: float | None = limited(None, least=0.0, most=1.0)  # share of total_steps, instead of warmup_steps
    total_steps: int | None = limited(None, least=1)  # step at which the rate is 0; default training.steps


@dataclass(frozen=True)
class TrainingSettings:
    steps: int = limited(least=1)
    objective: Literal["mlm_nsp", "mlm", "nsp", "rtd"] = "mlm_nsp"
    accumulate: int = limited(1, least=1)  # batches per step (gradient accumulation)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    sharding: Literal["none", "full"] = "none"  # full: shard parameters, gradients, moments (FSDP2)
    rtd_weight: float = limited(50.0, above=0.0)  # of the discriminator's loss, next to the generator's
    ema: float | None = limited(None, above=0.0, below=1.0)  # decay of an average of the weights, which is evaluated
    dropout: float | None = limited(None, least=0.0, most=0.99)  # of states and attention; overrides the config
    seed: int = limited(0, least=0, most=MOST_SEED)
    log_every: int = limited(10, least=1)
    evaluate_every: int = limited(1000, least=1)
    save_every: int = limited(1000, least=1)
    keep: int = limited(2, least=1)  # number of newest checkpoints to keep
    keep_best: bool = False  # also keep the one with the least loss on held-out text
    peak_tflops: float | None = limited(None, above=0.0)  # of one device in this precision, for MFU


@dataclass(frozen=True)
class OutputSettings:
    folder: str
    tensorboard: bool = True


@dataclass(frozen=True)
class RunSettings:
    """The settings of the training loop, which every kind of training has."""

    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    training: TrainingSettings
    output: OutputSettings

    def __post_init__(self) -> None:
        if self.schedule.warmup_steps is not None and self.schedule.warmup_share is not None:
            raise SettingsError("schedule.warmup_steps and schedule.warmup_share are both given; name one")
        if self.warmup_steps > self.total_steps:
            raise SettingsError(
                f"schedule.warmup_steps is {self.warmup_steps}, more than the {self.total_steps} steps of the schedule"
            )
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise SettingsError(f"optimizer.betas is {list(self.optimizer.betas)}; each must be at least 0 and below 1")
        training = self.training
        if training.keep_best and training.save_every % training.evaluate_every:
            raise SettingsError(
                f"training.keep_best needs an evaluation at each checkpoint: training.save_every "
                f"({training.save_every}) must be a multiple of training.evaluate_every ({training.evaluate_every})"
            )

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps or self.training.steps

    @property
    def warmup_steps(self) -> int:
        return self.schedule.warmup_steps or round((self.schedule.warmup_share or 0.0) * self.total_steps)


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of pre-training: the sections of its TOML file."""

    model: ModelSettings
    data: DataSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.checkpoint and self.model.config:
            raise SettingsError("model.checkpoint and model.config are both given; a checkpoint has its own config")
        data, count = self.data, len(self.data.more_shards) + 1
        for name in ("weights", "anneal_weights"):
            given = getattr(data, name)
            if given and count == 1:
                raise SettingsError(f"data.{name} is given, and data.more_shards is not; it weighs several folders")
            if given and (len(given) != count or min(given) < 0 or sum(given) <= 0):
                raise SettingsError(
                    f"data.{name} is {list(given)}; it must be {count} numbers of at least 0, one for each folder, and "
                    "not all 0"
                )
        for start, steps in (("batch_start", "batch_warmup_steps"), ("length_start", "length_warmup_steps")):
            if (getattr(data, start) is None) != (getattr(data, steps) == 0):
                raise SettingsError(f"data.{start} and data.{steps} belong together: both are given, or neither")
        if data.batch_start is not None and data.batch_start > data.tokens_per_batch:
            raise SettingsError(
                f"data.batch_start is {data.batch_start}; it must be at most tokens_per_batch, {data.tokens_per_batch}"
            )
        if self.training.ema is not None and self.training.sharding == "full":
            raise SettingsError("training.ema is given, and training.sharding is 'full'; an average takes 'none'")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings by section and key, as in the file; JSON-compatible."""
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}
            for section, keys in asdict(self).items()
        }

    def decisive(self) -> dict[str, Any]:
        """The settings, by `section.key`, that determine the weights. A run is resumed only with equal ones.

        Paths of shards are left out; the batches' state checks that the data is the same.
        """
        free = {
            "training": _FREE_TO_CHANGE,
            "output": set(vars(self.output)),
            "data": {"shards", "more_shards", "heldout", "heldout_batches"},
        }
        values = {
            f"{section}.{key}": value
            for section, keys in self.to_dict().items()
            for key, value in keys.items()
            if key not in free.get(section, ())
        }
        return values | {"schedule.total_steps": self.total_steps, "schedule.warmup_steps": self.warmup_steps}


_S = TypeVar("_S", bound=Settings)
_FREE_TO_CHANGE = {
    *("steps", "log_every", "evaluate_every", "save_every", "keep", "keep_best", "peak_tflops"),
    "sharding",  # as is the number of processes: sums are taken in another order
}


def load_settings(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: type[_S] = Settings,  # type: ignore[assignment]  # _S where it is not given
) -> _S:
    """Reads a TOML file into a `kind`. Each of `overrides`, such as `training.steps=100`, replaces a key's value.

    Raises:
        SettingsError: a key is wrong; names the file and the key.
        OSError: the file cannot be read.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and bad UTF-8
        raise SettingsError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise SettingsError(f"--set {override!r} is not SECTION.KEY=VALUE")
        keys = values.setdefault(section, {})
        if isinstance(keys, dict):
            keys[name] = _toml_value(text.strip())
    try:
        return read_settings(values, kind)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def read_settings(
    values: Mapping[str, Any],
    kind: type[_S] = Settings,  # type: ignore[assignment]  # as above
) -> _S:
    """Builds settings from sections of keys; see `load_settings`."""
    sections = get_type_hints(kind)
    _no_unknown("section", values, sections, "")
    return kind(**{name: read_section(name, section, values.get(name, {})) for name, section in sections.items()})


def read_section(section: str, kind: type, values: Any) -> Any:
    """Builds the dataclass of one section and checks each key."""
    if not isinstance(values, Mapping):
        raise SettingsError(f"{section} is {values!r}; it must be a section, [{section}]")
    hints = get_type_hints(kind)
    _no_unknown("key", values, hints, f"{section}.")
    read = {}
    for entry in fields(kind):
        key = f"{section}.{entry.name}"
        if entry.name in values:
            value = read[entry.name] = _typed(key, values[entry.name], hints[entry.name])
            _check_limits(key, value, entry.metadata)
        elif entry.default is MISSING:
            raise SettingsError(f"{key} is missing")
    return kind(**read)


def _no_unknown(what: str, values: Mapping, known: Mapping, prefix: str) -> None:
    for name in values:
        if name not in known:
            raise SettingsError(f"unknown {what} {prefix}{name}; there are {', '.join(known)}")


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Checks the value's type by the hint. The only conversion is from an integer to a float."""
    if isinstance(hint, types.UnionType):  # `X | None`; TOML has no None
        hint = next(option for option in get_args(hint) if option is not types.NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise SettingsError(f"{key} is {value!r}; it must be one of {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            raise SettingsError(f"{key} is {value!r}; it must be a list")
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise SettingsError(f"{key} is {value!r}; it must be a list of {len(kinds)}")
        return tuple(_typed(f"{key}[{i}]", part, kind) for i, (part, kind) in enumerate(zip(value, kinds, strict=True)))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingsError(f"{key} is {value!r}; it must be {names[hint]}")
    if hint is float and math.isinf(value):
        raise SettingsError(f"{key} is {value!r}; it must be finite")
    return value


def check_fields(settings: Any) -> None:
    """Raises SettingsError for a value that does not match its field's type and limits."""
    hints = get_type_hints(type(settings))
    for entry in fields(settings):
        if (value := getattr(settings, entry.name)) is not None:
            _check_limits(entry.name, _typed(entry.name, value, hints[entry.name]), entry.metadata)


_LIMITS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    known = [(words, fits, limits[name]) for name, (words, fits) in _LIMITS.items() if name in limits]
    if not all(fits(value, limit) for _, fits, limit in known):  # nan fits no limit
        shown = (f"{words} {limit if type(limit) is int else f'{limit:g}'}" for words, _, limit in known)
        raise SettingsError(f"{key} is {value!r}; it must be {' and '.join(shown)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{key} is {value!r}; it must be finite")


def _toml_value(text: str) -> Any:
    """The TOML value of a command-line text; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
