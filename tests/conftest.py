"""Every test runs offline, from a fixed seed, and leaves the environment as it found it."""

import logging
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


@pytest.fixture(autouse=True, scope="module")
def _logging() -> Iterator[None]:
    # Hosts and exporters silence loggers that are not theirs; what later tests read in the log would be missing.
    def loggers() -> list[logging.Logger]:
        return [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)] + [logging.root]

    before = {logger: (logger.level, logger.propagate, logger.disabled) for logger in loggers()}
    silenced = logging.root.manager.disable
    yield
    logging.disable(silenced)
    for logger, (level, propagate, disabled) in before.items():
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
