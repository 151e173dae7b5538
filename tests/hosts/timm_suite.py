"""timm's own ``tests/test_models.py``, unmodified, over this package's models.

``timm_suite.py [--all] [--models GLOB ...] [pytest's options]``: the small ``*_test`` models, every registered model,
or those that match; one line of counts per kind of test at the end.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch import unpacked


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--models", nargs="+", metavar="GLOB", default=["*_test"])
    known, rest = parser.parse_known_args(argv)
    models = "*" if known.all else ",".join(known.models)
    test_file = unpacked("timm") / "tests" / "test_models.py"
    # The plugin is found here, and timm must be the installed one: not the folder of its sources.
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH"))))
    command = (sys.executable, "-m", "pytest", "-p", "timm_plugin", f"--exit-models={models}", "-q", "--no-header")
    quiet = ("-p", "no:cacheprovider", "-W", "ignore", "--tb=short")
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        (*command, *quiet, *rest, str(test_file)), env=environment, cwd=test_file.parents[2]
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
