"""Datasets by one word: what is found, what is cut from what, and one clear line for what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exit_plugins.timm.data import open_dataset, open_splits


def make_folder(root: Path, splits: dict[str, int], classes=("ant", "bee")) -> Path:
    """An ImageFolder whose images encode (split, class, number) in their one colour."""
    for s, (split, count) in enumerate(splits.items()):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(count):
                Image.new("RGB", (4, 4), (s, c, n)).save(folder / f"{n}.png")
    return root


def identities(view) -> set[tuple[int, ...]]:
    return {np.asarray(view[i][0])[0, 0].astype(int).tobytes() for i in range(len(view))}


def test_splits_of_a_folder_are_disjoint_and_complete(tmp_path):
    data = open_splits(str(make_folder(tmp_path, {"train": 10, "val": 3})))
    assert (len(data.train), len(data.calibration), len(data.test)) == (16, 4, 6)
    assert data.classes == ("ant", "bee")
    train, calibration, test = map(identities, (data.train, data.calibration, data.test))
    assert not train & calibration and not train & test and not calibration & test
    assert len(train | calibration | test) == 26
    assert all(np.asarray(image)[0, 0, 0] == 1 and np.asarray(image)[0, 0, 1] == target for image, target in data.test)


def test_a_folder_without_splits_is_divided(tmp_path):
    data = open_splits(str(make_folder(tmp_path, {"": 50})))
    assert (len(data.train), len(data.calibration), len(data.test)) == (60, 20, 20)
    assert len(identities(data.train) | identities(data.calibration) | identities(data.test)) == 100


def test_validation_finds_test(tmp_path):
    make_folder(tmp_path, {"train": 2, "test": 3})
    assert len(open_dataset(str(tmp_path), "validation")) == 6


def test_digits_are_real_images_in_fixed_splits():
    data = open_splits("digits")
    assert len(data.train) + len(data.calibration) + len(data.test) == 1797
    image, target = data.test[0]
    assert image.mode == "RGB" and image.size == (64, 64) and 0 <= target < 10


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda p: p / "nowhere", FileNotFoundError, "no data at"),
        (lambda p: make_folder(p, {"train": 2, "val": 2}, classes=("only",)), ValueError, "single class"),
        (lambda p: make_folder(p, {"train": 0, "val": 0}), ValueError, "no images"),
        (lambda p: make_folder(p, {"train": 2}), ValueError, "no split 'validation'; it has train"),
        (lambda p: "torch/cifar100", ValueError, "where it lies"),
        (lambda p: "wds/shards", ValueError, "streams"),
    ],
)
def test_unusable_data_is_said_in_one_line(tmp_path, make, error, says):
    with pytest.raises(error, match=says) as caught:
        open_splits(str(make(tmp_path)))
    assert "\n" not in str(caught.value)
