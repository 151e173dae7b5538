"""What ``import exit_plugins`` costs over ``import timm``: fresh interpreters in turns, medians.

python examples/benchmarks/import_time.py --repeats 9
"""

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    statements = ("pass", "import timm", "import exit_plugins")
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for repeat in range(args.repeats + 1):
        for statement in statements:
            spent = seconds(statement)
            if repeat:  # the first round fills the caches
                times[statement].append(spent)
    start, timm, ours = (statistics.median(times[statement]) for statement in statements)
    print(f"import timm {timm - start:.2f} s, import exit_plugins {ours - start:.2f} s, median of {args.repeats}")
    print(f"over timm: {100 * ((ours - start) / (timm - start) - 1):+.1f} %")


if __name__ == "__main__":
    main()
