"""PEFT's own test classes, unmodified, over RepAdapter and Bottleneck.

``peft_suite.py [--all] [pytest's options]``: one case of each method and kind of layer, or every case; one line of
counts per kind of test at the end, and what was left out.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch import unpacked

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    known, rest = parser.parse_known_args(argv)
    folder = unpacked("peft") / "tests"
    # The plugin is found here, and peft must be the installed one: not the folder of its sources.
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-p", "peft_plugin", f"--peft-tests={folder}", "-q", "--no-header"]
    command += [] if known.all else ["--peft-few"]
    quiet = ("-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-o", "addopts=")
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run((*command, *quiet, *rest, str(HERE / "peft_cases.py")), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
