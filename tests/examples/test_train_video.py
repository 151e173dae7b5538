"""The training example on clips: it learns order, goes on where it stopped, and reads its recipe."""

import argparse
import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(FOLDER))

import train_video  # noqa: E402

from exit_plugins.timm.video import shifts_of  # noqa: E402


@pytest.fixture
def data(tmp_path) -> Path:
    """Frame folders that get brighter or darker: the same frames in two orders."""
    rng = np.random.default_rng(0)
    lists = {"train": [], "val": []}
    for split, count in (("train", 16), ("val", 8)):
        for i in range(count):
            folder = tmp_path / "frames" / f"{split}{i}"
            folder.mkdir(parents=True)
            levels = np.sort(rng.uniform(0, 255, 4))[:: 1 if i % 2 else -1]
            for t, level in enumerate(levels, 1):
                Image.fromarray(np.full((32, 32, 3), int(level), np.uint8)).save(folder / f"{t:05d}.jpg")
            lists[split].append(f"frames/{split}{i} 4 {i % 2}")
        (tmp_path / f"{split}_videofolder.txt").write_text("\n".join(lists[split]))
    (tmp_path / "category.txt").write_text("darker\nbrighter\n")
    return tmp_path


def options(data: Path, output: Path) -> list[str]:
    shape = ["--img-size", "32", "--num-frames", "4", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    return ["--data", str(data), "--output", str(output), *shape, "--no-crop", "--warmup-epochs", "0"]


def rows(output: Path) -> list[dict]:
    return list(csv.DictReader((output / "summary.csv").open()))


def test_trains_resumes_and_leaves_a_model_timm_loads(data, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    extra = ["--model-ema-decay", "0.5", "--head-lr", "2"]
    metrics = train_video.main([*options(data, once), *extra, "--epochs", "2"])
    assert metrics["top1"] == pytest.approx(metrics["top1_exit4"])
    assert [row["epoch"] for row in rows(once)] == ["0", "1"]
    model = timm.create_model(f"local-dir:{once / 'model'}", pretrained=True).eval()
    assert model.num_frames == 4 and model.num_classes == 2 and len(shifts_of(model)) > 0

    # A run that was stopped after its first epoch.
    stop = train_video.update_summary

    def stopping(epoch, *args, **kwargs):
        if epoch == 1:
            raise KeyboardInterrupt
        return stop(epoch, *args, **kwargs)

    train_video.update_summary = stopping
    try:
        with pytest.raises(KeyboardInterrupt):
            train_video.main([*options(data, twice), *extra, "--epochs", "2"])
    finally:
        train_video.update_summary = stop
    train_video.main([*options(data, twice), *extra, "--epochs", "2", "--resume"])
    assert [row["epoch"] for row in rows(twice)] == ["0", "1"]
    assert rows(twice)[1]["lr"] == rows(once)[1]["lr"]
    # One that was stopped behind its last epoch writes the model it lacks, with the figures of that epoch.
    card = (twice / "model" / "config.json").read_text()
    shutil.rmtree(twice / "model")
    again = train_video.main([*options(data, twice), *extra, "--epochs", "2", "--resume"])
    assert (twice / "model" / "config.json").read_text() == card
    assert again["top1"] == pytest.approx(float(rows(twice)[1]["eval_top1"])) and len(rows(twice)) == 2
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(twice / "last.pth.tar", weights_only=True)
    assert saved["epoch"] == 1 and "state_dict_ema" in saved


def test_a_plain_network_is_the_rival(data, tmp_path):
    metrics = train_video.main([*options(data, tmp_path / "plain"), "--model", "test_resnet", "--epochs", "1"])
    assert metrics.keys() >= {"top1", "top1_exit1"}
    with pytest.raises(ValueError, match="holds images"):
        train_video.main(["--data", "digits", "--output", str(tmp_path / "images")])


def test_the_recipe_is_read_and_builds_its_optimizer():
    path = FOLDER / "recipes" / "video" / "tsm_something_v1.yaml"
    args = train_video.parse_args(["-c", str(path), "--lr", "0.02"])
    recipe = yaml.safe_load(path.read_text())
    assert args.lr == 0.02 and {k: getattr(args, k) for k in recipe if k != "lr"} == {
        k: v for k, v in recipe.items() if k != "lr"
    }
    with torch.device("meta"):
        model = timm.create_model(recipe["model"], num_classes=174, drop_rate=recipe["drop"])
    groups = train_video.parameter_groups(model, args.weight_decay, args.head_lr)
    sizes = sum(len(group["params"]) for group in groups)
    assert sizes == len(list(model.parameters()))
    fast = [p for group in groups if group.get("lr_scale") == 5.0 for p in group["params"]]
    assert len(fast) == len(list(model.get_classifier().parameters()))
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert all(group["weight_decay"] == 0 for group in groups if any(id(p) in norms for p in group["params"]))


def test_an_unknown_option_in_a_recipe_is_refused(tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(SystemExit):
        train_video.parse_args(["-c", str(tmp_path / "wrong.yaml")])
    assert "learning_rate" in capsys.readouterr().err
