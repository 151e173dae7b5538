"""An export of the small convolutional model, and what every test file of this folder imports."""

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
