"""Exports run beside torch, of every registered model: the same answers, and nothing deeper run."""

import threading

import numpy as np
import pytest
import torch
from small_models import CountedRows
from traced_models import SIZE, SMALL, between, traced

import exit_plugins.timm
from exit_plugins import AdaptiveModel, ExitPolicy, collect_exits, exit_latency
from exit_plugins.exits import export
from exit_plugins.exits.confidence import confidence
from exit_plugins.exits.export import writing
from exit_plugins.exits.export.openvino_runtime import openvino_core

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

REGISTERED = [name for name in exit_plugins.timm.list_models(clips=False) if name.endswith("_test")]


@pytest.fixture(scope="module", params=[*SMALL, *REGISTERED])
def all_exports(request, tmp_path_factory):
    """Model, images, every exit's logits, and its three exports."""
    model, images, segments = traced(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "onnx_segments", lambda *_: segments)
        size = images.shape[1:]
        with torch.no_grad():
            logits = torch.stack(model.forward_exits(images))
        policy = ExitPolicy(between(confidence(logits), 10))
        export.export_segments(model, policy, folder / "onnx", size)
        export.export_segments(model, policy, folder / "openvino", size, runtime="openvino")
        graph = export.export_graph(model, policy, folder / "graph.onnx", size)
    return model, images, logits, folder, graph, policy


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_segments_answer_like_torch(all_exports, runtime):
    model, images, logits, folder, _, policy = all_exports
    adaptive = export.ExportedAdaptiveModel(folder / runtime)
    assert adaptive.policy.thresholds.tolist() == policy.thresholds.tolist()
    segments = adaptive.model
    for size in (1, 5, 24):
        for mine, theirs in zip(segments.forward_exits(images[:size]), logits[:, :size], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
        with CountedRows(segments) as counted:
            out = adaptive(images[:size])
        expected = AdaptiveModel(model, policy)(images[:size])
        assert torch.equal(out.exit_index, expected.exit_index)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-5)
        assert counted.rows == [int((out.exit_index >= k).sum()) for k in range(model.num_exits)]
    # Two states of one segment at a time do not disturb each other.
    first = segments.forward_exit(0, segments.begin_exits(images[:4]))[1]
    segments.forward_exit(0, segments.begin_exits(images[4:8]))
    mine = segments.forward_exit(1, first)[0]
    torch.testing.assert_close(mine, logits[1, :4], atol=1e-4, rtol=1e-5)


def test_one_file_lets_samples_leave_inside(all_exports):
    model, images, logits, _, graph, policy = all_exports
    sure = confidence(logits)
    last = model.num_exits - 1
    for size in (1, 5, 24):
        expected = AdaptiveModel(model, policy)(images[:size])
        out = graph(images[:size])
        assert torch.equal(out.exit_index, expected.exit_index)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(out.confidence, expected.confidence, atol=1e-4, rtol=0)
        for thresholds in (between(sure, 3), between(sure, 20), [float("inf")] * last + [0], [-1.0] * (last + 1)):
            other = graph(images[:size], thresholds)
            assert other.exit_index.tolist() == ExitPolicy(thresholds).choose(sure[:, :size].numpy()).tolist()
            chosen = logits[other.exit_index, torch.arange(size)]
            torch.testing.assert_close(other.logits, chosen, atol=1e-4, rtol=1e-5)
    sick = images[:3].clone()
    sick[1] = float("nan")
    assert graph(sick, [-1.0] * (last + 1)).exit_index.tolist() == [0, last, 0]


def test_openvino_runs_the_one_file_too(all_exports):
    pytest.importorskip("openvino")
    model, images, _, folder, _, policy = all_exports
    compiled = openvino_core().compile_model(folder / "graph.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in (1, 24):
        result = compiled({"images": images[:size].numpy()})
        expected = AdaptiveModel(model, policy)(images[:size])
        assert result["exit_index"].tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(result["logits"], expected.logits.numpy(), atol=1e-4, rtol=1e-5)


def test_everything_that_takes_a_model_takes_an_export(folder):
    model, images, _ = traced("conv")
    loader = [(images[:9], torch.arange(9) % 5), (images[9:], torch.arange(15) % 5)]
    mine = collect_exits(export.ExportedSegments(folder, threads=1), loader, progress=False)
    theirs = collect_exits(model, loader, progress=False)
    np.testing.assert_allclose(mine.confidence, theirs.confidence, atol=1e-4)
    assert (mine.prediction == theirs.prediction).all() and (mine.target == theirs.target).all()
    assert exit_latency(export.ExportedSegments(folder), images, repeats=2).shape == (3,)


def test_nan_images_and_empty_batches(folder):
    _, images, _ = traced("conv")
    adaptive = export.ExportedAdaptiveModel(folder, ExitPolicy([-1, -1, 0]))
    assert adaptive(images[:0]).logits.shape == (0, 5)
    sick = images[:3].clone()
    sick[1] = float("nan")
    with pytest.warns(RuntimeWarning, match="1 of 3 samples"):
        assert adaptive(sick).exit_index.tolist() == [0, 2, 0]


def test_torch_leaves_the_cores_to_the_runtime(folder, monkeypatch):
    adaptive = export.ExportedAdaptiveModel(folder)
    forward_exit, mine, others = adaptive.model.forward_exit, [], []

    def spy(*state):
        mine.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        other.start()
        other.join()
        return forward_exit(*state)

    monkeypatch.setattr(adaptive.model, "forward_exit", spy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        adaptive(torch.randn(2, *SIZE))
        assert set(mine) == {1} and set(others) == {2} and torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="this export takes images"):
            adaptive(torch.randn(2, 3, 8, 8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
