"""The export command, through the door users take."""

import json

import numpy as np
import pytest
import timm
import torch

import exit_plugins  # noqa: F401  registers the models
from exit_plugins import ExitPolicy
from exit_plugins.cli import main
from exit_plugins.exits import export
from exit_plugins.exits.policy import describe_model

pytest.importorskip("onnxruntime")


@pytest.fixture
def policy(tmp_path) -> str:
    model = timm.create_model("msdnet_test", num_classes=10)
    ExitPolicy([0.1] * model.num_exits, model=describe_model(model)).save(tmp_path / "policy.json")
    return str(tmp_path / "policy.json")


def test_export_and_int8_with_the_accuracy_of_both(tmp_path, policy, capsys):
    pytest.importorskip("sklearn")
    arguments = ["export", "msdnet_test", "--policy", policy, "--output", str(tmp_path / "onnx")]
    arguments += ["--int8", str(tmp_path / "int8"), "--data", "digits", "--limit", "40", "--calibration", "16"]
    assert main([*arguments, "--max-drop", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    num_exits = ExitPolicy.load(policy).num_exits
    assert len([entry for entry in report["written"] if entry["file"].endswith(".onnx")]) == 2 * num_exits
    assert report["int8"]["samples"] == 24 and report["int8"]["calibration"]["count"] == 16
    assert report["int8"]["under_policy"]["samples"] == 12 and report["int8"]["max_drop"] == 1
    for key in ("accuracy_float32", "accuracy_int8", "agreement"):
        assert len(report["int8"][key]) == num_exits and 0 <= min(report["int8"][key]) <= max(report["int8"][key]) <= 1
    images = torch.randn(3, *report["input_size"])
    for folder in ("onnx", "int8"):
        out = export.ExportedAdaptiveModel(tmp_path / folder)(images)
        assert out.logits.shape == (3, 10) and np.isfinite(out.confidence).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--single-file", "--runtime", "openvino"], "--single-file is one float32 ONNX file"),
        (["--single-file", "--int8", "somewhere"], "leave out --runtime openvino, --int8 and --bfloat16"),
        (["--int8", "somewhere"], "give --data"),
        (["--bfloat16", "somewhere", "--data", "digits"], "give --runtime openvino"),
        (["--num-classes", "7"], "made for num_classes 10 and the model has 7"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, policy, capsys, options, message):
    assert main(["export", "msdnet_test", "--policy", policy, "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_lower_precisions_that_lose_nothing_or_are_refused(tmp_path, policy, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    calls = []

    def quantize(folder, destination, batches, **options):
        count = [sum(map(len, (images for images, _ in loader))) for loader in (batches, options["held_out"])]
        calls.append((folder, destination, count, options["precision"], options["max_drop"]))
        if options["precision"] == "bfloat16":
            raise RuntimeError("bfloat16 was not written")
        fall = {"float32": 0.75, "int8": 0.7, "drop": 0.05, "interval": [0.0, 0.1], "samples": 12}
        both = {"accuracy_float32": [0.5, 0.75], "accuracy_int8": [0.5, 0.7]}
        return {"samples": 24, **both, "under_policy": fall}

    monkeypatch.setattr(export, "export_segments", lambda *_: (tmp_path / "float").mkdir(exist_ok=True))
    monkeypatch.setattr(export, "quantize_segments", quantize)
    words = ["export", "msdnet_test", "--policy", policy, "--output", str(tmp_path / "float"), "--runtime", "openvino"]
    words += ["--data", "digits", "--limit", "40", "--calibration", "16", "--max-drop", "0.1"]
    (tmp_path / "int8").mkdir()
    assert main([*words, "--int8", str(tmp_path / "int8")]) == 0
    assert "75.00% and 70.00%, a fall of 5.00 points (0.00 to 10.00, 12 images)" in capsys.readouterr().out
    assert main([*words, "--bfloat16", str(tmp_path / "bfloat16")]) == 2
    assert "bfloat16 was not written" in capsys.readouterr().err.splitlines()[-1]
    folders = [str(tmp_path / name) for name in ("float", "int8", "bfloat16")]
    assert calls == [
        (folders[0], folders[1], [16, 24], "int8", 0.1),
        (folders[0], folders[2], [16, 24], "bfloat16", 0.1),
    ]
    assert main([*words, "--int8", str(tmp_path / "int8"), "--calibration", "39"]) == 2
    assert "--calibration 39 leaves 1 of 40 images" in capsys.readouterr().err
