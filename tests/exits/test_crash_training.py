"""Training runs killed at any line, and resumed: they end with the weights of the run nobody killed.

Two points each; ``CRASH_POINTS=30`` for the long form. All training happens in forked processes, on one thread.
"""

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from killing import HERE, count_lines, in_child, points
from PIL import Image

from exit_plugins.timm import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_cifar.py"
SCRIPT = Path(os.environ.get("TIMM_SCRIPTS", "")) / "train.py"
SAVER = str(Path(timm.__file__).parent / "utils" / "checkpoint_saver.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two colours under noise, as folders of classes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def quietly(work: Callable[[], Any]) -> int:
    """``in_child``, on one thread: those of the parent are not there after a fork."""

    def run() -> None:
        torch.set_num_threads(1)
        work()

    return in_child(run)


def lines_of(work: Callable[[], Any], note: Path, within: tuple[str, ...]) -> int:
    """Do ``work`` in a process of its own and count its lines."""
    assert quietly(lambda: note.write_text(str(count_lines(work, within=within)))) == 0
    return int(note.read_text())


def same(a: Path, b: Path, parts: tuple[str, ...]) -> None:
    one, two = (torch.load(path, map_location="cpu", weights_only=False) for path in (a, b))
    for part in parts:
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)


def test_the_cifar_recipe_killed_anywhere_ends_the_same(data, tmp_path):
    spec = importlib.util.spec_from_file_location("train_cifar", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def work(name: str) -> Callable[[], Any]:
        options = "--model chase_test --device cpu --epochs 3 --batch-size 8 --warmup-epochs 1 --calibration 0"
        return lambda: example.main(["--data", str(data), "--output", str(tmp_path / name), *options.split()])

    within = (HERE, str(EXAMPLE))
    total = lines_of(work("whole"), tmp_path / "lines", within)
    weights = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    for stop in points(total, 2):
        name = f"killed{stop}"
        assert quietly(lambda name=name, stop=stop: count_lines(work(name), stop, within)) == -signal.SIGKILL
        assert quietly(work(name)) == 0
        same(tmp_path / name / "checkpoint.pt", tmp_path / "whole" / "checkpoint.pt", ("model", "ema", "optimizer"))
        assert (tmp_path / name / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.skipif("TIMM_SCRIPTS" not in os.environ, reason="set TIMM_SCRIPTS to the folder of timm's train.py")
def test_timms_train_py_killed_anywhere_goes_on_from_its_last_checkpoint(data, tmp_path):
    """The script draws its batches anew when it resumes, so that a resumed run is not the one without a stop; but a
    killed one has the checkpoint of the whole run, and ends as any run resumed from that one ends."""

    def work(name: str, resume: Path | None = None) -> Callable[[], Any]:
        text = f"--model chase_test --data-dir {data} --num-classes 2 --device cpu --workers 0 -b 8 --epochs 3"
        text += f" --opt adamw --lr 0.01 --warmup-epochs 1 --model-ema --output {tmp_path} --experiment {name}"
        return lambda: train.main([str(SCRIPT), *text.split(), *(["--resume", str(resume)] if resume else [])])

    within = (HERE, str(SCRIPT), SAVER)
    total = lines_of(work("whole"), tmp_path / "lines", within)
    parts = ("state_dict", "state_dict_ema", "optimizer")
    for stop in points(total, 2):
        run = tmp_path / f"killed{stop}"
        assert quietly(lambda run=run, stop=stop: count_lines(work(run.name), stop, within)) == -signal.SIGKILL
        # timm removes last.pth.tar before tmp.pth.tar takes its name.
        left = next((path for name in ("last", "tmp") if (path := run / f"{name}.pth.tar").exists()), None)
        expected = tmp_path / "whole"
        if left is not None:
            epoch = torch.load(left, weights_only=False)["epoch"]
            before, expected = expected / f"checkpoint-{epoch}.pth.tar", tmp_path / f"from{epoch}"
            same(left, before, parts)
            if epoch < 2 and not expected.exists():
                assert quietly(work(expected.name, before)) == 0
            if epoch == 2:
                continue  # all epochs were done
        assert quietly(work(run.name, left)) == 0
        same(run / "last.pth.tar", expected / "last.pth.tar", parts)
