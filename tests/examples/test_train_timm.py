"""The training example on a folder of coloured images: it learns, logs every exit and leaves a model timm loads."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_timm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_timm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> Path:
    """Two colours under noise, easy to tell apart: train/ and test/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "colours"


def test_trains_every_exit_and_saves_a_model_timm_loads(example, data, tmp_path):
    output = tmp_path / "run"
    common = ["--device", "cpu", "--workers", "0", "--batch-size", "8", "--output", str(output)]
    last = example.main(["--data", str(data), "--model", "dynperceiver_test", "--epochs", "3", "--amp", *common])
    with open(output / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    exits = [key for key in rows[0] if key.startswith("eval_top1_exit")]
    assert exits == [f"eval_top1_exit{k}" for k in (1, 2, 3, 4)]
    assert max(last[f"top1_exit{k}"] for k in (1, 2, 3, 4)) > 80
    assert "exit 4" in (output / "model" / "README.md").read_text()

    # The saved model answers as the metrics say.
    model = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True).eval()
    assert model.num_classes == 2
    checkpoint = timm.create_model("dynperceiver_test", num_classes=2, checkpoint_path=output / "last.pth.tar").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), checkpoint(x))


def test_one_clear_line_for_what_cannot_be_used(example, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no data at"):
        example.main(["--data", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="no split 'valid'"):
        example.main(["--data", str(data), "--val-split", "valid"])
    with pytest.raises(SystemExit):
        example.main(["--data", str(data), "--model", "resnet18"])
    with pytest.raises(SystemExit):
        example.main(["--data", str(data), "--exit-loss", "unheard-of"])
