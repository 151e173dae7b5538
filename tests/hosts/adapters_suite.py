"""LoRA and exits over one network of every model module of the installed timm: a line for each, and the count.

    python tests/hosts/adapters_suite.py [--all] [--write docs/adapted_networks.md] [NAME ...]

``--all``: the smallest network of every module; otherwise those named, or a few. A network that cannot be cut or
adapted must say why. Long: all of them take a core about an hour.
"""

import argparse
import gc
import sys
from pathlib import Path

import timm

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "timm"), str(TESTS / "peft")]

from any_adapted import check_adapted  # noqa: E402
from any_network import SHRUNK, modules_of_timm, smallest  # noqa: E402

FEW = ("test_resnet", "test_efficientnet", "test_vit")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("names", nargs="*")
    known, _ = parser.parse_known_args(argv)
    modules = modules_of_timm()
    module_of = {name: module for module, names in modules.items() for name in names}
    names = known.names or list(FEW)
    if known.all:
        names = [smallest(models) for _, models in sorted(modules.items())]
    outcomes, rows = {"works": [], "refused": [], "failed": []}, []
    for name in names:
        try:
            model = check_adapted(name, **SHRUNK.get(module_of[name], {}))
            outcome = "works"
            said = f"{model.num_exits} exits, one behind every {model.family.unit}"
        except (ValueError, TypeError) as error:
            outcome, said = "refused", str(error).splitlines()[0].replace("|", "/")
        except Exception as error:
            outcome, said = "failed", f"{type(error).__name__}: {str(error)[:200]}"
        outcomes[outcome].append(name)
        print(f"{name}: {outcome}, {said}", flush=True)
        rows.append(f"| `{module_of[name]}` | `{name}` | {said if outcome == 'works' else f'**{outcome}**: {said}'} |")
        gc.collect()
    count = ", ".join(f"{len(found)} {outcome}" for outcome, found in outcomes.items())
    print(count)
    if known.write:
        write_table(known.write, rows, count)
    return 1 if outcomes["failed"] else 0


def write_table(path: Path, rows: list[str], count: str) -> None:
    path.write_text(
        f"# Adapters on the networks of timm {timm.__version__}\n\n"
        f"LoRA with exits over the smallest network of each model module: {count}. Where it works, the last exit\n"
        "gives the adapted network's own answer, samples that leave change nothing for the others, two steps of\n"
        "training move adapters and heads alone, and the model answers alike saved and loaded, and merged. Written by\n"
        "`python tests/hosts/adapters_suite.py --all --write docs/adapted_networks.md`.\n\n"
        "| module | network | exits |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
