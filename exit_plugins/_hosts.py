"""Names of a host framework that this package reaches past the host's public face, checked before they are used.

Each wing lists its own in its ``_host.py``, and takes them from there alone.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import metadata
from pkgutil import resolve_name

__all__ = ["check_names", "missing_name"]


def check_names(host: str, distribution: str, known: str, names: Mapping[str, Sequence[str]]) -> None:
    """Raise ImportError unless an installed host has every name, and these take the parameters they are given.

    Args:
        host: What the host is called in the message.
        distribution: The package its version is asked of.
        known: Requirement, as pip reads it, of the versions this package is known to work with.
        names: For each dotted name the parameters this package passes, by name; none for what is not called.
    """
    missing = missing_name(names)
    if missing is not None:
        raise ImportError(
            f"exit_plugins relies on {missing}, which {host} {metadata.version(distribution)} lacks; it is known to "
            f'work with: pip install "{known}".'
        )


def missing_name(names: Mapping[str, Sequence[str]]) -> str | None:
    """The first of ``names`` that is gone, or of whose parameters one is; None when all are there."""
    for name, parameters in names.items():
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError):
            return name
        if parameters:
            taken = inspect.signature(found).parameters
            for parameter in parameters:
                if parameter not in taken:
                    return f"{name}({parameter}=...)"
    return None
