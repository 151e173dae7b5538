"""Images to classify, one after the other, from wherever they lie: files, folders, patterns, lists, tar shards.

Nothing here holds the names of all images: folders are walked, lists read line by line, shards member by member, always
in the same order, so that an interrupted run finds its place again. Of a folder of more than ``_IN_MEMORY`` entries the
sorted names go through a temporary file.
"""

import contextlib
import fnmatch
import heapq
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Item", "check_sources", "iterate_images"]

LISTS = (".txt", ".lst")
SHARDS = (".tar", ".tar.gz", ".tgz")
STANDARD_INPUT = "-"
_IN_MEMORY = 100_000  # names of one folder
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Item(NamedTuple):
    """One image: what rows call it, its bytes where it has no path of its own, and why there is nothing to read."""

    path: str
    content: bytes | None = None
    error: str | None = None


def check_sources(sources: Sequence[str], endings: Sequence[str], kind: str = "image") -> None:
    """Before long work: ValueError or FileNotFoundError for a source that holds nothing.

    A single file that is not there is no error here: it is one image among many, named when it is its turn.
    """
    for source in sources:
        if source == STANDARD_INPUT:
            continue
        for name in _expand(source):
            path = Path(name)
            if path.is_dir():
                if next(_walk(name, endings), None) is None:
                    raise ValueError(f"no {kind}s in {name}.")
            elif name.lower().endswith((*LISTS, *SHARDS)):
                if not path.is_file():
                    raise FileNotFoundError(f"no list or shard at {name}.")
                if kind != "image" and name.lower().endswith(SHARDS):
                    raise ValueError(f"{name}: shards hold images, and the model reads {kind}s; unpack them first.")
            elif _is_pattern(name) and next(_matches(name), None) is None:
                raise ValueError(f"nothing matches {name}.")


def iterate_images(sources: Sequence[str], endings: Sequence[str]) -> Iterator[Item]:
    """Every image of the sources, in the order given; within one by name, lists and shards in their own order.

    Args:
        sources: each one an image file; a folder, whose images are found at any depth; a pattern such as
            ``photos/**/*.jpg``; a list (``.txt``, ``.lst``) with one path a line; ``-`` for such a list on standard
            input; or a tar shard (``.tar``, ``.tar.gz``, ``.tgz``), as webdataset writes them, in which every member
            with an image's ending counts. ``{000..099}`` in a name stands for all of these numbers.
        endings: of the files that are images, lower case, with the dot.

    What cannot be read (a shard that breaks off) comes as an Item with an ``error``; the others go on.
    """
    for source in sources:
        if source == STANDARD_INPUT:
            yield from _listed(sys.stdin, endings)
            continue
        for name in _expand(source):
            yield from _images_of(name, endings)


def _images_of(name: str, endings: Sequence[str]) -> Iterator[Item]:
    lower = name.lower()
    if os.path.isdir(name):
        yield from map(Item, _walk(name, endings))
    elif lower.endswith(SHARDS):
        yield from _members(name, endings)
    elif lower.endswith(LISTS):
        try:
            with open(name, encoding="utf-8", errors="surrogateescape") as lines:
                yield from _listed(lines, endings)
        except OSError as error:
            yield Item(name, error=f"cannot read the list {name}: {error.strerror}.")
    elif _is_pattern(name):
        for match in _matches(name):
            if os.path.isdir(match):
                continue  # its files match a pattern of their own
            yield from [Item(match)] if not match.lower().endswith((*LISTS, *SHARDS)) else _images_of(match, endings)
    else:
        yield Item(name)


def _listed(lines: Iterator[str], endings: Sequence[str]) -> Iterator[Item]:
    """The files a list names, one a line, from where the command is run; shards among them are opened."""
    for line in lines:
        if name := line.rstrip("\r\n"):
            yield from _members(name, endings) if name.lower().endswith(SHARDS) else [Item(name)]


def _expand(name: str) -> Iterator[str]:
    """``shard-{000..002}.tar`` as three names."""
    found = _RANGE.search(name)
    if found is None or os.path.exists(name):
        yield name
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{name[: found.start()]}{number:0{len(first)}d}{name[found.end() :]}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def _walk(folder: str, endings: Sequence[str], above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Files with these endings below a folder, sorted as their paths are; links are followed, in a circle once."""
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return
    above = (*above, (here.st_dev, here.st_ino))
    for name in _sorted_names(folder):
        path = os.path.join(folder, name)
        if os.path.splitext(name)[1].lower() in endings:
            if os.path.isfile(path):
                yield path
                continue
            if not os.path.isdir(path):
                continue
        if os.path.isdir(path):
            with contextlib.suppress(PermissionError):
                yield from _walk(path, endings, above)


def _sorted_names(folder: str) -> Iterator[str]:
    """Names in a folder in order; of a huge one through a temporary file, in sorted runs that are merged."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        first = sorted(islice(names, _IN_MEMORY))
        if len(first) < _IN_MEMORY:
            yield from first
            return
        with contextlib.ExitStack() as stack:
            runs = []
            run = first
            while run:
                # Names as they are, whatever their bytes.
                file = stack.enter_context(
                    tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogateescape", newline="")
                )
                file.writelines(f"{name}\0" for name in run)
                file.seek(0)
                runs.append(_split(file))
                run = sorted(islice(names, _IN_MEMORY))
            yield from heapq.merge(*runs)


def _split(file: IO[str]) -> Iterator[str]:
    """The names of a run, read a piece at a time."""
    rest = ""
    while piece := file.read(1 << 16):
        *names, rest = (rest + piece).split("\0")
        yield from names


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[") and not os.path.lexists(name)


def _matches(pattern: str) -> Iterator[str]:
    """Paths that match, in order; ``**`` is any number of folders, hidden ones left out as the shell does."""
    path = Path(pattern)
    parts = list(path.parts)
    start = parts.pop(0) if path.is_absolute() else ""
    return _match(start, parts)


def _match(folder: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part != "**" and not any(sign in part for sign in "*?["):
        path = os.path.join(folder, part)
        if os.path.lexists(path):
            yield from _match(path, rest)
        return
    if not os.path.isdir(folder or "."):
        return
    if part == "**":
        yield from _match(folder, rest) if rest else ()
    for name in _sorted_names(folder or "."):
        path = os.path.join(folder, name)
        if name.startswith(".") and not part.startswith("."):
            continue
        if part == "**":
            if os.path.isdir(path) and not os.path.islink(path):
                yield from _match(path, parts)
            elif not rest:
                yield path
        elif fnmatch.fnmatchcase(name, part):
            yield from _match(path, rest)


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def _members(shard: str, endings: Sequence[str]) -> Iterator[Item]:
    """The images in a tar file, called ``shard.tar/member.jpg``."""
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise
                if member.isfile() and os.path.splitext(member.name)[1].lower() in endings:
                    content = archive.extractfile(member)
                    assert content is not None  # of a file
                    yield Item(f"{shard}/{member.name}", content.read())
    # Decompressors of damaged files raise what comes to them: EOFError, zlib.error, lzma.LZMAError, ...
    except Exception as error:
        cause = getattr(error, "strerror", None) or error or type(error).__name__
        yield Item(shard, error=f"cannot read the shard {shard} to its end ({cause}); copy it again.")
