"""timm's own test file, unmodified, passes on the small model of every architecture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fetch import unpacked

import exit_plugins.timm

HERE = Path(__file__).resolve().parent

# Each runs once per model; a model gets one of the two tests of the configuration.
KINDS_PER_MODEL = 11


def test_timm_test_models_on_small_models():
    try:
        unpacked("timm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    small = [name for name in exit_plugins.timm.list_models(clips=False) if name.endswith("_test")]
    assert small
    run = subprocess.run([sys.executable, HERE / "timm_suite.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    total = re.search(r"in all, \d+ kinds of test: (\d+) passed$", run.stdout, re.MULTILINE)
    assert total, f"not every test ran and passed:\n{run.stdout[-3000:]}"
    assert int(total[1]) == KINDS_PER_MODEL * len(small)
