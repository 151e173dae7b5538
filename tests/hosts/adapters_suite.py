"""LoRA and exits over one network of every model module of the installed timm: a line for each, and the count.

    python tests/hosts/adapters_suite.py [--all] [--rows ROWS.jsonl] [--write docs/adapted_networks.md] [NAME ...]

``--all``: the smallest network of every module; otherwise those named, or a few. A network that cannot be cut or
adapted must say why. Long: all of them take a core about an hour, so ``--rows`` keeps each outcome as it is found, and
the next run with the same file goes on behind them (what failed is tried again).
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import timm

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "timm"), str(TESTS / "peft")]

from any_adapted import check_adapted  # noqa: E402
from any_network import SHRUNK, modules_of_timm, smallest  # noqa: E402

FEW = ("test_resnet", "test_efficientnet", "test_vit")
OUTCOMES = ("works", "refused", "failed")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--rows", type=Path, help="JSON lines: outcomes found so far; those of this run are added")
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("names", nargs="*")
    known, _ = parser.parse_known_args(argv)
    modules = modules_of_timm()
    names = known.names or list(FEW)
    if known.all:
        names = [smallest(models) for _, models in sorted(modules.items())]
    module_of = {name: module for module, of_module in modules.items() for name in of_module}
    before = read_rows(known.rows) if known.rows else {}
    rows = []
    for name in names:
        row = before.get(name)
        if row is None:
            row = examine(name, module_of[name])
            if known.rows:
                with known.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(f"{name}: {row['outcome']}, {row['said']}", flush=True)
        rows.append(row)
        gc.collect()
    count = ", ".join(f"{sum(row['outcome'] == outcome for row in rows)} {outcome}" for outcome in OUTCOMES)
    print(count)
    if known.write:
        write_table(known.write, rows, count)
    return 1 if any(row["outcome"] == "failed" for row in rows) else 0


def examine(name: str, module: str) -> dict[str, str]:
    """One row: what became of the network, and its exits or the first line of what was said against it."""
    try:
        model = check_adapted(name, **SHRUNK.get(module, {}))
        outcome, said = "works", f"{model.num_exits} exits, one behind every {model.family.unit}"
    except (ValueError, TypeError) as error:
        outcome, said = "refused", str(error).splitlines()[0]
    except Exception as error:
        outcome, said = "failed", f"{type(error).__name__}: {str(error)[:200]}"
    return {"module": module, "name": name, "outcome": outcome, "said": said}


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """What an earlier run settled, by network."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines) if row["outcome"] != "failed"}


def write_table(path: Path, rows: list[dict[str, str]], count: str) -> None:
    lines = []
    for row in rows:
        said = " ".join(row["said"].replace("|", "/").split())
        said = said if row["outcome"] == "works" else f"**{row['outcome']}**: {said}"
        lines.append(f"| `{row['module']}` | `{row['name']}` | {said} |")
    path.write_text(
        f"# Adapters on the networks of timm {timm.__version__}\n\n"
        f"LoRA with exits over the smallest network of each model module: {count}. Where it works, the last exit\n"
        "gives the adapted network's own answer, samples that leave change nothing for the others, two steps of\n"
        "training move adapters and heads alone, and the model answers alike saved and loaded, and merged. Written by\n"
        "`python tests/hosts/adapters_suite.py --all --write docs/adapted_networks.md`.\n\n"
        "| module | network | exits |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
