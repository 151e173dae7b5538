"""Every test runs offline, from a fixed seed, and leaves the environment as it found it."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    # MMDetection's train.py and accelerate write LOCAL_RANK and WORLD_SIZE for themselves; what runs later in this
    # process would take itself for one of several.
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
