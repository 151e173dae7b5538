"""LoRA and exits over one network of every model module of the installed timm: a line for each, and the count.

``adapters_suite.py [--all] [NAME ...]``: the smallest network of every module, or a few, or those named. A network that
cannot be cut or adapted must say why.
"""

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FEW = ("test_resnet", "test_efficientnet", "test_vit")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("names", nargs="*")
    known, _ = parser.parse_known_args(argv)
    sys.path[:0] = [str(TESTS / "timm"), str(TESTS / "peft")]
    import any_adapted
    import any_network

    names = known.names or list(FEW)
    if known.all:
        names = [any_network.smallest(models) for _, models in sorted(any_network.modules_of_timm().items())]
    outcomes = {"works": [], "refused": [], "failed": []}
    for name in names:
        try:
            model = any_adapted.check_adapted(name)
            outcome = "works"
            said = f"{model.num_exits} exits, one behind every {model.family.unit}"
        except (ValueError, TypeError) as error:
            outcome, said = "refused", str(error).partition(". ")[0]
        except Exception as error:
            outcome, said = "failed", f"{type(error).__name__}: {str(error)[:200]}"
        outcomes[outcome].append(name)
        print(f"{name}: {outcome}, {said}", flush=True)
    print(", ".join(f"{len(found)} {outcome}" for outcome, found in outcomes.items()))
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
