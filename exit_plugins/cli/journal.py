"""A file of rows that a killed run goes on with, and that can be asked afterwards which run wrote it."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..exits.digests import file_digest
from ..exits.files import atomic_path, atomic_write, check_target, is_stream, lock
from ..exits.reading import reading, strict_json
from .rows import RowFormat, import_arrow, write_parquet

__all__ = ["Journal", "Trail"]

_CHECKPOINT = 1.0  # seconds between two records of how far a run has come: what a kill costs at most
_ANEW = "leave out --resume to write it anew"


class Trail:
    """Which images a run has gone through, in order, as two digests: of their names, and of what they were made of."""

    def __init__(self, names: str = "", contents: str = "") -> None:
        self.names, self.contents = names, contents

    def add(self, name: str, content: str) -> None:
        self.names = _chained(self.names, name)
        self.contents = _chained(self.contents, content)


def _chained(digest: str, text: str) -> str:
    return hashlib.blake2b(f"{digest} {text}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class Journal:
    """Writes rows beside ``output`` until the last one, and remembers how far it has come.

    ``output.part`` holds the rows, ``output.part.json`` how many images they answer, how many bytes they are, what
    those images were, and what run it is: its model, policy, options and inputs, which must be the same to go on. A run
    that was killed at any moment is cut back to the last record, and goes on from there with the same batches; so the
    file it ends with is the one it would have written undisturbed. Only then does it take the place of ``output``, and
    the record stays as ``.output.run.json``, so that a finished file is not taken for that of another run. A link is
    followed; what is no plain file (a terminal, a pipe) gets the rows as they come, and no record.

    Args:
        output: the file; what stands there stays until the end.
        rows: their form.
        run: what must be the same in a run that goes on.
        resume: go on with what a killed run left, if it left something.

    Attributes:
        finished: ``output`` is there, whole, and this very run wrote it.
        state: how far it has come. Whoever goes on compares the images with its ``items``, ``names`` and ``contents``
            (those of a ``Trail``).

    Raises:
        ValueError: a killed run left something and ``resume`` was not asked for, or it was another run; another
            process is writing here; or ``resume`` was asked for and ``output`` is of another run, of one nobody knows,
            or no plain file.
    """

    def __init__(self, output: str, rows: RowFormat, run: Mapping[str, Any], resume: bool, top_k: int = 1) -> None:
        self.output, self.rows, self.top_k = Path(output), rows, top_k
        self.run = json.loads(json.dumps(dict(run)))
        self.state: dict[str, Any] = {"items": 0, "last": None, "bytes": 0, "failed": 0, "unsure": 0, "exits": {}}
        self.state |= {"names": "", "contents": ""}
        self.finished, self._saved = False, 0.0
        if run["format"] == "parquet":
            import_arrow()  # before the work, not after it
        check_target(output)
        self.streams = is_stream(output)
        if self.streams:
            self._stream(resume)
            return
        self.place = self.output.resolve() if self.output.is_symlink() else self.output
        self.part = self.place.with_name(self.place.name + ".part")
        self.record = self.place.with_name(self.place.name + ".part.json")
        self.origin = self.place.with_name(f".{self.place.name}.run.json")
        if self.part.exists() and not resume:
            raise ValueError(f"{self.part} holds the rows of a run that did not end; give --resume, or remove it.")
        if resume and not self.part.exists() and self.place.exists():
            self.state = self._finished()
            self.finished = True
            return
        if self.record.exists() and self.part.exists():
            self.state = self._earlier()
        self.file: IO[bytes] = self.part.open("ab")
        if not lock(self.file.fileno()):
            self.file.close()
            raise ValueError(f"another process is writing {self.part}.")
        self.file.truncate(self.state["bytes"])
        self.file.seek(0, os.SEEK_END)
        if self.state["bytes"] == 0:
            self._write(rows.head)
            self._save()

    def _stream(self, resume: bool) -> None:
        """Rows go straight out; those of parquet, which is written in one go, through a temporary file."""
        if resume:
            raise ValueError(f"--resume goes on with a file, and {self.output} is none; leave it out.")
        if self.run["format"] == "parquet":
            self._folder = tempfile.TemporaryDirectory(prefix="exit_plugins.")
            self.part = Path(self._folder.name, "rows")
        else:
            self.part = self.output
        self.file = self.part.open("wb")
        self._write(self.rows.head)

    def _earlier(self) -> dict[str, Any]:
        document = self._read(self.record, f"remove it and {self.part.name} to begin anew")
        self._check_same(document["run"], f"{self.part} was begun", "remove it to begin anew")
        state: dict[str, Any] = document["state"]
        if self.part.stat().st_size < state["bytes"]:
            raise ValueError(f"{self.part} is shorter than {self.record.name} says; remove both to begin anew.")
        return state

    def _finished(self) -> dict[str, Any]:
        if not self.origin.exists():
            raise ValueError(f"{self.output} is there, and nothing says which run wrote it; {_ANEW}.")
        document = self._read(self.origin, _ANEW)
        self._check_same(document["run"], f"{self.output} was written", _ANEW)
        if document["sha256"] != file_digest(self.place):
            raise ValueError(f"{self.output} is not what the run wrote that is recorded beside it; {_ANEW}.")
        state: dict[str, Any] = document["state"]
        return state

    def _read(self, path: Path, remedy: str) -> dict[str, Any]:
        with reading(path, "record of a run", remedy):
            document: dict[str, Any] = strict_json(path.read_bytes())
            for name in ("run", "state", *(["sha256"] if path == self.origin else [])):
                document[name]
            for name in self.state:
                document["state"][name]
        return document

    def _check_same(self, run: Mapping[str, Any], what: str, remedy: str) -> None:
        different = sorted(key for key in run.keys() | self.run.keys() if run.get(key) != self.run.get(key))
        if different:
            key = different[0]
            raise ValueError(
                f"{what} with another {key} ({_short(run.get(key))}, now {_short(self.run.get(key))}); "
                f"give the same, or {remedy}."
            )

    def check_passed(self, trail: Trail, count: int, last: str | None, more: bool) -> None:
        """ValueError unless the images gone through again are those that the rows answer.

        Args:
            trail, count, last: of as many images of now as the rows answer, or of all where there are fewer.
            more: whether others come after them.
        """
        state = self.state
        if self.finished:
            begin, remedy = f"the images are not those that {self.output} answers", _ANEW
        else:
            begin = "the images are not those of the run that is to go on"
            remedy = f"remove {self.part} to begin anew"
        if count < state["items"]:
            differs = f"there are {count}, and it answered {state['items']}; the last was {state['last']}"
        elif last != state["last"]:
            differs = f"its number {count} was {state['last']}, now it is {last}"
        elif trail.names != state["names"]:
            differs = f"among the first {count} names have changed"
        elif trail.contents != state["contents"]:
            differs = f"among the first {count} files have changed since (their size or time of change, or their bytes)"
        elif self.finished and more:
            differs = f"there are more than the {count} it answered"
        else:
            return
        raise ValueError(f"{begin}: {differs}. Bring them back, or {remedy}.")

    def add(
        self,
        rows: Iterable[Mapping[str, Any]],
        names: Sequence[str],
        contents: Sequence[str],
        failed: int,
        unsure: int,
    ) -> None:
        """The rows of more images: the ``names`` of all of these, and what each was made of when it was read."""
        text = []
        for row in rows:
            text.append(self.rows.line(row))
            exit_ = str(row["exit"])
            self.state["exits"][exit_] = self.state["exits"].get(exit_, 0) + 1
        self._write("".join(text))
        trail = Trail(self.state["names"], self.state["contents"])
        for name, content in zip(names, contents, strict=True):
            trail.add(name, content)
        self.state |= {"names": trail.names, "contents": trail.contents, "last": names[-1]}
        self.state["items"] += len(names)
        self.state["failed"] += failed
        self.state["unsure"] += unsure
        if time.monotonic() - self._saved >= _CHECKPOINT:
            self._save()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        self.file.write(data)
        self.file.flush()
        self.state["bytes"] += len(data)

    def _save(self) -> None:
        if self.streams:
            return
        os.fsync(self.file.fileno())  # the record must not promise what the disk does not hold
        with atomic_write(self.record) as file:
            json.dump({"run": self.run, "state": self.state}, file, allow_nan=False)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Stop here, to go on later."""
        try:
            self._save()
        finally:
            self.file.close()

    def finish(self) -> None:
        """Everything is answered: put the file in its place."""
        self.close()
        if self.run["format"] == "parquet":
            with atomic_path(self.output) as temporary:
                write_parquet(self.part, temporary, self.top_k)
                self._sign(temporary)
            self.part.unlink()
        elif not self.streams:
            self._sign(self.part)
            os.replace(self.part, self.place)
        if not self.streams:
            self.record.unlink()

    def _sign(self, written: Path) -> None:
        """Say whose the file is, before it is in its place: killed in between, the part is there and comes first."""
        if not self.streams:
            with atomic_write(self.origin) as file:
                json.dump({"run": self.run, "state": self.state, "sha256": file_digest(written)}, file, allow_nan=False)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
