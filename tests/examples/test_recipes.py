"""The recipes for timm's train.py: complete, read by its parser, and training two steps on the smallest networks."""

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from exit_plugins import MultiExitLoss
from exit_plugins.timm import train
from exit_plugins.timm.train import ExitLossOptions, MultiExitTask

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
OPTIONS = set(json.loads((ROOT / "tests" / "golden" / "timm_train_options.json").read_text())["options"])
# What changes what is learned, and so must not be left to a script's defaults.
NEEDED = "model num_classes exit_loss opt lr weight_decay batch_size epochs sched warmup_epochs smoothing color_jitter"

SCRIPTS = Path(os.environ.get("TIMM_SCRIPTS", ""))
needs_scripts = pytest.mark.skipif(
    "TIMM_SCRIPTS" not in os.environ, reason="set TIMM_SCRIPTS to the folder of timm's train.py to run it"
)
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def smallest(recipe: dict) -> str:
    return f"{recipe['model'].split('_')[0]}_test"


def test_every_architecture_has_recipes():
    assert len(RECIPES) >= 11
    assert {smallest(read(path)) for path in RECIPES} == {
        "chase_test",
        "dvt_test",
        "dynperceiver_test",
        "msdnet_test",
    }


@each_recipe
def test_every_key_is_known_and_nothing_is_left_open(path):
    recipe = read(path)
    ours = {key for key in recipe if key.startswith("exit_")}
    assert recipe.keys() - ours <= OPTIONS
    assert set(NEEDED.split()) <= recipe.keys() and timm.is_model(recipe["model"])
    # YAML takes 1e-3 for text.
    assert all(isinstance(recipe[key], (int, float)) for key in ("lr", "weight_decay", "epochs", "warmup_epochs"))
    with torch.device("meta"):
        model = timm.create_model(smallest(recipe))
    loss = ExitLossOptions.read(recipe).check().loss(model, torch.nn.CrossEntropyLoss())
    assert loss.weights == MultiExitLoss.for_model(model).weights
    text = path.read_text()
    assert f"-c {path.name} " in text and "..." not in text and "one GPU" in text and "eight GPUs" in text
    # timm's script takes MobileNet's dropout away unless it is told.
    assert recipe.get("drop") == (0.2 if "mobilenet" in recipe["model"] else None)


@each_recipe
def test_two_steps_with_timms_parts(path):
    recipe = read(path)
    args = argparse.Namespace(
        **dict.fromkeys(OPTIONS)
        | dict(momentum=0.9, min_lr=0.0, warmup_lr=1e-5, cooldown_epochs=0, decay_rate=0.1, opt_kwargs={})
        | dict(
            lr_cycle_mul=1.0, lr_cycle_decay=0.5, lr_cycle_limit=1, lr_k_decay=1.0, decay_epochs=90, patience_epochs=10
        )
        | dict(lr_noise_pct=0.67, lr_noise_std=1.0, layer_decay_min_scale=0.0, sched_on_updates=False)
        | dict(warmup_prefix=False, eval_metric="top1", mixup=0.0, cutmix=0.0)
        | recipe
    )
    torch.manual_seed(0)
    model = timm.create_model(smallest(recipe), num_classes=5, drop_path_rate=args.drop_path, drop_rate=args.drop)
    task = MultiExitTask(model, SoftTargetCrossEntropy(), verbose=False, exit_loss=ExitLossOptions.read(recipe))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=2)
    assert epochs == recipe["epochs"] + recipe.get("cooldown_epochs", 0)
    mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=5)
    mix.mixup_enabled = bool(args.mixup or args.cutmix)  # it smooths labels all the same
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    x, target = torch.randn(4, *model.pretrained_cfg["input_size"]), torch.arange(4)
    for step in range(2):
        images, soft = mix(x.clone(), target)
        loss = task(images, soft)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(step + 1)
        assert loss.isfinite()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 2)):
        for name in ("one", "other"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@needs_scripts
def test_the_known_options_are_the_real_parsers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    parser = runpy.run_path(str(SCRIPTS / "train.py"), run_name="train")["parser"]
    assert {action.dest for action in parser._actions} >= OPTIONS


@needs_scripts
@each_recipe
def test_the_real_script_reads_it_and_trains_two_steps(path, data, tmp_path):
    recipe = read(path)
    small = dict(model=smallest(recipe), num_classes=2, data_dir=str(data), device="cpu", workers=0, pin_mem=False)
    small |= dict(batch_size=8, grad_accum_steps=1, epochs=1, warmup_epochs=0, cooldown_epochs=0, aug_repeats=0)
    small |= dict(dataset="", dataset_download=False, pretrained=False, output=str(tmp_path), experiment="run")
    config = tmp_path / path.name
    config.write_text(yaml.safe_dump(recipe | small))
    train.main([str(SCRIPTS / "train.py"), "-c", str(config)])
    used = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert {key: used[key] for key in recipe if key not in small} == {
        key: value for key, value in recipe.items() if key not in small
    }
    assert yaml.safe_load((tmp_path / "run" / "exit_args.yaml").read_text())["exit_loss"] == recipe["exit_loss"]
    assert (tmp_path / "run" / "summary.csv").read_text().count("\n") == 2
