"""Damage every kind of file in every way: each is refused in one line, or read and saved again.

    python tests/fuzz/fuzz.py --count 2000 --output docs/fuzz.json

Mutations follow from the seed alone. Exit status 1 if any of them ended otherwise.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a damaged name of a base model is looked up

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "exits"), str(Path(__file__).parent)]

from formats import FORMATS, SUFFIX, Format, remove

PATIENCE = 20  # seconds of processor time after which a reader counts as hanging
# What stands in the place of a number, a word or a bracket of a text format.
_TOKENS = (
    b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"1e-320", b"1e300", b"true", b"null", b'"1"', b'"inf"', b"[]", b"{}",
    b"[" * 2000, b'"\\ud800"', b"99999999999999999999", b'"../x"', b'"\xff"', b"1.0", b'""',
)  # fmt: skip


class Hang(BaseException):
    pass


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """``whole`` with one to three faults: flipped bits, cuts, repeats, strangers, and other values in text."""
    for _ in range(int(rng.integers(1, 4))):
        size = len(whole)
        at = int(rng.integers(size + 1))
        to = min(size, at + int(rng.integers(1, 65)))
        kind = rng.integers(8)
        if kind == 0 and at < size:
            whole = whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :]
        elif kind == 1:
            whole = whole[:at]
        elif kind == 2:
            whole = whole[:at] + whole[to:]
        elif kind == 3:
            whole = whole[:to] + whole[at:to] + whole[to:]
        elif kind == 4:
            whole = whole[:at] + rng.bytes(to - at) + whole[to:]
        elif kind == 5:
            whole = whole[:at] + rng.choice([b"\0", b"\xff"]) * (to - at) + whole[to:]
        else:
            tokens = [match.span() for match in re.finditer(rb'"[^"\n]{0,40}"|-?[0-9][0-9.e+-]*|null|true', whole)]
            if tokens:
                start, end = tokens[int(rng.integers(len(tokens)))]
                whole = whole[:start] + _TOKENS[int(rng.integers(len(_TOKENS)))] + whole[end:]
    return whole


@contextlib.contextmanager
def _impatient():
    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outcome(format: Format, path: Path, again: Path) -> str:
    """``refused`` or ``accepted`` where all is well, else what went wrong."""
    try:
        with _impatient(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = format.load(path)
    except Hang:
        return f"hangs for {PATIENCE} s"
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return "refused" if "\n" not in text and str(path) in text else f"unclear: {type(error).__name__}: {text[:300]}"
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:300]}"
    if not format.right(value):
        return "wrong: read as something else than what was written"
    try:
        format.save(value, again)
    except Exception as error:
        return f"not saved again: {type(error).__name__}: {str(error)[:300]}"
    finally:
        remove(again)
    return "accepted"


def fuzz(name: str, count: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Outcomes of ``count`` mutations of a format, and the faults among them with their numbers."""
    format, counts, faults = FORMATS[name], Counter(), []
    good, path, again = folder / f"good{SUFFIX.get(name, '')}", folder / f"bad{SUFFIX.get(name, '')}", folder / "again"
    format.make(good)
    files = [Path()] if good.is_file() else sorted(file.relative_to(good) for file in good.rglob("*") if file.is_file())
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        remove(path)
        shutil.copytree(good, path) if good.is_dir() else shutil.copy(good, path)
        chosen = path / files[int(rng.integers(len(files)))] if good.is_dir() else path
        chosen.write_bytes(mutated(chosen.read_bytes(), rng))
        found = outcome(format, path, again)
        kind = found if found in ("refused", "accepted") else "fault"
        counts[kind] += 1
        if kind == "fault":
            faults.append(f"{name} {number} ({chosen.name}): {found}")
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutations of each format (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--output", type=Path, help="write the counts here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report, failed = {}, False
    for name in args.formats:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            counts, faults = fuzz(name, args.count, args.seed, Path(folder))
        report[name] = {
            "mutations": args.count,
            **{kind: counts[kind] for kind in ("refused", "accepted", "fault")},
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        print(name, report[name], *faults[:20], sep="\n  ", flush=True)
        failed |= bool(faults)
        if args.output:
            known = json.loads(args.output.read_text()) if args.output.is_file() else {}
            args.output.write_text(json.dumps({**known, name: report[name]}, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
