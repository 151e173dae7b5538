"""Small data sets on disk and checkpoints for them."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

NAMES = ("ant", "bee", "cow")


def write_images(root: Path, count: int, names=NAMES, seed: int = 0, mode: str = "RGB") -> Path:
    """``count`` noisy images per class, whose shade tells the class."""
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (32, 32, 3) if mode == "RGB" else (32, 32)
            pixels = np.clip(rng.normal(60 + 70 * NAMES.index(name), 40, shape), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def write_model(path: Path, **kwargs) -> Path:
    """A checkpoint of an msdnet_test whose exits disagree."""
    torch.manual_seed(0)
    model = timm.create_model("msdnet_test", **{"num_classes": 3, **kwargs})
    with torch.no_grad():
        model.train()(torch.randn(64, kwargs.get("in_chans", 3), 32, 32))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(model.state_dict(), path)
    return path
