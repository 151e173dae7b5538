"""Names that changed: the old ones answer for one more release, and say what to write instead."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["moved", "warn_old"]


def warn_old(old: str, new: str, stacklevel: int = 3) -> None:
    """FutureWarning, which Python shows to users, that ``old`` goes and what takes its place."""
    warnings.warn(f"{old} goes in the next release; {new}.", FutureWarning, stacklevel=stacklevel)


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module`` for old names, each with the module and name it has now."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_old(f"{module}.{name}", f"import {names[name]}")
        place, _, new = names[name].rpartition(".")
        return getattr(import_module(place), new)

    return find
