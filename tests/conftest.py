"""Every test runs offline, from a fixed seed, and leaves the environment as it found it."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

TESTS = Path(__file__).parent

# Whole folders and files that are slow, and so no part of `make test-fast`: they compile, export, train as users do,
# start other processes, or need MMDetection's compiled operators. A single slow test is marked where it stands.
SLOW = (
    "cli/test_export_command.py",
    "cli/test_predict_files.py",
    "cli/test_trust.py",
    "examples",
    "exits/export",
    "exits/test_compile.py",
    "exits/test_crash.py",
    "exits/test_crash_training.py",
    "exits/test_threads.py",
    "fuzz",
    "hosts",
    "mmdet",
    "peft/test_any_timm.py",
    "peft/test_folders.py",
    "peft/test_precision.py",
    "peft/test_pretrained_layouts.py",
    "peft/test_timm_door.py",
    "peft/test_trainers.py",
    "test_wheel.py",
    "timm/test_any_model.py",
    "timm/test_contract.py",
    "timm/test_dvt_options.py",
    "timm/test_dynperceiver_network.py",
    "timm/test_dynperceiver_options.py",
    "timm/test_earlyon.py",
    "timm/test_new_architecture.py",
    "timm/test_predictor.py",
    "timm/test_shipped.py",
    "timm/test_train.py",
    "timm/test_weights.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [TESTS / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)


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
