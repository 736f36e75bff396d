"""Names of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_of(package: str, homes: Mapping[str, str], namespace: dict[str, Any]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        homes: the module below the package of each name.
        namespace: the package's globals, which keep what was imported.

    Meanwhile no garbage is collected: importing makes thousands of objects that stay, and a full collection walks all
    of torch's, for 50 ms.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        enabled = gc.isenabled()
        gc.disable()
        try:
            namespace[name] = value = getattr(import_module(f"{package}.{homes[name]}"), name)
        except NeedsTorchError:  # of a package below: the name that the user wrote is this one
            raise needs_torch(f"{package}.{name}") from None
        except ModuleNotFoundError as error:
            if error.name == "torch":
                raise needs_torch(f"{package}.{name}") from None
            raise
        finally:
            if enabled:
                gc.enable()
        return value

    return get


class NeedsTorchError(ImportError):
    """Something runs with torch only, which is not installed."""


def needs_torch(what: str) -> NeedsTorchError:
    """The error for `what`, which runs with torch only."""
    return NeedsTorchError(f"{what} needs torch, which is not installed: pip install 'fastbert-engine[torch]'")


def missing_extra(what: str, error: ModuleNotFoundError, extra: str) -> ImportError:
    """The error for what needs the packages of an extra, of which one is missing; another's error as it is."""
    if error.name is None or error.name.partition(".")[0] == "fastbert":
        return error
    return ImportError(f"{what} needs {error.name}, which is not installed: pip install 'fastbert-engine[{extra}]'")
