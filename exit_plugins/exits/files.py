"""Writing files and folders so that an interrupted run never leaves half of one, nor loses the one that was there."""

import contextlib
import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no flock: what killed runs left is then not cleaned up
    fcntl = None  # type: ignore[assignment]  # a module that is not there

__all__ = [
    "atomic_folder",
    "atomic_path",
    "atomic_write",
    "check_apart",
    "check_folder",
    "check_target",
    "is_stream",
    "lock",
    "recover_folder",
]

_TEMPORARY = re.compile(r"[0-9a-z_]{8}\.tmp")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it over ``path`` when the block ends without an error.

    A run that is killed leaves ``path`` as it was, and a hidden temporary file that the next one removes. A link is
    followed; what is no plain file (a terminal, a pipe) is written to as it is. OSError names ``path``.
    """
    encoding = None if "b" in mode else "utf-8"
    if is_stream(path):
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    with atomic_path(path) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """``atomic_write`` for what writes by name: the path of a temporary file that takes the place of ``path``.

    What is no plain file gets what the temporary file holds in the end. IsADirectoryError if ``path`` is a folder.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory(prefix="exit_plugins.") as folder:
            written = Path(folder, Path(path).name)
            yield written
            with open(written, "rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = Path(path).resolve()  # a link stays a link
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file was to be written", str(path))
    with _temporary(path) as temporary:
        yield temporary
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is neither file nor folder: a terminal, a pipe, a device, which is written to as it is."""
    # Asked of the name as it is given: /dev/stdout leads to a name under which no pipe is found.
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_target(path: str | os.PathLike[str], room: int = 0) -> None:
    """Before long work: OSError unless a file can be written at ``path``, with ``room`` bytes free for it.

    IsADirectoryError is one of them, where ``path`` is a folder.
    """
    if is_stream(path):
        return
    path = Path(path).resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file to write", str(path))
    with _temporary(path):
        pass
    free = shutil.disk_usage(path.parent).free
    if free < room:
        cause = f"about {room / 1e6:.0f} MB are to be written and {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, cause, str(path))


def check_folder(path: str | os.PathLike[str]) -> None:
    """Before long work: OSError unless ``atomic_folder`` could write a folder at ``path``.

    NotADirectoryError is one of them, where ``path`` is a file, and PermissionError, where nothing may be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder, or a name that is still free.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not any(os.access(place, os.W_OK) for place in (path.parent, path) if place.is_dir()):
        raise PermissionError(errno.EACCES, "cannot be written", str(path))


def check_apart(output: str | os.PathLike[str], others: Iterable[str | os.PathLike[str]]) -> None:
    """ValueError if ``output``, which is to be written, is one of the ``others``, under whatever name or link.

    These are what the same work reads, or keeps, and writing would destroy them. What is no plain file (a terminal, a
    pipe) can be both.
    """
    if is_stream(output):
        return
    for other in others:
        if _same(output, other):
            alias = "" if os.fspath(output) == os.fspath(other) else f" (as {os.fspath(other)})"
            raise ValueError(
                f"{os.fspath(output)} is to be written, but it is needed for the same work{alias} and would be lost; "
                "name another file to write."
            )


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        if os.path.exists(one) and os.path.exists(other):
            return os.path.samefile(one, other)
        return Path(one).resolve() == Path(other).resolve()  # what is not there yet goes by its name
    except (OSError, ValueError):  # a text that is no file's name
        return False


def lock(handle: int, unknown: bool = True) -> bool:
    """Lock an open file or folder for this process and its children, until they close it or end.

    False if others hold it; ``unknown`` where the system or the file system knows no locks.
    """
    if fcntl is None:
        return unknown
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unknown
    return True


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, locked while in use, and removed unless it was renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        temporary, handle = _create(path)
    except OSError as error:
        raise _named(error, path) from error
    try:
        yield temporary
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _named(error: OSError, path: Path) -> OSError:
    """``error`` with the file the user knows in it."""
    if error.errno is None or (error.filename is not None and not _is_temporary(Path(error.filename), path)):
        return error
    return OSError(error.errno, error.strerror, str(path))  # which makes it of the subclass of its number


def _create(path: Path) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        # Before it was locked another process may have taken it for left over.
        if lock(handle) and temporary.exists():
            return temporary, handle
        os.close(handle)


def _is_temporary(name: Path, path: Path) -> bool:
    prefix = f".{path.name}."
    return name.name.startswith(prefix) and _TEMPORARY.fullmatch(name.name[len(prefix) :]) is not None


def _remove_left_over(path: Path) -> None:
    """Remove the temporary files of writers of ``path`` that were killed: those nobody holds the lock of."""
    for found in path.parent.iterdir():
        if not _is_temporary(found, path):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            handle = os.open(found, os.O_RDONLY)
            try:
                if lock(handle, unknown=False):
                    found.unlink()
            finally:
                os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(path: str | os.PathLike[str], without: Iterable[str | os.PathLike[str]] = ()) -> Iterator[Path]:
    """A new, empty folder to write into, which becomes ``path`` when the block ends without an error.

    Until then ``path`` is as it was, whatever happens, and from then on it holds what the block wrote and, beside it,
    what ``path`` held under other names: those files are linked over, never moved out of a folder that could vanish.
    Killed at any moment, ``path`` is the whole old folder or the whole new one (on Linux, where two folders change
    places in one step; elsewhere there is an instant in which the old one stands beside it under a hidden name, and the
    next call puts it back). What a killed run left behind is removed by the next call for the same ``path``.

    Args:
        path: the folder; made if there is none.
        without: files of the old folder, relative to it, that go although the block does not write them again: what
            the new ones make obsolete.

    A ``path`` that cannot be renamed (a mount point, a folder in one that is not writable) gets the files one by one,
    each of them whole.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    check_folder(path)
    path = Path(path).resolve()  # a link to a folder stays a link
    _clean_up(path)
    inside = path.exists() and (not os.access(path.parent, os.W_OK) or os.path.ismount(path))
    new = Path(tempfile.mkdtemp(dir=path if inside else path.parent, prefix=f".{path.name}.", suffix=".new"))
    with _locked(new):
        try:
            yield new
            written = _files(new)
            for file in written:
                _sync(new / file)
            gone = {Path(file) for file in without} - written
            if inside:
                _place(new, path)
                for file in gone:
                    (path / file).unlink(missing_ok=True)
                shutil.rmtree(new)
                return
            if path.exists():
                _link_others(path, new, written | gone)
                shutil.copymode(path, new)
            else:
                os.chmod(new, 0o777 & ~_umask())
            _sync(new)
            old = _swap(new, path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    _sync(path.parent)
    if old is not None:
        _empty(old, path, written | gone)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _files(folder: Path) -> set[Path]:
    """Paths of all files and links below ``folder``, relative to it."""
    found: set[Path] = set()
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found.update(Path(root, name).relative_to(folder) for name in (*names, *links))
    return found


def _sync(path: Path) -> None:
    """Have the disk hold what was written, where the system can say so of this kind of file."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _link_others(old: Path, new: Path, written: set[Path]) -> None:
    """Let ``new`` hold the files of ``old`` that are not in ``written`` too: the same files if possible, not copies."""
    for file in _files(old) - written:
        target = new / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / file, target, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(old / file, target, follow_symlinks=False)
    for root, folders, _ in os.walk(old):
        for name in folders:
            target = new / Path(root, name).relative_to(old)
            if not target.is_symlink():
                target.mkdir(parents=True, exist_ok=True)


def _swap(new: Path, path: Path) -> Path | None:
    """Put ``new`` in the place of ``path``; where what stood there is now, if something did."""
    if not path.exists():
        os.rename(new, path)
        return None
    if _exchange(new, path):
        return new
    old = new.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    return old


def _empty(old: Path, path: Path, written: set[Path]) -> None:
    """Remove what ``path`` was before, but for what another process has put there meanwhile: that goes to ``path``."""
    for file in _files(old):
        with contextlib.suppress(FileNotFoundError):  # somebody else is cleaning up too
            here, there = old / file, path / file
            same = os.path.lexists(there) and os.path.samestat(here.lstat(), there.lstat())
            if file in written or same:
                here.unlink()
            else:
                there.parent.mkdir(parents=True, exist_ok=True)
                os.replace(here, there)
    for root, _, _ in os.walk(old, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(root)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system has no such step."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP):  # this file system cannot
        return False
    raise OSError(code, os.strerror(code), str(other))


def _place(new: Path, path: Path) -> None:
    """Rename the files of ``new`` over those of ``path``, one by one."""
    for file in sorted(_files(new)):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / file, path / file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, by which others see that the folder is being written."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
        yield
    finally:
        os.close(handle)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Put the old folder back that a run killed between two renames left under a hidden name; before reading one."""
    path = Path(path).resolve()
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if not path.exists():
            os.rename(old, path)


def _clean_up(path: Path) -> None:
    """Put an old folder back that a killed run had to rename, and remove the folders that killed runs left."""
    recover_folder(path)
    pattern = f".{glob.escape(path.name)}.*"
    for old in path.parent.glob(f"{pattern}.old"):
        shutil.rmtree(old, ignore_errors=True)
    for left in {*path.parent.glob(f"{pattern}.new"), *path.glob(f"{pattern}.new")}:
        try:
            handle = os.open(left, os.O_RDONLY)
        except OSError:
            continue
        try:
            if lock(handle, unknown=False):  # or another process is writing it
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(handle)
