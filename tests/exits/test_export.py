"""Exports run beside torch: the same answers, nothing deeper run, nothing wrong written."""

import functools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_models import ConvExits, CountedRows, NestedExits, settle

import exit_plugins.timm
from exit_plugins import AdaptiveModel, ExitPolicy, collect_exits, exit_latency
from exit_plugins.exits import export
from exit_plugins.exits.confidence import confidence
from exit_plugins.exits.policy import describe_model, weights_digest

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

REGISTERED = [name for name in exit_plugins.timm.list_models(clips=False) if name.endswith("_test")]
SMALL = {"conv": ConvExits, "nested": NestedExits}
SIZE = (3, 32, 32)


@functools.cache
def traced(name: str):
    """Model, images, and its segments in ONNX: tracing takes most of an export's time and serves every path."""
    torch.manual_seed(0)
    model = SMALL[name]() if name in SMALL else timm.create_model(name, num_classes=5)
    size = SIZE if name in SMALL else model.pretrained_cfg["input_size"]
    images = torch.randn(24, *size) * torch.rand(24, 1, 1, 1) * 3
    settle(model, images)
    inference_form = export.inference_copy(export._prepared(model, nobody(model)))
    return model, images, list(export._onnx_segments(inference_form, images))


def nobody(model) -> ExitPolicy:
    return ExitPolicy([float("inf")] * model.num_exits)


def between(sure: torch.Tensor, rank: int) -> list[float]:
    """Thresholds between the samples' confidences."""
    ordered = sure.sort(1).values
    return [float((row[rank] + row[rank + 1]) / 2) for row in ordered]


@pytest.fixture(scope="module", params=[*SMALL, *REGISTERED])
def exported(request, tmp_path_factory):
    """Model, images, every exit's logits, and its three exports."""
    model, images, segments = traced(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_onnx_segments", lambda *_: segments)
        size = images.shape[1:]
        with torch.no_grad():
            logits = torch.stack(model.forward_exits(images))
        policy = ExitPolicy(between(confidence(logits), 10))
        export.export_segments(model, policy, folder / "onnx", size)
        export.export_segments(model, policy, folder / "openvino", size, format="openvino")
        graph = export.export_graph(model, policy, folder / "graph.onnx", size)
    return model, images, logits, folder, graph, policy


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_segments_answer_like_torch(exported, runtime):
    model, images, logits, folder, _, policy = exported
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


def test_one_file_lets_samples_leave_inside(exported):
    model, images, logits, _, graph, policy = exported
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


def test_openvino_runs_the_one_file_too(exported):
    openvino = pytest.importorskip("openvino")
    model, images, _, folder, _, policy = exported
    compiled = openvino.compile_model(folder / "graph.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in (1, 24):
        result = compiled({"images": images[:size].numpy()})
        expected = AdaptiveModel(model, policy)(images[:size])
        assert result["exit_index"].tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(result["logits"], expected.logits.numpy(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("measure", ["max_softmax", "entropy", "margin"])
def test_measures_and_temperatures_are_in_the_file(measure, tmp_path, monkeypatch):
    model, images, segments = traced("nested")
    monkeypatch.setattr(export, "_onnx_segments", lambda *_: segments)
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
    monkeypatch.setattr(export, "_onnx_segments", lambda *_: segments)
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
    monkeypatch.setattr(export, "_onnx_segments", lambda *_: segments)
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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An ONNX export of the convolutional model, and quick exports of it."""
    model, _, segments = traced("conv")
    monkeypatch.setattr(export, "_onnx_segments", lambda *_: segments)
    export.export_segments(model, nobody(model), tmp_path / "export", SIZE)
    return tmp_path / "export"


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


def test_int8(folder, tmp_path):
    model, images, _ = traced("conv")
    report = export.quantize_segments(folder, tmp_path / "int8", images.split(8))
    quantised = export.ExportedSegments(tmp_path / "int8")
    assert quantised.manifest["precision"] == "int8" and quantised.manifest["quantisation"] == report
    with torch.no_grad():
        before, after = torch.stack(model.forward_exits(images)), torch.stack(quantised.forward_exits(images))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=0.1 * float(before.abs().max()), rtol=0)
    same = (before.argmax(2) == after.argmax(2)).float().mean(1)
    np.testing.assert_allclose(report["agreement"], same, atol=1e-6)
    assert export.ExportedAdaptiveModel(tmp_path / "int8")(images).logits.shape == (24, 5)
    with pytest.raises(ValueError, match="needs images"):
        export.quantize_segments(folder, tmp_path / "other", [])


@pytest.mark.parametrize("wrong", ["logits", "state"])
def test_an_export_that_differs_is_not_written(folder, tmp_path, monkeypatch, wrong):
    model, _, _ = traced("conv")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    right = export._onnx_session

    def slightly_wrong(path, *args):
        session = right(path, *args)
        at = 0 if wrong == "logits" else 1

        def run(leaves):
            results = session(leaves)
            if len(results) > at:
                results[at] = results[at] + 1e-2
            return results

        return export._Session(session.inputs, run)

    monkeypatch.setattr(export, "_onnx_session", slightly_wrong)
    with pytest.raises(RuntimeError, match="differs from torch by .* it was not written"):
        export.export_segments(model, nobody(model), folder, SIZE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]

    monkeypatch.setattr(
        export.GraphRunner, "__call__", lambda self, images, thresholds: AdaptiveModel(model, nobody(model))(images)
    )
    with pytest.raises(RuntimeError, match="leave elsewhere than torch does .* it was not written"):
        export.export_graph(model, nobody(model), tmp_path / "model.onnx", SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def rewrite(folder, change) -> None:
    document = json.loads((folder / "export.json").read_text())
    change(document)
    (folder / "export.json").write_text(json.dumps(document))


def move_out(folder, name: str) -> None:
    """The first segment, under a name that leads out of the folder."""
    outside = Path(folder, name)
    (folder / "segment_0.onnx").rename(outside)

    def change(document):
        document["segments"][0] = name
        document["files"][name] = document["files"].pop("segment_0.onnx")

    rewrite(folder, change)


def link_out(folder) -> None:
    (folder / "segment_0.onnx").rename(folder.parent / "real.onnx")
    (folder / "segment_0.onnx").symlink_to("../real.onnx")


def append(folder, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: move_out(f, "../out.onnx"), "'../out.onnx', which does not lie in the folder"),
        (lambda f: move_out(f, str(f.parent / "out.onnx")), "out.onnx', which does not lie in the folder"),
        (link_out, "segment_0.onnx is missing or not the file that was exported"),
        (lambda f: append(f, "policy.json"), "policy.json is missing or not the file that was exported"),
        (lambda f: (f / "policy.json").unlink(), "policy.json is missing"),
        (lambda f: append(f, "segment_1.onnx"), "segment_1.onnx is missing or not the file"),
        (lambda f: rewrite(f, lambda d: d["files"].pop("policy.json")), "no digest of policy.json"),
        (lambda f: rewrite(f, lambda d: d.update(version=2.0)), "it has version 2.0"),
        (lambda f: rewrite(f, lambda d: d.update(version=True)), "it has version True"),
        (lambda f: rewrite(f, lambda d: d["segments"].pop()), "lists 2 segments of a model with 3 exits"),
        (lambda f: rewrite(f, lambda d: d.update(input_size=[3, "32", 32])), "'input_size'"),
        (lambda f: rewrite(f, lambda d: d.update(segments="abc")), "must be a list of files"),
        (lambda f: rewrite(f, lambda d: d.update(runtime="tflite")), "one of onnx, openvino"),
        (lambda f: rewrite(f, lambda d: d.update(note=1)), r"unknown \['note'\]"),
        (lambda f: rewrite(f, lambda d: d.pop("torch")), r"lacks \['torch'\]"),
        (lambda f: (f / "export.json").write_text('{"format": 1, "format": 2}'), "'format' comes twice"),
    ],
)
def test_what_is_not_as_it_was_exported_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        export.ExportedSegments(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_beside_a_network_belong_to_its_digest(tmp_path, monkeypatch):
    model, _, segments = traced("conv")
    monkeypatch.setattr(export, "_onnx_segments", lambda *_: segments)
    export.export_segments(model, nobody(model), tmp_path / "out", SIZE, format="openvino")
    weights = tmp_path / "out" / "segment_1.bin"
    spoiled = bytearray(weights.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    weights.write_bytes(spoiled)
    with pytest.raises(ValueError, match="segment_1.bin is missing or not the file that was exported"):
        export.ExportedSegments(tmp_path / "out")


def test_replacing_an_export_removes_its_files_and_keeps_the_users(folder, monkeypatch):
    model, _, segments = traced("conv")
    (folder / "notes.txt").write_text("keep me")
    monkeypatch.setattr(export, "_onnx_segments", lambda *_: segments)
    export.export_segments(model, nobody(model), folder, SIZE, format="openvino")
    kinds = sorted(path.suffix for path in folder.iterdir())
    assert kinds == [".bin"] * 3 + [".json"] * 2 + [".txt"] + [".xml"] * 3
    assert (folder / "notes.txt").read_text() == "keep me" and [p.name for p in folder.parent.iterdir()] == ["export"]


def test_an_export_knows_its_model_and_weights(folder, tmp_path):
    model, images, _ = traced("conv")
    exported = export.ExportedSegments(folder)
    assert describe_model(exported) == describe_model(model) and weights_digest(exported) == weights_digest(model)
    export.quantize_segments(folder, tmp_path / "int8", [images[:8]])
    assert weights_digest(export.ExportedSegments(tmp_path / "int8")) != weights_digest(model)


def test_clear_errors(folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    policy = nobody(model)
    with pytest.raises(ValueError, match="unknown export format 'tflite'; choose one of onnx, openvino"):
        export.export_segments(model, policy, tmp_path / "new", SIZE, format="tflite")
    with pytest.raises(ValueError, match="call model.float"):
        export.export_segments(ConvExits().double(), policy, tmp_path / "new", SIZE)
    with pytest.raises(ValueError, match="4 thresholds"):
        export.export_segments(model, ExitPolicy([0.5] * 4), tmp_path / "new", SIZE)
    with pytest.raises(ValueError, match="4 thresholds"):
        export.ExportedAdaptiveModel(folder, ExitPolicy([0.5] * 4))
    with pytest.raises(ValueError, match=r"images of shape \(batch, 3, 32, 32\), got \(2, 4, 32, 32\)"):
        export.ExportedAdaptiveModel(folder)(torch.randn(2, 4, 32, 32))
    with pytest.raises(ValueError, match="a choice of OpenVINO"):
        export.ExportedSegments(folder, bfloat16=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not an export; name a new folder"):
        export.export_segments(model, policy, tmp_path / "mine", SIZE)
    with pytest.raises(FileNotFoundError, match="no export in"):
        export.ExportedSegments(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no exported graph"):
        export.GraphRunner(tmp_path / "none.onnx")
    file = folder / "segment_1.onnx"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="missing or not the file that was exported"):
        export.ExportedSegments(folder)
    (folder / "export.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable export"):
        export.ExportedSegments(folder)

    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(export, "import_module", missing)
    with pytest.raises(ImportError, match="needs onnx, which is not installed: pip install 'exit-plugins.export.'"):
        export.export_graph(model, policy, tmp_path / "new", SIZE)
    assert not (tmp_path / "new").exists()


def test_a_batch_size_frozen_by_the_model_is_refused(tmp_path):
    class Frozen(ConvExits):
        def forward_exit(self, index, state):
            logits, state = super().forward_exit(index, state)
            return logits, state.reshape(len(state), *state.shape[1:])

    with pytest.raises(ValueError, match=r"cannot be exported with a free batch size: .*write x.shape\[0\]"):
        export.export_segments(Frozen().eval(), nobody(Frozen()), tmp_path / "new", SIZE)
    assert not list(tmp_path.iterdir())
