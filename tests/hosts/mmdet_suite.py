"""MMDetection's own ``test_single_stage.py``, unmodified, over this project's RetinaNet configs.

``mmdet_suite.py [--all] [pytest's options]``: the smallest, or all. ``main`` returns None where the test file is not
there: it comes from MMDetection's repository, which not every machine can reach.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from fetch import COMMAND, FOLDER  # noqa: E402

CONFIGS = HERE.parents[1] / "mm_configs"
# The test draws ten classes, so the configs are those for COCO.
SMALL = "retinanet/*_400mf_*.py"
ALL = "retinanet/*.py"


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    known, rest = parser.parse_known_args(argv)
    test_file = FOLDER / "mmdet" / "tests" / "test_models" / "test_detectors" / "test_single_stage.py"
    if not test_file.is_file():
        print(f"{test_file} is not there; it comes with: {COMMAND}")
        return None
    configs = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob(ALL if known.all else SMALL))
    print(f"over {len(configs)} configs: {', '.join(configs)}")
    environment = {
        **os.environ,
        "MMDET_SUITE_CONFIGS": os.pathsep.join(configs),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
    }
    # The options of the host's own pytest configuration need plugins of its own.
    command = (sys.executable, "-m", "pytest", "-p", "mmdet_plugin", "-c", os.devnull, "-q", "--no-header")
    quiet = ("-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "--rootdir", str(FOLDER))
    return subprocess.run((*command, *quiet, *rest, str(test_file)), env=environment, cwd=FOLDER).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) or 0)
