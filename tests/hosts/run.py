"""Run the hosts' own test files over this package's models: ``run.py [--all] [--host timm ...] [suite's options]``.

Every ``<host>_suite.py`` in this folder is one suite, a module with ``main(argv) -> int | None``: 0 if all is well,
None if the host's test files could not be had.
It gets ``--all`` when every model is asked for, the small ones being the default, and the options not known here.
"""

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    suites = {path.stem.removesuffix("_suite"): path.stem for path in sorted(HERE.glob("*_suite.py"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every registered model, not only the small ones")
    parser.add_argument("--host", action="append", choices=sorted(suites), help="only this host (may be repeated)")
    known, rest = parser.parse_known_args(argv)
    sys.path.insert(0, str(HERE))
    results = {}
    for host in known.host or suites:
        print(f"== {host}", flush=True)
        results[host] = importlib.import_module(suites[host]).main([*(["--all"] if known.all else []), *rest])
    words = {0: "passed", None: "NOT RUN, its test files are not there"}
    for host, status in results.items():
        print(f"{host}: {words.get(status, f'FAILED (status {status})')}")
    return 1 if any(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
