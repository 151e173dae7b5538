"""Images to classify, one after the other, from wherever they lie: files, folders, patterns, lists, tar shards.

Nothing here holds the names of all images: folders are walked, lists read line by line, shards member by member, always
in the same order, so that an interrupted run finds its place again. Of a folder of more than ``_IN_MEMORY`` entries the
sorted names go through a temporary file.
"""

import contextlib
import fnmatch
import hashlib
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

from ..exits.files import check_apart

__all__ = ["Item", "check_sources", "fingerprint", "iterate_images"]

LISTS = (".txt", ".lst")
SHARDS = (".tar", ".tar.gz", ".tgz")
STANDARD_INPUT = "-"
_IN_MEMORY = 100_000  # names of one folder
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Item(NamedTuple):
    """One image: what rows call it, its bytes where it has no path of its own (and the ``file`` they came from), and
    why there is nothing to read."""

    path: str
    content: bytes | None = None
    error: str | None = None
    file: str | None = None


def fingerprint(item: Item) -> str:
    """What an image is made of now, in short: the size and time of change of its file, or a digest of its bytes."""
    if item.error is not None:
        return item.error
    if item.content is not None:
        return hashlib.blake2b(item.content, digest_size=16).hexdigest()
    try:
        found = os.stat(item.path)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        return type(error).__name__
    return f"{found.st_size} {found.st_mtime_ns}"


def check_sources(
    sources: Sequence[str], endings: Sequence[str], kind: str = "image", output: str | None = None
) -> None:
    """Before long work: ValueError or FileNotFoundError for a source that holds nothing.

    ValueError too for one that is the file ``output``, which is to be written. A single file that is not there is no
    error here: it is one image among many, named when it is its turn. Nor is an empty list on standard input.
    """
    for source in sources:
        if source == STANDARD_INPUT:
            continue
        for name in _expand(source):
            path = Path(name)
            if output is not None:
                check_apart(output, [name])
                if os.path.isfile(output):
                    check_apart(output, _files_of(name, endings))
            if path.is_dir():
                if next(_walk(name, endings), None) is None:
                    raise ValueError(f"no {kind}s in {name}.")
            elif name.lower().endswith((*LISTS, *SHARDS)):
                if not path.is_file():
                    raise FileNotFoundError(f"no list or shard at {name}.")
                if kind != "image" and name.lower().endswith(SHARDS):
                    raise ValueError(f"{name}: shards hold images, and the model reads {kind}s; unpack them first.")
                if name.lower().endswith(LISTS) and next(_images_of(name, endings), None) is None:
                    raise ValueError(f"the list {name} names no {kind}s.")
            elif _is_pattern(name):
                if next(_matches(name), None) is None:
                    raise ValueError(f"nothing matches {name}.")
                if next(_images_of(name, endings), None) is None:
                    raise ValueError(f"no {kind}s in what matches {name}.")


def _files_of(name: str, endings: Sequence[str]) -> Iterator[str]:
    """Names of the files that a source leads to; no file but a list is opened for them."""
    if os.path.isdir(name):
        yield from _walk(name, endings)
    elif name.lower().endswith(LISTS) and os.path.isfile(name):
        with open(name, encoding="utf-8-sig", errors="surrogateescape") as lines:
            yield from (line.rstrip("\r\n") for line in lines)
    elif _is_pattern(name):
        for match in _matches(name):
            yield match
            if os.path.isdir(match):
                yield from _walk(match, endings)


def iterate_images(sources: Sequence[str], endings: Sequence[str]) -> Iterator[Item]:
    """Every image of the sources, in the order given; within one by name, lists and shards in their own order.

    Args:
        sources: each one an image file; a folder, whose images are found at any depth; a pattern such as
            ``photos/**/*.jpg``, of files and of such folders; a list (``.txt``, ``.lst``) with one path a line; ``-``
            for such a list on standard input; or a tar shard (``.tar``, ``.tar.gz``, ``.tgz``), as webdataset writes
            them, in which every member with an image's ending counts. ``{000..099}`` in a name stands for all of these
            numbers.
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
        yield from _matching(name, endings)
    else:
        yield Item(name)


def _matching(pattern: str, endings: Sequence[str]) -> Iterator[Item]:
    """The files that match, and the images of the folders that do, each image once."""
    # Whatever lies in a folder that such a pattern matches, but for one behind a link, it matches too.
    reaches_all = Path(pattern).parts[-2:] == ("**", "*")
    walked: set[str] = set()
    for match in _matches(pattern):
        if walked and not walked.isdisjoint(map(str, Path(match).parents)):
            continue
        if not os.path.isdir(match):
            single = not match.lower().endswith((*LISTS, *SHARDS))
            yield from [Item(match)] if single else _images_of(match, endings)
        elif not reaches_all or os.path.islink(match):
            walked.add(match)
            yield from map(Item, _walk(match, endings))


def _listed(lines: Iterator[str], endings: Sequence[str]) -> Iterator[Item]:
    """The files a list names, one a line, from where the command is run; shards among them are opened."""
    for number, line in enumerate(lines):
        if number == 0:
            line = line.removeprefix("\ufeff")  # the byte-order mark that some editors write
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
                    yield Item(f"{shard}/{member.name}", content.read(), file=shard)
    # Decompressors of damaged files raise what comes to them: EOFError, zlib.error, lzma.LZMAError, ...
    except Exception as error:
        cause = getattr(error, "strerror", None) or error or type(error).__name__
        yield Item(shard, error=f"cannot read the shard {shard} to its end ({cause}); copy it again.")
