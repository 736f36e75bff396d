"""The settings of a server: flags, then the environment, then a TOML file, then defaults."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

PREFIX = "FASTBERT_SERVE_"


@dataclass(frozen=True)
class ServeSettings:
    """How a server runs. Sizes are in tokens, bytes, texts or seconds, as each says.

    Raises:
        ValueError: a value of the wrong type, or out of range.
    """

    models: tuple[str, ...] = ()  # folders or hub ids, each as PATH or NAME=PATH; the first is the default
    host: str = "127.0.0.1"
    port: int = 8080
    device: str | None = None  # "cpu", or torch's; None for a GPU, if there is one
    dtype: str | None = None
    precision: str | None = None
    quantize: str | None = None
    revision: str | None = None
    threads: int | None = None  # of each model's calls
    cache: str | None = None  # the folder of packed weights; "" for that in the user's cache
    processes: int = 1
    api_key: str | None = None  # a bearer token that every request but those for health and metrics must have
    max_batch_tokens: int = 16_384
    max_latency: float = 0.1  # seconds that a batch may run, by the speed of those before
    max_queue_tokens: int = 262_144  # waiting; beyond that, 429
    max_concurrent_requests: int = 512
    max_texts: int = 1024  # of a request
    max_body_bytes: int = 2_000_000
    max_body_seconds: float = 60.0  # that a client may take to send a body
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 1) for name in ("processes", "max_batch_tokens", "max_queue_tokens", "max_texts")),
            *(("max_concurrent_requests", 1), ("max_body_bytes", 1), ("port", 0)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; it must be at most 65535")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        for name in ("max_latency", "max_body_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.api_key == "":
            raise ValueError("api_key is empty; leave it out for a server without one")


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ, file: str | Path | None = None
) -> ServeSettings:
    """The settings; `flags` with the value None were not given.

    Raises:
        ValueError: the file is no TOML, or it or a variable of the environment has an unknown name or a wrong value.
        FileNotFoundError: there is no such file.
    """
    values = {} if file is None else _of_file(Path(file))
    known = {field.name for field in fields(ServeSettings)}
    for variable, text in environment.items():
        if variable.startswith(PREFIX):
            name = variable.removeprefix(PREFIX).lower()
            if name not in known:
                raise ValueError(f"{variable}: there is no such setting; there are {', '.join(sorted(known))}")
            values[name] = _of_text(variable, name, text)
    values |= {name: value for name, value in flags.items() if value is not None}
    if "models" in values:
        values["models"] = tuple(values["models"])
    return ServeSettings(**values)


def _of_file(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: {error}") from error
    types = get_type_hints(ServeSettings)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{file}: {name}: there is no such setting; there are {', '.join(sorted(types))}")
        if name == "models":
            if not isinstance(value, list) or not all(isinstance(model, str) for model in value):
                raise ValueError(f"{file}: models is {value!r}; it must be a list of strings")
        elif not _fits(value, types[name]):
            raise ValueError(f"{file}: {name} is {value!r}; it must be {_shown(types[name])}")
    return values


def _of_text(variable: str, name: str, text: str) -> Any:
    if name == "models":
        return tuple(text.split())
    kind = get_type_hints(ServeSettings)[name]
    for convert in (float,) if kind is float else (int, float):
        if _fits(convert(0), kind):
            try:
                return convert(text)
            except ValueError:
                raise ValueError(f"{variable} is {text!r}; it must be {_shown(kind)}") from None
    return text


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def _shown(kind: Any) -> str:
    if kind is float:
        return "a number"
    return "an integer" if _fits(0, kind) else "a string"
