"""Rows of answers on their way out: the forms they take."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..exits.plots import si_unit

__all__ = ["FORMATS", "ENDINGS", "RowFormat", "import_arrow", "make_format", "print_line", "write_parquet"]

FORMATS = ("text", "jsonl", "csv", "parquet")
ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_COLUMNS = ("path", "class", "label", "confidence", "exit", "macs")


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


def write_parquet(source: Path, target: Path, top_k: int) -> None:
    """Rows of JSON lines as one parquet file, a block at a time."""
    pa, parquet = import_arrow()
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


def import_arrow() -> tuple[Any, Any]:
    """pyarrow and its module of Parquet; ImportError with what to install."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ImportError("parquet files need pyarrow: pip install 'exit-plugins[parquet]'") from error
    return pyarrow, parquet


def print_line(text: str) -> None:
    """To standard output, whatever its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
