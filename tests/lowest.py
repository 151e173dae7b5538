"""The lowest versions that pyproject.toml declares, as requirements: ``python tests/lowest.py [EXTRA ...]``."""

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def project() -> dict[str, Any]:
    """The table of pyproject.toml."""
    return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest(extras: list[str]) -> list[str]:
    """``name==version`` where a lowest version is declared, else the name."""
    declared = project()
    wanted = [*declared["dependencies"], *(x for extra in extras for x in declared["optional-dependencies"][extra])]
    found = []
    for line in wanted:
        name, version = re.match(r"([A-Za-z0-9._\[\]-]+)(?:>=([0-9.]+))?", line).groups()
        found.append(f"{name}=={version}" if version else line)
    return found


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
