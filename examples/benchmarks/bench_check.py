"""Which ratios got worse since they were kept, by more than their spread.

    python examples/benchmarks/bench_check.py KEPT.json NEW.json [KEPT.json NEW.json ...]     # or: make bench-check

Both files of a pair are of the same script, ``forward.py`` (time over the plain network's: less is better) or
``adaptive.py`` (speed-up: more is better), run with the same options on the same machine; all else is refused, since
ratios of other machines differ for reasons of their own. A ratio is a median over turns, its spread the interquartile
range; of two runs the wider one counts. The exit status is 1 where one got worse, or is not measured any more.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]  # what timing.write_json wrote: command, machine, rows
Key = tuple[Any, ...]

# What must be alike for two runs to be compared: the places where they were written may differ, versions and days do.
OF_MACHINE = ("cpu", "threads", "device")
NOT_OF_COMMAND = ("json",)


@dataclass(frozen=True)
class Kind:
    """Where the rows of one benchmark's JSON hold a ratio, and which way is better."""

    key: tuple[str, ...]
    ratio: str
    spread: str
    more_is_better: bool


KINDS = (
    Kind(("mode", "batch", "exit"), "ratio", "ratio_iqr", more_is_better=False),
    Kind(("mode", "batch", "mix"), "speedup", "speedup_iqr", more_is_better=True),
)


@dataclass(frozen=True)
class Change:
    """One ratio in both runs. ``loss`` is how much worse it is now (below zero: better), in units of the ratio."""

    key: Key
    kept: float
    new: float
    spread: float
    loss: float

    @property
    def worse(self) -> bool:
        return not self.loss <= self.spread  # NaN among it

    @property
    def better(self) -> bool:
        return -self.loss > self.spread


def kind_of(document: Document) -> Kind:
    rows = document.get("rows") or [{}]
    for kind in KINDS:
        if {*kind.key, kind.ratio, kind.spread} <= rows[0].keys():
            return kind
    raise ValueError("no ratios with a spread: expected the JSON of forward.py or adaptive.py.")


def compare(kept: Document, new: Document) -> tuple[list[Change], list[Key]]:
    """Every ratio of both runs in the order it was kept, and those that are not in the new one.

    Raises:
        ValueError: they are of different benchmarks, options or machines.
    """
    kind = kind_of(kept)
    if kind != kind_of(new):
        raise ValueError("the two files are of different benchmarks.")
    for what, names in (("machine", OF_MACHINE), ("command", kept["command"].keys() | new["command"].keys())):
        for name in sorted(set(names) - set(NOT_OF_COMMAND)):
            before, now = kept[what].get(name), new[what].get(name)
            if before != now:
                raise ValueError(f"{what}: {name} was {before} and is {now}; keep new ratios: make bench-keep.")
    measured = {tuple(row[name] for name in kind.key): row for row in new["rows"]}
    changes, gone = [], []
    for row in kept["rows"]:
        key = tuple(row[name] for name in kind.key)
        if key not in measured:
            gone.append(key)
            continue
        before, now = row[kind.ratio], measured[key][kind.ratio]
        spread = max(row[kind.spread], measured[key][kind.spread])
        changes.append(Change(key, before, now, spread, before - now if kind.more_is_better else now - before))
    return changes, gone


def report(kept: Document, new: Document) -> bool:
    """Print what changed; whether nothing got worse."""
    changes, gone = compare(kept, new)
    kind = kind_of(kept)
    for change in changes:
        if change.worse or change.better:
            named = ", ".join(f"{name} {value}" for name, value in zip(kind.key, change.key, strict=True))
            words = "worse" if change.worse else "better"
            print(f"{words}: {named}: {kind.ratio} {change.kept:.3f} -> {change.new:.3f} (spread {change.spread:.3f})")
    for key in gone:
        print("not measured: " + ", ".join(f"{name} {value}" for name, value in zip(kind.key, key, strict=True)))
    worse = sum(change.worse for change in changes)
    print(f"{kind.ratio}: {len(changes)} compared, {worse} worse by more than the spread, {len(gone)} not measured")
    return not worse and not gone


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="KEPT NEW")
    files = parser.parse_args(argv).files
    if len(files) % 2:
        parser.error("give pairs: KEPT.json NEW.json")
    good = True
    for kept, new in zip(files[::2], files[1::2], strict=True):
        try:
            good &= report(json.loads(kept.read_text()), json.loads(new.read_text()))
        except FileNotFoundError as error:
            raise SystemExit(
                f"{error.filename} is not there; keep this machine's ratios first: make bench-keep"
            ) from error
        except ValueError as error:
            raise SystemExit(f"{kept} and {new}: {error}") from error
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
