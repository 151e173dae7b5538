"""Exports in a lower precision: near what they were made from, held to a bound on accuracy, known as what they are."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from traced_models import SIZE, nobody, traced

from exit_plugins import ExitPolicy, ExitTable, collect_exits, solve_thresholds
from exit_plugins.exits import export
from exit_plugins.exits.digests import sample_digests, weights_digest
from exit_plugins.exits.export import quantization, quantizers, writing
from exit_plugins.exits.policy import describe_model

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

COSTS = [1.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def openvino_export(tmp_path_factory):
    """An OpenVINO export of the convolutional model, whose policy was solved for a budget."""
    model, _, segments = traced("conv")
    folder = tmp_path_factory.mktemp("exported") / "openvino"
    policy = solve_thresholds(collect_exits(model, held_out(model), progress=False), COSTS, budget=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "onnx_segments", lambda *_: segments)
        export.export_segments(model, policy, folder, SIZE, runtime="openvino")
    return folder


@pytest.fixture
def openvino_folder(openvino_export, tmp_path):
    """A copy of it."""
    return shutil.copytree(openvino_export, tmp_path / "openvino")


def held_out(model, count: int = 64):
    """Images the model answers rightly at its last exit, three quarters of the time."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, *SIZE, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 3
    with torch.no_grad():
        target = model.forward_exits(images)[-1].argmax(1)
    target[::4] = (target[::4] + 1) % 5
    return list(zip(images.split(24), target.split(24), strict=True))


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_int8(runtime, request, tmp_path):
    if runtime == "openvino":
        pytest.importorskip("nncf")
    folder = request.getfixturevalue("folder" if runtime == "onnx" else "openvino_folder")
    model, images, _ = traced("conv")
    report = export.quantize_segments(folder, tmp_path / "int8", images.split(9))
    quantised = export.ExportedSegments(tmp_path / "int8")
    assert quantised.manifest["precision"] == "int8" and quantised.manifest["quantisation"] == report
    assert quantised.manifest["runtime"] == runtime
    with torch.no_grad():
        before, after = torch.stack(model.forward_exits(images)), torch.stack(quantised.forward_exits(images))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=0.1 * float(before.abs().max()), rtol=0)
    same = (before.argmax(2) == after.argmax(2)).float().mean(1)
    np.testing.assert_allclose(report["agreement"], same, atol=1e-6)
    assert export.ExportedAdaptiveModel(tmp_path / "int8")(images).logits.shape == (24, 5)
    # Whatever their order, the images are known by one digest; weights by what the files hold.
    digest = hashlib.sha256(np.sort(sample_digests(images)).tobytes()).hexdigest()
    assert report["calibration"] == {"count": 24, "sha256": digest}
    assert weights_digest(quantised) not in (weights_digest(model), weights_digest(export.ExportedSegments(folder)))


def test_openvino_computes_in_int8_and_stays_quiet(openvino_folder, tmp_path, capfd):
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    _, images, _ = traced("conv")
    export.quantize_segments(openvino_folder, tmp_path / "int8", [images])
    assert capfd.readouterr().out == ""
    for index in range(3):
        operations = openvino.Core().read_model(tmp_path / "int8" / f"segment_{index}.xml").get_ops()
        quantised = [op for op in operations if op.get_type_name() == "FakeQuantize"]
        stored = [op for op in operations if op.get_element_type().get_type_name() == "i8"]
        assert quantised and stored


def test_ranges_come_from_the_states_that_reach_a_segment(openvino_folder, tmp_path, monkeypatch):
    _, images, _ = traced("conv")
    float_export = export.ExportedSegments(openvino_folder)
    fed = []

    def copied(source, target, feeds, weights_only):
        fed.append(feeds)
        for suffix in (".xml", ".bin"):
            target.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())

    monkeypatch.setitem(quantizers.QUANTIZERS, "openvino", copied)
    export.quantize_segments(openvino_folder, tmp_path / "out", images.split(10))
    state = float_export.begin_exits(images)
    for index in range(3):
        for name, leaf in zip(("leaf_0", "leaf_1"), state, strict=False):
            assert [len(feed[name]) for feed in fed[index]] == [10, 10, 4]
            np.testing.assert_allclose(np.concatenate([feed[name] for feed in fed[index]]), leaf, atol=1e-5)
        _, state = float_export.forward_exit(index, state)


def test_thresholds_are_solved_again_for_the_same_budget(openvino_folder, tmp_path):
    pytest.importorskip("nncf")
    model, images, _ = traced("conv")
    loader = held_out(model)
    report = export.quantize_segments(
        openvino_folder, tmp_path / "int8", [(images, None)], held_out=loader, max_drop=1.0
    )
    quantised = export.ExportedAdaptiveModel(tmp_path / "int8")
    table = collect_exits(quantised.model, loader, progress=False)
    kept = ExitTable.load(tmp_path / "int8" / "table.npz")
    np.testing.assert_array_equal(kept.prediction, table.prediction)
    solving, testing = kept.split(0.5)
    expected = solve_thresholds(solving, COSTS, budget=2.0)
    assert quantised.policy.thresholds.tolist() == expected.thresholds.tolist()
    assert quantised.policy.source["target"] == {"budget": 2.0}
    assert quantised.policy.model["weights"] == weights_digest(quantised.model)
    assert report["budget"] == 2.0 and report["samples"] == 64
    np.testing.assert_allclose(report["accuracy_int8"], table.correct.mean(1))
    # By running it: what the policy gets on the half it was not solved on.
    out = torch.cat([quantised(batch).logits for batch, _ in loader]).argmax(1).numpy()
    right = np.isin(table.sample, testing.sample)
    assert report["under_policy"]["int8"] == pytest.approx((out == table.target)[right].mean())
    before = collect_exits(model, loader, progress=False).correct[-1]
    fall = report["at_last_exit"]
    assert fall["float32"] == 0.75 == before.mean()
    assert fall["drop"] == pytest.approx(0.75 - table.correct[-1].mean())
    assert fall["interval"][0] <= fall["drop"] <= fall["interval"][1]


def test_a_policy_without_costs_keeps_its_shares(openvino_folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    loader = held_out(model)
    table = collect_exits(model, loader, progress=False)
    middle = [*np.median(table.confidence[:2], axis=1), 0]
    rewritten(openvino_folder, ExitPolicy(middle, model=describe_model(model), max_exit=1))
    monkeypatch.setitem(quantizers.QUANTIZERS, "openvino", spoiling(0.0))
    report = export.quantize_segments(openvino_folder, tmp_path / "out", [images], held_out=loader, max_drop=1.0)
    solving, _ = table.split(0.5)
    wanted = np.bincount(ExitPolicy(middle, max_exit=1).choose(solving.confidence), minlength=3)
    again = export.ExportedAdaptiveModel(tmp_path / "out").policy
    assert np.bincount(again.choose(solving.confidence), minlength=3).tolist() == wanted.tolist()
    assert again.max_exit == 1 and again.costs is None and report["budget"] is None


def test_an_export_that_loses_accuracy_is_not_written(openvino_folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    (tmp_path / "int8").mkdir()
    monkeypatch.setitem(quantizers.QUANTIZERS, "openvino", spoiling(1.0))
    options = dict(held_out=held_out(model), max_drop=0.05)
    with pytest.raises(RuntimeError, match=r"int8 was not written: at last exit .* from 75.00% .* allows 5.00"):
        export.quantize_segments(openvino_folder, tmp_path / "int8", [images], **options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "openvino"] == ["int8"]
    assert not any((tmp_path / "int8").iterdir())
    assert export.ExportedAdaptiveModel(openvino_folder)(images).logits.shape == (24, 5)


def test_bfloat16_is_a_precision_of_its_own(openvino_folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    asked = {"precision": "bfloat16", "held_out": held_out(model), "max_drop": 1.0}
    monkeypatch.setattr(quantization, "openvino_core", lambda: Processor(["FP32"]))
    with pytest.raises(ValueError, match="this processor does not compute in bfloat16"):
        export.quantize_segments(openvino_folder, tmp_path / "lower", [images], **asked)
    monkeypatch.setattr(quantization, "openvino_core", lambda: Processor(["FP32", "BF16"]))
    report = export.quantize_segments(openvino_folder, tmp_path / "lower", [images], **asked)
    opened = []
    monkeypatch.setattr(export.exported, "openvino_session", lambda *given: opened.append(given[2]))
    for folder, bfloat16, expected in (("lower", None, True), ("lower", False, False), ("openvino", None, False)):
        opened.clear()
        export.ExportedSegments(tmp_path / folder, bfloat16=bfloat16)
        assert opened == [expected] * 3
    assert report["samples"] == 64 and min(report["agreement"]) > 0.8
    lower = json.loads((tmp_path / "lower" / "export.json").read_text())
    assert lower["precision"] == "bfloat16" and lower["model"]["weights"] != weights_digest(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "needs images"),
        ({"batches": [torch.full((2, *SIZE), float("nan"))]}, "NaN or infinite"),
        ({"batches": [torch.zeros(2, 3, 8, 8)]}, "this export takes images"),
        ({"precision": "int4"}, "choose one of int8, bfloat16"),
        ({"precision": "bfloat16"}, "choice of OpenVINO"),
        ({"max_drop": -0.1}, "max_drop is a share"),
        ({"destination": "export"}, "is the float32 export itself"),
        ({"held_out": [(torch.zeros(1, *SIZE), torch.zeros(1, dtype=torch.long))]}, "held_out needs images"),
    ],
)
def test_what_cannot_be_is_said(folder, tmp_path, monkeypatch, options, message):
    _, images, _ = traced("conv")
    monkeypatch.setitem(quantizers.QUANTIZERS, "onnx", lambda a, b, *_: b.write_bytes(a.read_bytes()))
    given = {"batches": [images], "destination": "other", **options}
    with pytest.raises(ValueError, match=message):
        export.quantize_segments(folder, tmp_path / given.pop("destination"), given.pop("batches"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_shuffled_loader_and_a_lower_precision_are_no_start(folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    monkeypatch.setitem(quantizers.QUANTIZERS, "onnx", lambda a, b, *_: b.write_bytes(a.read_bytes()))

    class Shuffled:
        batches = held_out(model)

        def __iter__(self):
            self.batches = self.batches[::-1]
            return iter(self.batches)

    with pytest.raises(ValueError, match="other images each time"):
        export.quantize_segments(folder, tmp_path / "int8", [images], held_out=Shuffled())
    export.quantize_segments(folder, tmp_path / "int8", [images])
    with pytest.raises(ValueError, match="is in int8 already"):
        export.quantize_segments(tmp_path / "int8", tmp_path / "twice", [images])


def test_nobody_early_stays_nobody_early(folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    monkeypatch.setitem(quantizers.QUANTIZERS, "onnx", lambda a, b, *_: b.write_bytes(a.read_bytes()))
    export.quantize_segments(folder, tmp_path / "int8", [images], held_out=held_out(model))
    assert (
        export.ExportedAdaptiveModel(tmp_path / "int8").policy.thresholds.tolist() == nobody(model).thresholds.tolist()
    )


class Processor:
    """OpenVINO's ``Core`` on a processor of these capabilities."""

    def __init__(self, able: list[str]) -> None:
        self.able = able

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.able


def spoiling(share: float):
    """A quantiser that copies a segment, and turns its weights round in ``share`` of the file."""

    def quantize(source, target, feeds, weights_only):
        target.with_suffix(".xml").write_bytes(source.with_suffix(".xml").read_bytes())
        weights = np.frombuffer(source.with_suffix(".bin").read_bytes(), np.uint8).copy()
        changed = weights[: int(share * len(weights)) // 4 * 4].view(np.float32)
        changed[np.abs(changed) > 1e-3] *= -1
        target.with_suffix(".bin").write_bytes(weights.tobytes())

    return quantize


def rewritten(folder, policy) -> None:
    """Another policy in an export, as if it had been exported with it."""
    policy.save(folder / "policy.json")
    document = json.loads((folder / "export.json").read_text())
    document["files"]["policy.json"] = hashlib.sha256((folder / "policy.json").read_bytes()).hexdigest()
    (folder / "export.json").write_text(json.dumps(document))
