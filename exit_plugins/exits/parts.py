"""The part file of ``collect_exits``: batches that are done, and all that says which run they belong to."""

import io
import json
import os
import struct
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .files import lock
from .reading import UnreadableFile, reading, strict_json

__all__ = ["PartFile", "Record"]

_MAGIC = b"exit_plugins.part/2\n"
_EARLIER = b'"exit_plugins.part/1"'
_HEAD = struct.Struct("<QI")  # length and CRC-32 of what follows
_PATIENCE = 15.0  # seconds
_WHAT, _REMEDY = "part file of collect_exits", "delete it to start afresh, or name another"


class Record(NamedTuple):
    """What the K exits said of one batch of B samples."""

    confidence: NDArray[Any]  # (K, B) float32
    prediction: NDArray[Any]  # (K, B) int64
    target: NDArray[Any]  # (B,) int64
    sample: NDArray[Any]  # (B,) uint64, digests of the inputs
    shape: NDArray[Any]  # of one sample: (channels, height, width), or (frames, channels, height, width) of a clip
    logits: NDArray[Any] | None = None  # (K, B, C) float32

    def pack(self) -> bytes:
        buffer = io.BytesIO()
        for array in self:
            if array is not None:
                np.save(buffer, array, allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def unpack(cls, payload: bytes, num_exits: int, keep_logits: bool) -> "Record":
        """ValueError for anything that ``pack`` would not have written for such a run."""
        buffer, arrays = io.BytesIO(payload), []
        while buffer.tell() < len(payload):
            arrays.append(np.load(buffer, allow_pickle=False))
        if len(arrays) != 5 + keep_logits:
            raise ValueError(f"a batch in it holds {len(arrays)} arrays")
        record = cls(*arrays)
        count = len(record.target) if record.target.ndim else -1
        found = [(array.dtype, array.shape) for array in record[:4]]
        both = (num_exits, count)
        shapes = (both, both, (count,), (count,))
        kinds = (np.float32, np.int64, np.int64, np.uint64)
        expected = [(np.dtype(kind), shape) for kind, shape in zip(kinds, shapes, strict=True)]
        logits = record.logits
        if (
            found != expected
            or record.shape.dtype != np.int64
            or record.shape.ndim != 1
            or (logits is not None and (logits.dtype != np.float32 or logits.shape[:-1] != both))
        ):
            raise ValueError("a batch in it does not have the shape of this run's")
        return record


class PartFile:
    """Batches appended one by one, each behind its length and checksum, after a header that says whose they are.

    Opening reads what is there. A file that was cut off, in a batch or in its header, goes on from what is whole.

    Args:
        path: the file; made if there is none.
        header: what must be the same for the batches to belong to this run, in plain JSON values.
        num_exits, keep_logits: what each batch holds.

    Raises:
        UnreadableFile: the file is something else, of another run (the message names what differs), or its header is
            damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], num_exits: int, keep_logits: bool) -> None:
        self.path = path
        self.records: list[Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with reading(path, _WHAT, _REMEDY):
            # Without a buffer: what is not on the disk after a write is not remembered as written.
            self.file = path.open("r+b", buffering=0)
            try:
                self._lock()
                found = self._header()
                if found is not None:
                    _check_same(path, found, header)
                    while (payload := self._next()) is not None:
                        self.records.append(Record.unpack(payload, num_exits, keep_logits))
            except BaseException:
                self.file.close()
                raise
        self.file.truncate()
        if found is None:  # not while reading: that a disk is full says nothing of what is on it
            self._write(json.dumps(header).encode(), before=_MAGIC)

    def _lock(self) -> None:
        # A loader's worker processes outlive a killed run by seconds, and share its lock.
        for _ in range(int(_PATIENCE / 0.25) + 1):
            if lock(self.file.fileno()):
                return
            time.sleep(0.25)
        raise UnreadableFile(f"the part file {self.path} is in use by another run; name another.")

    def _header(self) -> dict[str, Any] | None:
        """The header, or None where there is none yet, standing where the file is to be begun or goes on."""
        magic = self.file.read(len(_MAGIC))
        if magic == _MAGIC:
            payload, cut = self._read()
            if payload is not None:
                header = strict_json(payload)
                if not isinstance(header, dict):
                    raise ValueError("its header is not a mapping")
                return header
            if not cut:
                raise ValueError("its header is damaged")
        elif _EARLIER in magic + self.file.read(100):
            raise ValueError("an earlier version of this package wrote it")
        elif not _MAGIC.startswith(magic):
            raise ValueError("it is some other file")
        if magic:
            warnings.warn(f"{self.path} was cut off in its header; it is started again.", stacklevel=5)
        self.file.seek(0)
        return None

    def _next(self) -> bytes | None:
        """The next whole batch, or None, standing where it would begin."""
        start = self.file.tell()
        payload, cut = self._read()
        if payload is None:
            if not cut:
                warnings.warn(
                    f"{self.path} is damaged after {len(self.records)} batches; those behind are done again.",
                    stacklevel=5,
                )
            self.file.seek(start)
        return payload

    def _read(self) -> tuple[bytes | None, bool]:
        """(what stands here, whether the file ends before it does); None for what is not whole."""
        head = self.file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None, True
        length, checksum = _HEAD.unpack(head)
        if self.file.tell() + length > os.fstat(self.file.fileno()).st_size:
            return None, True
        payload = self.file.read(length)
        return (payload, False) if zlib.crc32(payload) == checksum else (None, False)

    def _write(self, payload: bytes, before: bytes = b"") -> None:
        start = self.file.tell()
        left = memoryview(before + _HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:  # a full disk: the file goes on from where it was
            self.file.truncate(start)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def append(self, record: Record) -> None:
        self._write(record.pack())

    def check_batch(self, index: int, record: Record) -> None:
        """ValueError naming what differs unless the stored batch ``index`` is of these very samples."""
        stored = self.records[index]
        if not np.array_equal(stored.shape, record.shape):
            differs = f"its images are {_size(stored.shape.tolist())} and this run's {_size(record.shape.tolist())}"
        elif len(stored.target) != len(record.target):
            differs = f"its batch {index + 1} holds {len(stored.target)} samples and this run's {len(record.target)}"
        elif not np.array_equal(stored.sample, record.sample):
            count = int((stored.sample != record.sample).sum())
            differs = f"its images differ: {count} of {len(record.sample)} in batch {index + 1}"
        elif not np.array_equal(stored.target, record.target):
            differs = f"its labels differ in batch {index + 1}"
        else:
            return
        raise UnreadableFile(f"the part file {self.path} is of another run: {differs}; {_REMEDY}.")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.file.close()


def _check_same(path: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    different = [
        f"{key} {_short(found.get(key))} there and {_short(header[key])} here"
        for key in header
        if key not in found or found[key] != header[key]
    ]
    if different:
        raise UnreadableFile(f"the part file {path} is of another run: {'; '.join(different)}; {_REMEDY}.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(int(size)) for size in shape)
