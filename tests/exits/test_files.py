"""Files and folders that are written whole or not at all."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exit_plugins.exits import files
from exit_plugins.exits.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    check_apart,
    check_folder,
    check_target,
)

# Files


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_link_stays_a_link_and_mode_stays(tmp_path):
    real = tmp_path / "real.txt"
    real.write_text("old")
    real.chmod(0o600)
    (tmp_path / "link").symlink_to("real.txt")
    with atomic_write(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


def test_what_is_no_plain_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    with atomic_write(pipe) as file:
        file.write("hello")
    assert reader.communicate()[0] == "hello" and names(tmp_path) == ["pipe"]


def test_what_writes_by_name_reaches_pipes_and_devices_too(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
        check_target(tmp_path / name)
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text("hello")
        assert reader.communicate(timeout=20)[0] == "hello"
    assert stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["link", "pipe"]
    # Through a name that leads to nothing when it is resolved, as /dev/stdout of a shell's pipe does.
    out, into = os.pipe()
    check_target(f"/dev/fd/{into}")
    with atomic_path(f"/dev/fd/{into}") as temporary:
        temporary.write_text("hello")
    os.close(into)
    assert os.read(out, 100) == b"hello"
    os.close(out)


def killed(work: Callable[[], None]) -> None:
    """Run ``work`` in a process of its own that ends the hard way."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_next_run_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "a.txt"

    def file() -> None:
        with atomic_write(path) as new:
            new.write("half")
            kill_this_process()

    killed(file)
    assert len(names(tmp_path)) == 1
    (tmp_path / ".a.txt.notes.tmp").write_text("a user's")
    with atomic_write(path) as first:
        first.write("first")
        with atomic_write(path) as second:  # a living writer's file is let alone
            second.write("second")
    assert path.read_text() == "first" and names(tmp_path) == [".a.txt.notes.tmp", "a.txt"]


def test_target_that_cannot_be_written_is_named(tmp_path):
    check_target(tmp_path / "new" / "a.txt", room=1)
    with pytest.raises(IsADirectoryError, match="name a file to write.*"):
        check_target(tmp_path)
    with pytest.raises(OSError, match="are to be written"):
        check_target(tmp_path / "a.txt", room=10**18)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_target(tmp_path / "file" / "a.txt")


def test_what_is_needed_is_not_written_to(tmp_path):
    kept, free = tmp_path / "kept", tmp_path / "free"
    kept.touch()
    (tmp_path / "link").symlink_to("kept")
    os.link(kept, tmp_path / "hard")
    for output, other in ((kept, kept), (tmp_path / "link", kept), (kept, tmp_path / "hard"), (free, str(free))):
        with pytest.raises(ValueError, match="is needed for the same work"):
            check_apart(output, [tmp_path / "another", other])
    check_apart(free, [kept, tmp_path, "a\0name", "x" * 10_000])
    check_apart("/dev/null", ["/dev/null"])


def test_folder_that_cannot_be_written_is_named(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "some" / "new")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_folder(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        check_folder(tmp_path / "file" / "new")


# Folders


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder, text):
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / "sub" / "weights").write_text(text)


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder, "old")
    (folder / "sub" / "notes.txt").write_text("the user's")
    (folder / "empty").mkdir()
    return folder


NEW = {"config.json": "new", "sub/weights": "new", "sub/notes.txt": "the user's"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_the_new_folder_takes_the_place_and_other_files_stay(old, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    notes = (old / "sub" / "notes.txt").stat().st_ino
    old.chmod(0o750)
    with atomic_folder(old) as new:
        write(new, "new")
        assert contents(old)["config.json"] == "old"
    assert contents(old) == NEW and (old / "empty").is_dir()
    assert (old / "sub" / "notes.txt").stat().st_ino == notes and old.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in old.parent.iterdir()] == ["out"]


def test_a_folder_that_was_not_there_and_a_link_to_one(tmp_path, old):
    with atomic_folder(tmp_path / "deep" / "er") as new:
        write(new, "new")
    assert contents(tmp_path / "deep" / "er") == {"config.json": "new", "sub/weights": "new"}
    (tmp_path / "link").symlink_to(old)
    (old / "elsewhere").symlink_to(tmp_path / "deep")
    with atomic_folder(tmp_path / "link") as new:
        write(new, "new")
    assert (tmp_path / "link").is_symlink() and (old / "elsewhere").is_symlink()
    assert contents(old) == NEW and contents(tmp_path / "deep" / "er") == {"config.json": "new", "sub/weights": "new"}
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder(old / "config.json"):
        pass


@pytest.mark.parametrize("where", ["block", "exchange", "second rename"])
def test_after_an_error_everything_is_as_it_was(old, where, monkeypatch):
    before = contents(old)

    def fail(*_):
        raise OSError(28, "No space left on device")

    if where != "block":
        monkeypatch.setattr(files, "_exchange", fail if where == "exchange" else lambda *_: False)
    if where == "second rename":
        real = os.rename
        monkeypatch.setattr(files.os, "rename", lambda a, b: fail() if str(a).endswith(".new") else real(a, b))
    with pytest.raises(OSError, match="No space"), atomic_folder(old) as new:
        write(new, "new")
        if where == "block":
            fail()
    assert contents(old) == before and [p.name for p in old.parent.iterdir()] == ["out"]


def test_what_another_process_wrote_meanwhile_is_kept(old, monkeypatch):
    real = files._exchange

    def exchange(one, other):
        (old / "late").write_text("kept")
        (old / "sub" / "notes.txt").unlink()
        (old / "sub" / "notes.txt").write_text("newer")
        return real(one, other)

    monkeypatch.setattr(files, "_exchange", exchange)
    with atomic_folder(old) as new:
        write(new, "new")
    assert contents(old) == NEW | {"late": "kept", "sub/notes.txt": "newer"}
    assert [p.name for p in old.parent.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_renamed(old, monkeypatch):
    monkeypatch.setattr(files.os.path, "ismount", lambda path: path == old)
    inode = old.stat().st_ino
    with atomic_folder(old) as new:
        write(new, "new")
    assert contents(old) == NEW and old.stat().st_ino == inode


CHILD = """
import os, signal, sys
from pathlib import Path
from exit_plugins.exits import files
stop, exchange, calls = int(sys.argv[2]), sys.argv[3] == "1", 0
if not exchange:
    files._exchange = lambda *_: False
def count(frame, event, arg):
    global calls
    if event in ("call", "line") and frame.f_code.co_filename == files.__file__:
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
    return count
sys.settrace(count)
with files.atomic_folder(sys.argv[1]) as new:
    (new / "sub").mkdir()
    (new / "config.json").write_text("new")
    (new / "sub" / "weights").write_text("new")
sys.settrace(None)
print(calls)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("exchange", ["1", "0"], ids=["exchange", "two renames"])
def test_killed_at_any_line_the_folder_is_the_old_or_the_new_one(old, exchange):
    def run(stop):
        code = CHILD.replace("from exit_plugins.exits import files", LIGHT)
        return subprocess.run([sys.executable, "-S", "-c", code, str(old), str(stop), exchange], capture_output=True)

    before, seen = contents(old), set()
    total = int(run(0).stdout)
    for stop in range(1, total, max(total // 24, 1)):
        write(old, "old")
        assert run(stop).returncode == -signal.SIGKILL
        if not old.exists():  # between two renames: the next call puts it back
            assert exchange == "0"
            with atomic_folder(old):
                pass
        assert contents(old) in (before, NEW), stop
        seen.add(contents(old)["config.json"])
    assert seen == {"old", "new"}
    with atomic_folder(old) as new:
        write(new, "new")
    assert contents(old) == NEW and [p.name for p in old.parent.iterdir()] == ["out"]


# The module alone: torch would cost seconds in each of the killed processes.
LIGHT = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("files", {str(Path(files.__file__))!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""
