"""What policies, tables and export manifests may hold: plain JSON values, of the right kind where they have a name."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .samples import SampleRecord

__all__ = [
    "CERTIFICATE",
    "MODEL",
    "SOURCE",
    "Fields",
    "Numbers",
    "a_list_of",
    "check_fields",
    "is_count",
    "is_mapping",
    "is_number",
    "is_sha256",
    "is_size",
    "is_text",
    "numbers",
    "plain",
]

Numbers: TypeAlias = "Sequence[float] | NDArray[Any] | Tensor"  # one an exit

Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]  # name -> (what it must be, in words; whether a value is it)

_DEPTH = 50


def plain(value: Any, what: str, depth: int = 0) -> Any:
    """A copy of ``value`` in plain JSON values: what is made this way can be saved, loaded and is the same again.

    Numpy numbers and arrays become numbers and lists, tuples become lists. TypeError for anything else, ValueError for
    numbers that are NaN or infinite; both say where, as in ``source['target']['budget']``.
    """
    if depth > _DEPTH:
        raise ValueError(f"{what} is nested too deeply.")
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(f"{what} has the key {wrong!r}; keys must be strings.")
        return {key: plain(item, f"{what}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{what}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, float) and not np.isfinite(value):
        raise ValueError(f"{what} is {value}; JSON holds finite numbers only.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{what} is a {type(value).__name__}, which JSON cannot hold.")


def numbers(values: Any, what: str, num: int | None = None) -> NDArray[Any]:
    """``values`` as float64 (K,); ValueError unless they are one or more real numbers (``num`` of them, if given).

    Strings and booleans are no numbers here, though numpy would take them.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    if isinstance(values, Sequence) and not isinstance(values, str):
        wrong = next((value for value in values if not _is_real(value)), None)
        if wrong is not None:
            raise ValueError(f"{what} must be one number per exit; {str(wrong)[:40]!r} is none.")
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(())
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what} must be a list with one number per exit, got shape {array.shape}.")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{what} must be one number per exit, got {array.dtype}.")
    if num is not None and len(array) != num:
        raise ValueError(f"{what} must be {num} numbers, one per exit; got {len(array)}.")
    return array.astype(np.float64)


def check_fields(block: Mapping[str, Any], what: str, fields: Fields) -> None:
    """ValueError for the first value in ``block`` that is not what its name promises; null and other names pass."""
    for name, (words, good) in fields.items():
        value = block.get(name)
        if value is not None and not good(value):
            raise ValueError(f"{what}[{name!r}] must be {words}, got {str(value)[:60]!r}.")


def _is_real(value: Any) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 0 and _is_real(value.item())
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1000  # what a float can hold
    return isinstance(value, (float, np.integer, np.floating))


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, and no bool."""
    return type(value) is int and value >= 0


def is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no bool."""
    return _is_real(value) and bool(np.isfinite(float(value)))


def is_text(value: Any) -> bool:
    """Whether a value is a string, and not an empty one."""
    return isinstance(value, str) and value != ""


def is_mapping(value: Any) -> bool:
    """Whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 digest in lower-case hexadecimal."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def a_list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for lists all of whose items are ``good``."""
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(good, value))


def is_size(value: Any) -> bool:
    """Of one sample: (channels, height, width), or (frames, channels, height, width) of a clip."""
    return a_list_of(is_positive)(value) and len(value) in (3, 4)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_gap(value: Any) -> bool:
    return is_number(value) and -1 <= value <= 1


def _is_samples(value: Any) -> bool:
    try:
        return SampleRecord.of_json(value) is not None
    except ValueError:
        return False


_SAMPLES = ("a count, or count, digests and limit", _is_samples)
_SHARE = ("a number from 0 to 1", _is_share)

MODEL: Fields = {
    "architecture": ("a name", is_text),
    "model_kwargs": ("a mapping", is_mapping),
    "num_exits": ("a whole number above 0", is_positive),
    "num_classes": ("a whole number above 0", is_positive),
    "in_chans": ("a whole number above 0", is_positive),
    "weights": ("a SHA-256", is_sha256),
    "input_size": ("(channels, height, width)", is_size),
    "classes": ("a list of names", a_list_of(lambda value: isinstance(value, str))),
}

SOURCE: Fields = {
    "method": ("a name", is_text),
    "target": ("a budget or an accuracy", lambda value: is_mapping(value) and all(map(is_number, value.values()))),
    "samples": _SAMPLES,
    "holdout_samples": _SAMPLES,
    "sha256": ("a SHA-256", is_sha256),
    "accuracy": _SHARE,
    "cost": ("a number", is_number),
    "shares": ("numbers from 0 to 1", a_list_of(_is_share)),
    "options": ("a mapping", is_mapping),
    "path": ("a mapping", is_mapping),
    "latency": ("a mapping", is_mapping),
}

CERTIFICATE: Fields = {
    "method": ("a name", is_text),
    "loss": ("a name", is_text),
    "epsilon": _SHARE,
    "delta": _SHARE,
    "samples": _SAMPLES,
    "sha256": ("a SHA-256", is_sha256),
    "step": ("a count", is_count),
    "steps": ("a count", is_count),
    "risk": ("a number from -1 to 1", _is_gap),
    "bound": ("a number from -1 to 1", _is_gap),
}
