"""The demo leaves what it promises, and says in one line what it cannot use."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import load_file

import exit_plugins

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(DEMO), *args], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_demo_leaves_a_model_a_policy_a_report_and_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for shade, name in ((60, "dark"), (190, "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.clip(rng.normal(shade, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    done = run("--data", "data", "--model", "dynperceiver_test", "--epochs", "1", "--image-size", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "runs" / "demo"
    report = json.loads((output / "report.json").read_text())
    assert len(report["exits"]) == 4 and all(set(e) == {"accuracy", "macs"} for e in report["exits"])
    assert all(set(point) == {"budget", "accuracy", "macs"} for point in report["curve"])
    assert all(set(report["speedup"][b]) == {"measured", "ideal", "ideal_macs"} for b in ("batch_1", "batch_32"))
    policy = exit_plugins.ExitPolicy.load(output / "policy.json")
    model = timm.create_model("dynperceiver_test", num_classes=2)
    model.load_state_dict(load_file(output / "model.safetensors"))
    policy.check_model(model)
    assert all((output / name).stat().st_size > 1000 for name in ("curve.png", "easy_and_hard.png"))


def test_data_that_is_not_there_is_one_line(tmp_path):
    done = run("--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("demo: no data at 'nowhere'") and done.stderr.count("\n") == 1
