"""pytest plugin: MMDetection's single-stage detector tests run over this project's configs in place of its own.

The test file names its configs in ``parameterized.expand`` and reads them from MMDetection's folder of configs. Here
each list becomes ours, with whatever else its first entry gave, and the folder ours.
"""

import os
from pathlib import Path

import mmdet.testing._utils as testing
import parameterized
import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "mm_configs"

_expand = parameterized.parameterized.expand


def expand(cases: list, *args, **kwargs):
    """Stands for ``parameterized.expand`` while the test file is imported."""
    first = cases[0]
    rest = () if isinstance(first, str) else tuple(first[1:])
    return _expand([(config, *rest) for config in os.environ["MMDET_SUITE_CONFIGS"].split(os.pathsep)], *args, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    parameterized.parameterized.expand = expand
    testing._get_config_directory = lambda: str(CONFIGS)
