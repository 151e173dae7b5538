"""The one file: measures, temperatures and the cap are in it, and nothing deeper runs inside."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from traced_models import SIZE, between, nobody, traced

from exit_plugins import ExitPolicy
from exit_plugins.exits import export
from exit_plugins.exits.confidence import confidence
from exit_plugins.exits.export import writing

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.mark.parametrize("measure", ["max_softmax", "entropy", "margin"])
def test_measures_and_temperatures_are_in_the_file(measure, tmp_path, monkeypatch):
    model, images, segments = traced("nested")
    monkeypatch.setattr(writing, "onnx_segments", lambda *_: segments)
    temperatures = [0.5, 2.0, 1.5, 0.7]
    with torch.no_grad():
        pairs = zip(model.forward_exits(images), temperatures, strict=True)
        sure = torch.stack([confidence(z, measure, t) for z, t in pairs])
    policy = ExitPolicy(between(sure, 12), measure=measure, temperatures=temperatures)
    out = export.export_graph(model, policy, tmp_path / "model.onnx", SIZE)(images)
    assert out.exit_index.tolist() == policy.choose(sure.numpy()).tolist()
    torch.testing.assert_close(out.confidence, sure[out.exit_index, torch.arange(24)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cap", [0, 1])
def test_no_sample_passes_the_cap_inside_the_one_file(cap, tmp_path, monkeypatch):
    model, images, segments = traced("nested")
    monkeypatch.setattr(writing, "onnx_segments", lambda *_: segments)
    policy = ExitPolicy([float("inf")] * model.num_exits, max_exit=cap)
    graph = export.export_graph(model, policy, tmp_path / "model.onnx", SIZE)
    sick = images[:4].clone()
    sick[2] = float("nan")
    for thresholds in (None, [float("inf")] * model.num_exits):
        assert graph(sick, thresholds).exit_index.tolist() == [cap] * 4
    whole = export.export_graph(model, nobody(model), tmp_path / "whole.onnx", SIZE)
    assert whole(sick).exit_index.tolist() == [model.num_exits - 1] * 4
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size


def test_nothing_deeper_runs_inside_the_one_file(tmp_path, monkeypatch):
    import onnxruntime

    model, images, segments = traced("conv")
    monkeypatch.setattr(writing, "onnx_segments", lambda *_: segments)
    export.export_graph(model, nobody(model), tmp_path / "model.onnx", SIZE)

    def ran(thresholds: list[float]) -> set[str]:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
        session.run(None, {"images": images.numpy(), "thresholds": np.float32(thresholds)})
        events = json.loads(Path(session.end_profiling()).read_text())
        names = [event["name"] for event in events if event.get("cat") == "Node"]
        return {f"segment{k}" for k in range(3) if any(f"segment{k}/" in name for name in names)}

    assert ran([2, 2, 0]) == {"segment0", "segment1", "segment2"}
    assert ran([2, -1, 0]) == {"segment0", "segment1"}
    assert ran([-1, -1, 0]) == {"segment0"}
