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
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    num_exits = ExitPolicy.load(policy).num_exits
    assert len([entry for entry in report["written"] if entry["file"].endswith(".onnx")]) == 2 * num_exits
    assert report["int8"]["samples"] == 40
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
        (["--int8", "somewhere"], "give --runtime onnx and --data"),
        (["--num-classes", "7"], "made for num_classes 10 and the model has 7"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, policy, capsys, options, message):
    assert main(["export", "msdnet_test", "--policy", policy, "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
