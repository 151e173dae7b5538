"""Options of models that are on or off: given as texts they would all be on."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_switches"]


def check_switches(taker: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """ValueError if an argument whose default in ``taker`` is True or False is given anything but these, or 1 or 0."""
    for name, parameter in inspect.signature(taker).parameters.items():
        if isinstance(parameter.default, bool) and name in given:
            value = given[name]
            if not isinstance(value, int) or value not in (0, 1):
                raise ValueError(f"{name} is True or False, got {value!r}; on a command line: {name}=False.")
