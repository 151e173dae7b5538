"""As an MMDetection user: its own scripts, hooks and inferencer on a small Dyn-Perceiver."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

import exit_plugins  # noqa: F401  registers the models

TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"
CONFIG = Path(__file__).parents[2] / "mm_configs" / "bccd" / "retinanet_dynperceiver_regnety_400mf_fpn_bccd_small.py"
SCRIPT = Path(__file__).parents[2] / "examples" / "detect.py"
OPTIONS = {
    "model.backbone.arch": "dynperceiver_test",
    "model.neck.in_channels": [24, 40, 64, 96],
    "model.test_cfg.score_thr": 0.0,
    "train_cfg.val_interval": 1,
    "default_hooks.logger.interval": 1,
    "default_hooks.checkpoint.interval": 1,
}

# MMEngine's launcher asks for CUDA devices. Where there are none, the process group is opened before it.
GLOO_LAUNCHER = """
import runpy, sys
import torch.distributed as dist

dist.init_process_group("gloo")
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
dist.destroy_process_group()
"""


def settings(**options: object) -> list[str]:
    return ["--cfg-options", *(f"{key}={value}".replace(" ", "") for key, value in {**OPTIONS, **options}.items())]


def run(*command: object, root: Path, **options: object) -> str:
    """What a fresh process says."""
    process = subprocess.run(
        [str(part) for part in (sys.executable, *command)] + settings(**options),
        capture_output=True,
        text=True,
        env={**os.environ, "BCCD_ROOT": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


@pytest.fixture
def run_here(shapes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs a script in this process, which spares loading everything again; returns what it says."""

    def run_script(*command: object) -> str:
        monkeypatch.setenv("BCCD_ROOT", str(shapes))
        monkeypatch.setattr(sys, "argv", [str(part) for part in command] + settings())
        runpy.run_path(str(command[0]), run_name="__main__")
        output, errors = capfd.readouterr()
        return output + errors

    return run_script


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folder of one epoch from a classification checkpoint, resumed for a second by two processes."""
    work = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    classifier = timm.create_model("dynperceiver_test", num_classes=4)
    torch.save({"state_dict": classifier.state_dict(), "arch": "dynperceiver_test"}, work / "classifier.pth.tar")
    weights = {
        "model.backbone.init_cfg.type": "Pretrained",
        "model.backbone.init_cfg.checkpoint": work / "classifier.pth.tar",
    }
    log = run(TOOLS / "train.py", CONFIG, "--work-dir", work, root=shapes, **weights, **{"train_cfg.max_epochs": 1})
    assert "DynPerceiver: loaded all" in log

    (work / "launch.py").write_text(GLOO_LAUNCHER)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    wrapper = {"model_wrapper_cfg.type": "MMDistributedDataParallel", "model_wrapper_cfg.device_ids": None}
    arguments = (
        work / "launch.py",
        TOOLS / "train.py",
        CONFIG,
        "--work-dir",
        work,
        "--launcher",
        "pytorch",
        "--resume",
    )
    log = run(*torchrun, *arguments, root=shapes, **wrapper, **{"train_cfg.max_epochs": 2})
    assert "resumed epoch: 1" in log and "GPU number: 2" in log
    return work


def test_training_writes_what_users_look_at(trained: Path) -> None:
    for epoch in (1, 2):
        assert (trained / f"epoch_{epoch}.pth").is_file()
    first, second = sorted(path for path in trained.iterdir() if (path / "vis_data").is_dir())
    for folder in (first, second):
        records = [json.loads(line) for line in (folder / "vis_data" / "scalars.json").read_text().splitlines()]
        assert any("loss_cls" in record and "loss_bbox" in record for record in records)
        assert list((folder / "vis_data").glob("events.out.tfevents*"))
    assert any("coco/bbox_mAP" in line for line in (first / "vis_data" / "scalars.json").read_text().splitlines())


def test_test_script_evaluates_and_draws(trained: Path, run_here, tmp_path: Path) -> None:
    checkpoint = trained / "epoch_2.pth"
    log = run_here(TOOLS / "test.py", CONFIG, checkpoint, "--work-dir", tmp_path, "--show-dir", "drawn")
    assert "coco/bbox_mAP" in log
    drawn = list(tmp_path.glob("*/drawn/*"))
    assert len(drawn) == 3
    with Image.open(drawn[0]) as picture:
        assert picture.size == (256, 96)  # what is there beside what is found


def test_flops_script_counts(run_here) -> None:
    assert "Flops: 0." in run_here(TOOLS / "analysis_tools" / "get_flops.py", CONFIG, "--num-images", 1)


def test_example_detects(trained: Path, shapes: Path, run_here, tmp_path: Path) -> None:
    image = shapes / "images" / "test_0.jpg"
    arguments = ("--config", CONFIG, "--checkpoint", trained / "epoch_2.pth", "--output", tmp_path)
    log = run_here(SCRIPT, image, *arguments)
    assert "test_0.jpg: " in log
    assert (tmp_path / "vis" / "test_0.jpg").is_file()


def test_example_prints_of_every_image_in_a_folder_what_it_prints_of_that_image(
    shapes: Path, run_here, tmp_path: Path
) -> None:
    config = Config.fromfile(CONFIG)
    config.merge_from_dict({key: value for key, value in OPTIONS.items() if key.startswith("model.")})
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)  # so that images differ in what is found
    classes = {"classes": ("RBC", "WBC", "Platelets"), "palette": [(1, 2, 3), (4, 5, 6), (7, 8, 9)]}
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": classes}}, tmp_path / "detector.pth")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for name, source in zip("dbeac", sorted((shapes / "images").iterdir()), strict=False):
        with Image.open(source) as picture:
            picture.save(folder / f"{name}.png" if name != "e" else folder / "e.PNG")

    def said(path: Path) -> dict[str, list[str]]:
        options = ("--config", CONFIG, "--checkpoint", tmp_path / "detector.pth", "--output", tmp_path / "out")
        log = run_here(SCRIPT, path, *options, "--threshold", 0.5)
        blocks: dict[str, list[str]] = {}
        for line in log.splitlines():
            if " boxes with a score" in line:
                blocks[line.partition(":")[0]] = lines = [line]
            elif blocks and line.startswith("  ") and " at " in line:
                lines.append(line)
        return blocks

    together = said(folder)
    assert list(together) == ["a.png", "b.png", "c.png", "d.png", "e.PNG"]
    assert len({tuple(lines[1:]) for lines in together.values()}) > 1
    assert all(together[name] == said(folder / name)[name] for name in ("a.png", "b.png", "e.PNG"))


def test_losses_under_bfloat16(shapes: Path) -> None:
    """What --amp does on a GPU; MMEngine's own switch refuses a CPU."""
    from mmdet.testing import demo_mm_inputs

    config = Config.fromfile(CONFIG)
    config.merge_from_dict({key: value for key, value in OPTIONS.items() if key.startswith("model.")})
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
    data = model.data_preprocessor(demo_mm_inputs(2, [[3, 64, 96]] * 2, num_classes=3), True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**data, mode="loss")
    total = sum(sum(value) for value in losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.backbone.parameters())
