"""Reading the user's files: one line for whatever may be wrong with them, with the file, the cause and what to do."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["UnreadableFile", "reading", "strict_json", "text_lines"]


class UnreadableFile(ValueError):
    """A file of the user's that is not what it should be: one line with its name, the cause and what to do."""


@contextmanager
def reading(path: str | os.PathLike[str], what: str, remedy: str, missing: str | None = None) -> Iterator[None]:
    """Around everything that reads the user's file ``path``: whatever goes wrong becomes one line.

    Args:
        path: the file or folder.
        what: it should be, as in "exit table".
        remedy: what to do about a bad one, as in "collect it again".
        missing: what to do when there is none; default ``remedy``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        UnreadableFile: a ValueError; every other error of the block, but for a missing package's ImportError. Errors
            that come from ``reading`` already are left as they are.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path}; {missing or remedy}.")
    try:
        yield
    except (UnreadableFile, ImportError):
        raise
    except ValueError as error:
        # What names the file already says what is wrong with it.
        if str(path) in str(error) and "\n" not in str(error):
            raise
        raise UnreadableFile(_line(path, what, remedy, error)) from error
    # Decoders of damaged files raise whatever comes to them: zlib.error, EOFError, struct.error, RecursionError,
    # MemoryError for a size that makes no sense, classes of their own. All say the same to the user.
    except Exception as error:
        raise UnreadableFile(_line(path, what, remedy, error)) from error


def _line(path: Path, what: str, remedy: str, error: Exception) -> str:
    return f"{path} is not a readable {what} ({_cause(error, path)}); {remedy}."


def _cause(error: Exception, path: Path) -> str:
    """What an error says, in one line."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"it lacks {error.args[0]!r}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text (byte {error.start})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        inner = error.filename is not None and str(error.filename) != str(path)
        return f"{error.strerror} ({error.filename})" if inner else error.strerror
    first = next(iter(str(error).strip().splitlines()), "").rstrip(" .;:")
    first = first if len(first) <= 200 else first[:200] + "..."
    plain = isinstance(error, (ValueError, TypeError, RuntimeError)) and first
    return first if plain else f"{type(error).__name__}{': ' if first else ''}{first}"


def text_lines(path: str | os.PathLike[str]) -> list[str]:
    """Lines of a text that people write: UTF-8, with or without the byte-order mark that some editors begin with."""
    return Path(path).read_text(encoding="utf-8-sig").splitlines()


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON document; ValueError where a key comes twice or a number is NaN or infinite."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        return json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_refuse_constant, parse_float=_finite_number
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error}) and may be cut off") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {twice[0]!r} comes twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is out of range")
    return number
