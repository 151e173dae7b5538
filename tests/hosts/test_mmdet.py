"""MMDetection's own single-stage test file, unmodified, passes over our smallest COCO config."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fetch import COMMAND, FOLDER

KINDS = 4  # building, and the modes loss, predict and tensor


def test_mmdet_single_stage_on_the_smallest_config():
    if not (FOLDER / "mmdet").is_dir():
        pytest.skip(f"MMDetection's tests are not there; they come with: {COMMAND}")
    command = [sys.executable, Path(__file__).with_name("mmdet_suite.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(rf"^{KINDS} passed in", run.stdout, re.MULTILINE), run.stdout[-3000:]
