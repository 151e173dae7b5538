"""The CIFAR recipe on a folder of coloured images: the files it promises, and a run resumed as if never stopped."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_cifar.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_cifar", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two colours under noise, easy to tell apart: train/ and test/."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data") / "colours"
    for split, count in (("train", 40), ("test", 10)):
        for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def command(data: Path, output: Path, *more: str) -> list[str]:
    fixed = "--model chase_test --device cpu --batch-size 16 --warmup-epochs 1 --calibration 0.2 --budgets 4"
    return ["--data", str(data), "--output", str(output), *fixed.split(), *more]


PLAIN = ["--mixup", "0", "--cutmix", "0", "--randaug", "0", "--reprob", "0", "--ema-decay", "0"]


def test_learns_and_writes_what_it_says(example, data, tmp_path, monkeypatch):
    result = example.main(command(data, tmp_path / "a", "--epochs", "6", *PLAIN))
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < history[0]["loss"]
    assert len(history[-1]["accuracy"]) == 3
    curves = json.loads((tmp_path / "a" / "curves.json").read_text())
    assert curves == json.loads(json.dumps(result))
    assert max(point["accuracy"] for point in curves["anytime"]) > 0.8
    assert len(curves["budgeted"]) == 4
    costs = curves["costs"]["macs"]
    assert [point["cost"] for point in curves["anytime"]] == costs
    assert all(costs[0] <= point["cost"] <= costs[-1] for point in curves["budgeted"])
    assert (tmp_path / "a" / "curves.png").stat().st_size > 0

    model = timm.create_model(f"local-dir:{tmp_path / 'a' / 'model'}", pretrained=True).eval()
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    torch.testing.assert_close(model.state_dict(), state["model"])

    drawn = {}
    draw = example.plots.budget_curve
    monkeypatch.setattr(
        example.plots, "budget_curve", lambda curves, *a, **k: drawn.update(curves) or draw(curves, *a, **k)
    )
    other = command(data, tmp_path / "b", "--epochs", "1", "--against", str(tmp_path / "a" / "curves.json"), *PLAIN)
    example.main(other)
    assert list(drawn) == ["b", "a"]
    assert [point.accuracy for point in drawn["a"]] == [point["accuracy"] for point in curves["budgeted"]]


def test_a_resumed_run_is_the_uninterrupted_one(example, data, tmp_path):
    # With everything random switched on: mixup, cutmix, RandAugment, erasing; and with the moving average.
    epochs = ["--epochs", "3", "--samples", "48", "--reprob", "0.5"]
    example.main(command(data, tmp_path / "whole", *epochs))
    for done in (1, 2):
        assert example.main(command(data, tmp_path / "parts", *epochs, "--minutes", "1e-9")) is None
        assert len(json.loads((tmp_path / "parts" / "history.json").read_text())) == done
    example.main(command(data, tmp_path / "parts", *epochs))
    whole, parts = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "parts"))
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0)
    with pytest.raises(ValueError, match="another --lr"):
        example.main(command(data, tmp_path / "parts", *epochs, "--lr", "0.1"))


def test_augmentation_only_mirrors_and_shifts(example):
    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    moved = example.Batches._move(images, by=2)
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    seen = set()
    for before, after in zip(images, moved, strict=True):
        found = []
        for mirrored in (False, True):
            padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
            padded[:, 2:8, 2:7] = before.flip(-1) if mirrored else before
            for top in range(5):
                for left in range(5):
                    if padded[:, top : top + 6, left : left + 5].equal(after):
                        found.append((mirrored, top, left))
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 25


def test_evaluation_batches_are_the_images_in_order(example):
    model = timm.create_model("chase_test")
    args = Namespace(batch_size=4, randaug=9, reprob=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1)
    images, target = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10)
    batches = list(example.Batches((images, target), model, args))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), (images / 255 - mean) / std)
    assert torch.cat([y for _, y in batches]).equal(target)


def test_one_clear_line_for_what_cannot_be_used(example, data, tmp_path):
    with pytest.raises(SystemExit):
        example.main(command(data, tmp_path / "x", "--batch-size", "15"))
    with pytest.raises(SystemExit):
        example.main(command(data, tmp_path / "x", "--model", "resnet18"))
    with pytest.raises(FileNotFoundError, match="no curves at"):
        example.main(command(data, tmp_path / "x", "--against", str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match="--samples"):
        example.main(command(data, tmp_path / "x", "--samples", "1000"))
    with pytest.raises(ValueError, match="--batch-size"):
        example.main(command(data, tmp_path / "x", "--batch-size", "1024"))
    assert not (tmp_path / "x").exists()
