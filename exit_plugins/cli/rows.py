"""Rows of answers on their way out: the forms they take, and a file that a killed run goes on with."""

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..exits.files import atomic_path, atomic_write, check_target, lock
from ..exits.plots import si_unit
from ..exits.reading import reading, strict_json

__all__ = ["FORMATS", "ENDINGS", "Journal", "RowFormat", "make_format"]

FORMATS = ("text", "jsonl", "csv", "parquet")
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_COLUMNS = ("path", "class", "label", "confidence", "exit", "macs")
_CHECKPOINT = 1.0  # seconds between two records of how far a run has come: what a kill costs at most


# ---------------------------------------------------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------------------------------------------------


class RowFormat:
    """Rows as JSON lines; the other forms change what a row becomes and what stands above all."""

    head = ""

    def line(self, row: Mapping[str, Any]) -> str:
        return json.dumps(row, allow_nan=False) + "\n"


class _Csv(RowFormat):
    """One line a row, quoted where commas or line ends ask for it; nothing stands for None."""

    def __init__(self, top_k: int) -> None:
        self.others = range(2, top_k + 1)
        more = [f"{name}_{k}" for k in self.others for name in ("class", "label", "probability")]
        first = ["probability"] if top_k > 1 else []
        self.head = self._joined([*_COLUMNS, *first, *more])

    def line(self, row: Mapping[str, Any]) -> str:
        top = row.get("top") or [{}]
        first = [top[0]["probability"]] if top[0] else []
        more = [top[k - 1][name] for k in self.others for name in ("class", "label", "probability")]
        return self._joined([*(row[name] for name in _COLUMNS), *first, *more])

    @staticmethod
    def _joined(cells: Sequence[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()


class _Text(RowFormat):
    """A table to read: everything in columns of known width, and the path last, so that no row waits for another."""

    def __init__(self, kind: str, classes: Sequence[str], num_exits: int, top_k: int, timed: bool) -> None:
        self.width, self.num_exits, self.top_k, self.timed = max(6, *map(len, classes)), num_exits, top_k, timed
        others = "".join(f"{f'{k}.':>{self.width + 7}}" for k in range(2, top_k + 1))
        time_ = f"{'time':>10}" if timed else ""
        self.head = f"{'label':>{self.width}}  confidence  exit        MACs{time_}{others}  {kind}\n"

    def line(self, row: Mapping[str, Any]) -> str:
        sure = "NaN" if row["confidence"] is None else f"{row['confidence']:.3f}"
        macs = "-" if row["macs"] is None else _si(row["macs"], "")
        time_ = f"{_si(row['seconds'], 's'):>10}" if self.timed else ""
        others = "".join(
            f"{other['label']:>{self.width}}{_share(other['probability']):>7}" for other in (row.get("top") or [])[1:]
        )
        exit_ = f"{row['exit']}/{self.num_exits}"
        path = row["path"].replace("\n", "\\n")
        return f"{row['label']:>{self.width}}  {sure:>10}  {exit_:>4}  {macs:>10}{time_}{others}  {path}\n"


def _si(value: float, unit: str) -> str:
    divisor, prefix = si_unit(value)
    return f"{value / divisor:.4g} {prefix}{unit}"


def _share(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.3f}"


def make_format(
    name: str, kind: str, classes: Sequence[str], num_exits: int, top_k: int = 1, timed: bool = False
) -> RowFormat:
    """The form of this name. ``parquet`` is JSON lines until the end, for a file of its kind cannot be continued."""
    if name == "csv":
        return _Csv(top_k)
    return _Text(kind, classes, num_exits, top_k, timed) if name == "text" else RowFormat()


def _write_parquet(source: Path, target: Path, top_k: int) -> None:
    """Rows of JSON lines as one parquet file, a block at a time."""
    pa, parquet = _arrow()
    top = pa.list_(pa.struct([("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64())]))
    fields = [("path", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("confidence", pa.float64())]
    fields += [("exit", pa.int32()), ("macs", pa.int64()), *([("top", top)] if top_k > 1 else [])]
    schema = pa.schema(fields)
    with source.open(encoding="utf-8") as lines, parquet.ParquetWriter(target, schema) as writer:
        for block in _blocks(lines, 50_000):
            rows = [json.loads(line) for line in block]
            for row in rows:
                # A name that is no UTF-8 cannot be said in parquet as it is.
                row["path"] = row["path"].encode("utf-8", "backslashreplace").decode()
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _blocks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    block = []
    for line in lines:
        block.append(line)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ImportError("parquet files need pyarrow: pip install 'exit-plugins[parquet]'") from error
    return pyarrow, parquet


# ---------------------------------------------------------------------------------------------------------------------
# A file that a killed run goes on with
# ---------------------------------------------------------------------------------------------------------------------


class Journal:
    """Writes rows beside ``output`` until the last one, and remembers how far it has come.

    ``output.part`` holds the rows, ``output.part.json`` how many images they answer, how many bytes they are and what
    run it is: its model, policy, options and inputs, which must be the same to go on. A run that was killed at any
    moment is cut back to the last record, and goes on from there with the same batches; so the file it ends with is
    the one it would have written undisturbed. Only then does it take the place of ``output``.

    Args:
        output: the file; what stands there stays until the end.
        rows: their form.
        run: what must be the same in a run that goes on.
        resume: go on with what a killed run left, if it left something.

    Raises:
        ValueError: a killed run left something and ``resume`` was not asked for, or it was another run; or another
            process is writing here.
    """

    def __init__(self, output: str, rows: RowFormat, run: Mapping[str, Any], resume: bool, top_k: int = 1) -> None:
        self.output, self.rows, self.top_k = Path(output), rows, top_k
        self.part = self.output.with_name(self.output.name + ".part")
        self.record = self.output.with_name(self.output.name + ".part.json")
        self.run = json.loads(json.dumps(dict(run)))
        self.state: dict[str, Any] = {"items": 0, "last": None, "bytes": 0, "failed": 0, "unsure": 0, "exits": {}}
        if run["format"] == "parquet":
            _arrow()  # before the work, not after it
        check_target(output)
        if self.part.exists() and not resume:
            raise ValueError(f"{self.part} holds the rows of a run that did not end; give --resume, or remove it.")
        self.finished = resume and not self.part.exists() and self.output.exists()
        if self.finished:
            return
        if self.record.exists() and self.part.exists():
            self.state = self._earlier()
        self.file: IO[bytes] = self.part.open("ab")
        if not lock(self.file.fileno()):
            self.file.close()
            raise ValueError(f"another process is writing {self.part}.")
        self.file.truncate(self.state["bytes"])
        self.file.seek(0, os.SEEK_END)
        self._saved = 0.0
        if self.state["bytes"] == 0:
            self._write(rows.head)
            self._save()

    def _earlier(self) -> dict[str, Any]:
        with reading(self.record, "record of a run", f"remove it and {self.part.name} to begin anew"):
            document = strict_json(self.record.read_bytes())
            state: dict[str, Any] = document["state"]
            run = document["run"]
            if self.part.stat().st_size < state["bytes"]:
                raise ValueError(f"{self.part.name} is shorter than it says")
        different = sorted(key for key in run.keys() | self.run.keys() if run.get(key) != self.run.get(key))
        if different:
            key = different[0]
            raise ValueError(
                f"{self.part} was begun with another {key} ({_short(run.get(key))}, now {_short(self.run.get(key))}); "
                "give the same to go on, or remove it to begin anew."
            )
        return state

    def add(self, rows: Iterable[Mapping[str, Any]], items: int, last: str, failed: int, unsure: int) -> None:
        """Rows of ``items`` more images, ``last`` the name of the last of them."""
        text = []
        for row in rows:
            text.append(self.rows.line(row))
            exit_ = str(row["exit"])
            self.state["exits"][exit_] = self.state["exits"].get(exit_, 0) + 1
        self._write("".join(text))
        self.state["items"] += items
        self.state["last"] = last
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
                _write_parquet(self.part, temporary, self.top_k)
            self.part.unlink()
        else:
            os.replace(self.part, self.output)
        self.record.unlink()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def print_line(text: str) -> None:
    """To standard output, whatever its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
