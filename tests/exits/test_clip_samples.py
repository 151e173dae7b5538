"""Clips through the protocol: consensus, leaving as a whole, and everything the ground floor does with samples."""

import copy
import pickle

import numpy as np
import pytest
import torch
from small_models import ConvExits, CountedRows, NestedExits, settle
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from exit_plugins import AdaptiveModel, ExitPolicy, collect_exits, exit_costs, solve_thresholds
from exit_plugins.exits import evaluate_policy, export
from exit_plugins.exits.clips import over_clips, sample_size
from exit_plugins.exits.protocol import select_samples

FRAMES = 3


def clips(count: int = 6) -> Tensor:
    return torch.randn(count, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def between(confidences: Tensor | np.ndarray) -> float:
    """A threshold that half of them reach, and none equals."""
    row = np.sort(np.asarray(confidences))
    return float(row[len(row) // 2 - 1 : len(row) // 2 + 1].mean())


@pytest.fixture(params=[ConvExits, NestedExits])
def models(request) -> tuple[nn.Module, nn.Module]:
    """A network of images, and the same over clips."""
    model = settle(request.param(), clips().flatten(0, 1))
    return model, over_clips(copy.deepcopy(model), FRAMES)


@torch.no_grad()
def test_a_clip_is_answered_by_the_mean_of_its_frames(models):
    images, model = (m.double() for m in models)
    x = clips().double()
    for found, expected in zip(
        model.forward_exits(x), zip(*(images.forward_exits(clip) for clip in x), strict=True), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(expected).mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), model.forward_exits(x)[-1])
    assert list(model.state_dict()) == list(images.state_dict())
    model.load_state_dict(images.state_dict())


@torch.no_grad()
def test_clips_leave_as_a_whole(models):
    _, model = models
    x = clips()
    whole = model.forward_exits(x)
    state = model.begin_exits(x)
    _, state = model.forward_exit(0, state)
    assert all(leaf.shape[:2] == (6, FRAMES) for leaf in torch.utils._pytree.tree_leaves(state))
    logits, _ = model.forward_exit(1, select_samples(state, torch.tensor([4, 1])))
    torch.testing.assert_close(logits, whole[1][[4, 1]], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_costs_tables_policies_and_adaptive_runs_take_clips(models):
    images, model = models
    size = sample_size(model, (3, 32, 32))
    assert size == (FRAMES, 3, 32, 32) and sample_size(images, (3, 32, 32)) == (3, 32, 32)
    costs = exit_costs(model, size)
    np.testing.assert_allclose(costs.macs, FRAMES * exit_costs(images, (3, 32, 32)).macs)
    x, target = clips(24), torch.arange(24) % 5
    table = collect_exits(model, DataLoader(TensorDataset(x, target), 8))
    solved = solve_thresholds(table, costs.macs, budget=float(costs.macs[:2].mean()))
    assert evaluate_policy(solved, table, costs.macs).cost <= costs.macs[:2].mean()
    policy = ExitPolicy([between(row) for row in table.confidence])
    leaves = policy.choose(table.confidence)
    assert len(set(leaves)) > 1
    adaptive = AdaptiveModel(model, policy)
    with CountedRows(adaptive.runner) as counted:
        out = adaptive(x)
    np.testing.assert_array_equal(out.exit_index, leaves)
    np.testing.assert_array_equal(out.logits.argmax(1), table.prediction[leaves, np.arange(24)])
    assert counted.rows == [int((leaves >= k).sum()) for k in range(model.num_exits)]
    times = AdaptiveModel(model, policy).time_segments(x, repeats=1)
    assert times.segment.shape[0] == model.num_exits


@torch.no_grad()
@pytest.mark.slow
def test_compiled_and_exported_segments_take_clips(tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (the extra export)")
    model = over_clips(settle(ConvExits(), clips().flatten(0, 1)), FRAMES)
    x = clips()
    expected = model.forward_exits(x)
    policy = ExitPolicy([between(logits.softmax(1).amax(1)) for logits in expected])
    plain = AdaptiveModel(model, policy)(x)
    assert 0 < int((plain.exit_index == 0).sum()) < len(x)
    torch._dynamo.reset()
    size = (FRAMES, 3, 32, 32)
    for other in (
        AdaptiveModel(model, policy, compile=True),
        export.export_segments(model, policy, tmp_path / "onnx", size),
        export.export_segments(model, policy, tmp_path / "openvino", size, "openvino"),
        export.export_graph(model, policy, tmp_path / "whole.onnx", size),
    ):
        out = other(x)
        assert torch.equal(out.exit_index, plain.exit_index)
        torch.testing.assert_close(out.logits, plain.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"input_size is \(frames, channels, height, width\)"):
        export.export_graph(model, policy, tmp_path / "images.onnx", (3, 32, 32))
    exported = export.ExportedAdaptiveModel(tmp_path / "onnx")
    with pytest.raises(ValueError, match=r"\(batch, frames, channels, height, width\)"):
        exported(x[:, 0])


@torch.no_grad()
def test_a_network_without_exits_has_one():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = over_clips(copy.deepcopy(network), FRAMES)
    x = clips()
    expected = torch.stack([network(clip).mean(0) for clip in x])
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.train()(x), expected)
    assert model.num_exits == 1 and len(model.forward_exits(x)) == 1
    assert exit_costs(model, (FRAMES, 3, 32, 32)).macs.shape == (1,)


@torch.no_grad()
def test_copies_and_pickles(models):
    _, model = models
    x = clips()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert all(map(torch.equal, other.forward_exits(x), model.forward_exits(x)))


def test_training_returns_every_exit(models):
    _, model = models
    outputs = model.train()(clips())
    assert [tuple(logits.shape) for logits in outputs] == [(6, 5)] * model.num_exits


def test_what_is_no_clip_is_refused(models):
    _, model = models
    for wrong in (clips().flatten(0, 1), clips()[0], clips()[:, :2]):
        with pytest.raises(ValueError, match=r"expected clips \(batch, 3, channels, height, width\), got shape"):
            model.forward_exits(wrong)
    with pytest.raises(ValueError, match="num_frames=2"):
        model(clips()[:, :2])
    with pytest.raises(ValueError, match="takes clips of 3 frames already"):
        over_clips(model, 3)
    with pytest.raises(ValueError, match="positive number of frames"):
        over_clips(ConvExits(), 0)
    with pytest.raises(ValueError, match=r"input_size is \(frames, channels, height, width\)"):
        exit_costs(model, (3, 32, 32))
    with pytest.raises(ValueError, match=r"\(batch, frames, channels, height, width\)"):
        AdaptiveModel(model, ExitPolicy([0.5] * model.num_exits))(clips()[0])


def test_a_table_of_clips_goes_on_from_its_part_file(tmp_path):
    model = over_clips(settle(ConvExits(), clips().flatten(0, 1)), FRAMES)
    data, part = TensorDataset(clips(12), torch.arange(12) % 5), tmp_path / "t.part"

    class Interrupted(DataLoader):
        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                if index == 2:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        collect_exits(model, Interrupted(data, 4), part_file=part)
    seen = part.stat().st_size
    with CountedRows(model) as rows:
        table = collect_exits(model, DataLoader(data, 4), part_file=part)
    assert seen > 0 and rows.rows[0] == 4
    assert table.digest() == collect_exits(model, DataLoader(data, 4)).digest()
