"""Give one network of every model module of the installed timm exits, check them, and write the table.

    python tests/hosts/networks_suite.py [--write docs/networks.md] [MODULE ...]

Long: the whole of timm takes a core about half an hour.
"""

import argparse
import gc
import sys
import warnings
from pathlib import Path

import timm

sys.path.insert(0, str(Path(__file__).parents[1] / "timm"))

from any_network import SHRUNK, check_network, modules_of_timm, smallest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="model modules of timm; all of them if none is given")
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("--all", action="store_true", help="as run.py gives it; every module is checked anyway")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    modules = modules_of_timm()
    rows, right = [], 0
    for module in args.modules or sorted(modules):
        name = smallest(modules[module])
        try:
            model = check_network(name, **SHRUNK.get(module, {}))
            result, right = "behind " + ", ".join(f"`{exit_}`" for exit_ in model.exit_names), right + 1
        except (ValueError, AssertionError) as error:
            result = "**no**: " + str(error).splitlines()[0].replace("|", "/")
        rows.append(f"| `{module}` | `{name}` | {result} |")
        print(rows[-1], flush=True)
        gc.collect()
    count = f"{right} of {len(rows)}"
    print(count)
    if args.write:
        write_table(args.write, rows, count)
    return 0 if right >= len(rows) - 2 else 1


def write_table(path: Path, rows: list[str], count: str) -> None:
    path.write_text(
        f"# Exits on the networks of timm {timm.__version__}\n\n"
        f"{count} model modules, the smallest network of each: with two early exits the last one gives the plain\n"
        "network's answers, in evaluation and in training, with its gradients, and samples that leave at any exit\n"
        "change nothing for the others (1e-5 of the largest value, batches of 1 and 5). Written by\n"
        "`python tests/hosts/networks_suite.py --write docs/networks.md`.\n\n"
        "| module | network | early exits |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
