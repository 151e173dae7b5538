"""An export of the small convolutional model, and what every test file of this folder imports."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from traced_models import SIZE, nobody, traced

from exit_plugins.exits import export
from exit_plugins.exits.export import writing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An ONNX export of the convolutional model, and quick exports of it."""
    model, _, segments = traced("conv")
    monkeypatch.setattr(writing, "onnx_segments", lambda *_: segments)
    export.export_segments(model, nobody(model), tmp_path / "export", SIZE)
    return tmp_path / "export"


@pytest.fixture(autouse=True)
def _signal_stack():
    """What OpenVINO does to the stack for signals ends with the test: one that is left freed kills a later test."""
    before = signal_stack()
    yield
    assert signal_stack() == before


def signal_stack() -> bytes:
    """The kernel's entry of this thread's."""
    entry = (ctypes.c_byte * 24)()
    if os.name == "posix":
        ctypes.CDLL(None).sigaltstack(None, entry)
    return bytes(entry)
