"""The generated motion set: seeded, balanced, and with nothing but the order of the frames to tell opposites apart."""

import numpy as np
import pytest
from PIL import Image

from exit_plugins.timm.data import open_dataset
from exit_plugins.timm.motion import CLASSES, MotionSet, opposite


class Blocks:
    """Two images: a bright upper half, and a bright left half."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> tuple[Image.Image, int]:
        pixels = np.full((16, 16, 3), 60, np.uint8)
        pixels[(slice(8), slice(None)) if item == 0 else (slice(None), slice(8))] = 255
        return Image.fromarray(pixels), 0


def centre(frame: Image.Image) -> np.ndarray:
    """(x, y) of the mean of what is not background."""
    y, x = np.nonzero(np.asarray(frame.convert("L")) > 20)
    return np.array([x.mean(), y.mean()])


def turned(frame: Image.Image) -> float:
    """Direction from the middle of the object to its bright half, clockwise from upwards, in degrees."""
    bright = np.argwhere(np.asarray(frame.convert("L")) > 160).mean(0)[::-1] - centre(frame)
    return float(np.degrees(np.arctan2(bright[0], -bright[1])))


def test_every_class_moves_as_its_name_says():
    data = MotionSet(Blocks(), 64, seed=3)
    for clip, target in (data[i] for i in range(64)):
        first, last, name = clip[0], clip[-1], CLASSES[target]
        moved = centre(last) - centre(first)
        grown = (np.asarray(last) > 20).sum() / (np.asarray(first) > 20).sum()
        turn = (turned(last) - turned(first) + 180) % 360 - 180
        if name in ("left", "right"):
            assert np.sign(moved[0]) == (1 if name == "right" else -1) and abs(moved[0]) > 8 > abs(moved[1])
        elif name in ("up", "down"):
            assert np.sign(moved[1]) == (1 if name == "down" else -1) and abs(moved[1]) > 8 > abs(moved[0])
        elif name in ("grow", "shrink"):
            assert grown > 1.8 if name == "grow" else grown < 0.6
        else:
            assert turn > 45 if name == "clockwise" else turn < -45


def test_a_clip_backwards_is_one_of_the_opposite_class():
    """Draws are of one distribution: the same draw under the opposite class is the clip backwards."""
    assert [CLASSES[opposite(i)] for i in range(8)] == [
        "right", "left", "down", "up", "grow", "shrink", "clockwise", "counterclockwise",
    ]  # fmt: skip

    class Turned(MotionSet):
        """Sample i drawn as ever, its class the opposite."""

        def target(self, item: int) -> int:
            return opposite(super().target(item))

    here, there = MotionSet(Blocks(), 8, seed=5), Turned(Blocks(), 8, seed=5)
    for i in range(8):
        (clip, target), (other, counter) = here[i], there[i]
        assert counter == opposite(target)
        for frame, back in zip(clip, reversed(other), strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(back))


def test_samples_are_seeded_and_classes_balanced():
    data = MotionSet(Blocks(), 24, num_frames=3, size=20, seed=1)
    clip, target = data[5]
    assert len(clip) == 3 and clip[0].size == (20, 20) and clip[0].mode == "RGB" and target == 5
    assert all(np.array_equal(a, b) for a, b in zip(clip, data[5][0], strict=True))
    assert not np.array_equal(clip[0], MotionSet(Blocks(), 24, 3, 20, seed=2)[5][0][0])
    assert np.bincount([data[i][1] for i in range(24)]).tolist() == [3] * 8
    with pytest.raises(IndexError):
        data[24]


def test_it_opens_by_its_name(tmp_path):
    views = {split: open_dataset("motion", split) for split in ("train", "validation", "test")}
    assert [len(view) for view in views.values()] == [2000, 1000, 1000]
    assert all(view.classes == CLASSES and view.holds_clips for view in views.values())
    frames = {split: np.asarray(view[0][0][0]).tobytes() for split, view in views.items()}
    assert len(set(frames.values())) == 3
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / name / f"{i}.png")
    assert len(open_dataset(f"motion:{tmp_path}", "train")) == 2000
    with pytest.raises(ValueError, match="no split 'all'"):
        open_dataset("motion", "all")
    assert not open_dataset("digits", "test").holds_clips
