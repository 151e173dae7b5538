"""Idle OpenMP threads go when asked to, and parallel work goes on as before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exit_plugins.exits.openmp import release_idle_workers

PROGRAM = """
import os, torch
from exit_plugins.exits.openmp import release_idle_workers
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
expected = torch.ones(1 << 20).exp_()
with_pool = count()
assert release_idle_workers()
released = count()
again = torch.ones(1 << 20).exp_()
assert torch.equal(expected, again)
print(with_pool - before, with_pool - released, count() - released)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
@pytest.mark.skipif(not release_idle_workers(), reason="torch has no GNU OpenMP here")
def test_idle_threads_go_and_come_again():
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]


def test_asking_twice_changes_nothing():
    first = release_idle_workers()
    assert release_idle_workers() == first
    assert torch.ones(1 << 18).sum() == 1 << 18
