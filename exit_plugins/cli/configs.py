"""The MMDetection configurations that come with the package: their names, or the path of one for MMDetection's scripts.

examples:
  exit-plugins configs
  python $TOOLS/train.py $(exit-plugins configs bccd/retinanet_dynperceiver_regnety_400mf_fpn_bccd) --work-dir runs/bccd
"""

import argparse
from importlib.resources import files
from pathlib import Path

from .common import add_json_argument, print_json

CONFIGS = Path(str(files("exit_plugins"))) / "mm_configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print its path; a part of the name will do")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    names = list_configs()
    if args.name is not None:
        path = find_config(args.name)
        print_json({"config": str(path)}) if args.json else print(path)
        return 0
    if args.json:
        print_json({"folder": str(CONFIGS), "configs": names})
        return 0
    print("\n".join(names))
    print(f"\nMMEngine takes them by their path: CONFIG=$(exit-plugins configs {names[0]})")
    print(f"or, in a config of your own: _base_ = {str(CONFIGS / names[0]) + '.py'!r}")
    return 0


def list_configs() -> list[str]:
    """Names of the configurations to run, without the ending; what they inherit from is left out."""
    found = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.glob("[!_]*/*.py"))
    return sorted(path.as_posix() for path in found)


def find_config(name: str) -> Path:
    """The file of one; ValueError names those that come near when no single one is meant."""
    name = name.removesuffix(".py")
    names = list_configs()
    meant = [x for x in names if name in (x, x.rpartition("/")[2])] or [x for x in names if name in x]
    if len(meant) != 1:
        known = ", ".join(meant or names)
        raise ValueError(
            f"{'several configurations are' if meant else 'no configuration is'} called {name!r}: {known}."
        )
    return CONFIGS / f"{meant[0]}.py"
