"""Generated clips that only the order of their frames can classify: a real image moves, grows or turns.

Each of the eight classes has its opposite, and a clip of one is a clip of the other played backwards: start, speed and
image are drawn alike, so that their frames have one distribution. Whoever looks at frames without their order cannot
tell a pair apart.
"""

import math
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

__all__ = ["CLASSES", "MotionSet", "opposite"]

CLASSES = ("left", "right", "up", "down", "shrink", "grow", "counterclockwise", "clockwise")


def opposite(target: int | np.ndarray) -> int | np.ndarray:
    """Index of the class whose clips are those of ``target`` backwards. Indices (N,) for indices (N,)."""
    return target ^ 1


class MotionSet(Dataset):
    """``count`` clips of an image from ``images`` in motion, with the index of the motion in ``CLASSES``.

    Sample i is the same on every access: everything about it is drawn from ``seed`` and i. A sample is a list of
    ``num_frames`` square PIL images (RGB, black around the image) of ``size`` pixels, and its class. Classes come in
    turns.

    Args:
        images: dataset of (PIL image, anything) pairs to draw from.
        count: number of clips.
        num_frames: T.
        size: pixels along both sides.
        seed: of the drawing; splits have different ones.
    """

    classes = CLASSES
    holds_clips = True

    def __init__(self, images: Any, count: int, num_frames: int = 8, size: int = 32, seed: int = 0) -> None:
        self.images, self.count, self.num_frames, self.size, self.seed = images, count, num_frames, size, seed

    def __len__(self) -> int:
        return self.count

    def target(self, item: int) -> int:
        """Class of a sample: they come in turns."""
        return item % len(CLASSES)

    def __getitem__(self, item: int) -> tuple[list[Image.Image], int]:
        if not 0 <= item < self.count:
            raise IndexError(item)
        rng = np.random.default_rng((self.seed, item))
        target = self.target(item)
        image, _ = self.images[int(rng.integers(len(self.images)))]
        side = self.size  # enough pixels for the largest the image becomes
        image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        # The middle of the way; the two ends lie to both sides of it, so that backwards is the opposite.
        x, y = 0.5 + rng.uniform(-0.08, 0.08, 2)
        scale, angle = rng.uniform(0.5, 0.6), rng.uniform(-math.pi / 4, math.pi / 4)
        distance, growth, turn = rng.uniform(0.3, 0.45), rng.uniform(0.5, 0.8), rng.uniform(math.pi / 3, math.pi / 1.2)
        kind, forth = target // 2, 1 if target % 2 else -1
        frames = []
        for time in np.linspace(-0.5, 0.5, self.num_frames) if self.num_frames > 1 else [0.0]:
            way = forth * time
            frames.append(
                _draw(
                    image,
                    x + (distance * way if kind == 0 else 0.0),
                    y + (distance * way if kind == 1 else 0.0),
                    scale * (math.exp(growth * way) if kind == 2 else 1.0),
                    angle + turn * way if kind == 3 else 0.0,
                )
            )
        return frames, target


def _draw(image: Image.Image, x: float, y: float, scale: float, angle: float) -> Image.Image:
    """``image`` on black at centre (x, y) and at ``scale``, in parts of the frame's side, turned by ``angle``.

    Angles are clockwise radians.
    """
    side = image.width
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre_x, centre_y, middle = side * x, side * y, side / 2
    # From pixels of the frame to those of the image.
    matrix = (
        cos,
        sin,
        middle - cos * centre_x - sin * centre_y,
        -sin,
        cos,
        middle + sin * centre_x - cos * centre_y,
    )
    return image.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
