"""Datasets by one word: what is found, what is cut from what, and one clear line for what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exit_plugins.timm.data import ImageView, open_dataset, open_splits


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


def test_a_split_is_what_it_says_or_an_error(tmp_path):
    make_folder(tmp_path / "two", {"train": 2, "test": 3})
    assert len(open_dataset(str(tmp_path / "two"), "testing")) == 6
    assert len(open_dataset(str(tmp_path / "two"), ("validation", "test"))) == 6
    for asked in ("validation", "val", "bogus"):
        with pytest.raises(ValueError, match=f"no split '{asked}'; it has test, train"):
            open_dataset(str(tmp_path / "two"), asked)
    make_folder(tmp_path / "flat", {"": 4})
    assert len(open_dataset(str(tmp_path / "flat"), "all")) == len(open_dataset(str(tmp_path / "flat"), "train")) == 8
    for asked in ("validation", "test", "bogus"):
        with pytest.raises(ValueError, match=f"no split '{asked}': a folder of classes is one split.*--holdout"):
            open_dataset(str(tmp_path / "flat"), asked)


def test_three_split_folders_are_the_three_splits(tmp_path):
    data = open_splits(str(make_folder(tmp_path, {"train": 5, "val": 3, "test": 2})))
    assert (len(data.train), len(data.calibration), len(data.test)) == (10, 6, 4)
    assert {int(np.asarray(image)[0, 0, 0]) for image, _ in data.calibration} == {1}
    assert {int(np.asarray(image)[0, 0, 0]) for image, _ in data.test} == {2}


def test_holding_out_cuts_what_is_missing_and_always_the_same(tmp_path):
    flat, two = (
        str(make_folder(tmp_path / "flat", {"": 50})),
        str(make_folder(tmp_path / "two", {"train": 5, "val": 10})),
    )
    parts = {name: identities(open_dataset(flat, name, holdout=0.2)) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [60, 20, 20]
    assert len(set.union(*parts.values())) == 100
    assert parts["test"] == identities(open_dataset(flat, "test", holdout=0.2))
    assert parts["test"] != identities(open_dataset(flat, "test", holdout=0.2, seed=1))
    assert parts["test"] == identities(open_splits(flat).test)  # a model trained on the first is tested on the last
    # The model may have learnt all of train/: the test split comes out of val/.
    test, val = (identities(open_dataset(two, name, holdout=0.5)) for name in ("test", "val"))
    assert len(test) == len(val) == 10 and len(test | val) == 20
    assert test | val == identities(open_dataset(two, "val"))
    assert len(open_dataset(two, "train", holdout=0.5)) == 10
    with pytest.raises(ValueError, match="leaves none to train on"):
        open_dataset(flat, "test", holdout=0.5)
    make_folder(tmp_path / "two", {"test": 1})
    with pytest.raises(ValueError, match="nothing to hold out"):
        open_dataset(two, "test", holdout=0.5)


def test_a_class_called_train_is_no_split(tmp_path):
    make_folder(tmp_path, {"": 3}, classes=("bus", "train"))
    assert open_dataset(str(tmp_path), "all").classes == ("bus", "train")


def test_torchvision_sets_have_the_splits_they_have(tmp_path, monkeypatch):
    from exit_plugins.timm import data as module

    class Ten(list):
        classes = ("ant", "bee")

    asked = []
    monkeypatch.setattr(module, "create_dataset", lambda *a, split, **k: asked.append(split) or Ten([(None, 0)] * 10))
    assert len(open_dataset("torch/cifar10", "testing", str(tmp_path))) == 10 and asked == ["test"]
    for split in ("validation", "bogus"):
        with pytest.raises(ValueError, match=f"no split '{split}'; it has test, train"):
            open_dataset("torch/cifar10", split, str(tmp_path))
    halves = [open_dataset("torch/cifar10", name, str(tmp_path), holdout=0.5) for name in ("validation", "test")]
    assert sorted(np.concatenate([half.index for half in halves])) == list(range(10))


def test_digits_are_real_images_in_fixed_splits(tmp_path, monkeypatch):
    data = open_splits("digits")
    views = [open_dataset("digits", name) for name in ("train", "val", "test")]
    assert [len(view) for view in views] == [len(data.train), len(data.calibration), len(data.test)]
    assert sorted(np.concatenate([view.index for view in views])) == list(range(1797))
    image, target = data.test[0]
    assert image.mode == "RGB" and image.size == (64, 64) and 0 <= target < 10
    with pytest.raises(ValueError, match="no split 'bogus'; it has test, train, validation"):
        open_dataset("digits", "bogus")
    # A folder of that name is meant where there is one.
    make_folder(tmp_path / "digits", {"": 5})
    monkeypatch.chdir(tmp_path)
    assert open_dataset("digits", "all").classes == ("ant", "bee")


def test_classes_are_numbered_by_the_training_split(tmp_path):
    names = ("ant", "bee", "cow", "dog")
    make_folder(tmp_path, {"train": 3, "test": 2}, classes=names)
    for name in ("ant", "cow"):
        for file in (tmp_path / "test" / name).iterdir():
            file.unlink()
    (tmp_path / "test" / "cow").rmdir()  # one class folder is empty, one is not there
    view = open_dataset(str(tmp_path), "test")
    assert view.classes == names and view.own_classes == ("bee", "dog")
    # The images' second channel is the class they were written for.
    assert [int(np.asarray(image)[0, 0, 1]) for image, _ in view] == [target for _, target in view] == [1, 1, 3, 3]
    make_folder(tmp_path, {"test": 1}, classes=("emu",))
    with pytest.raises(ValueError, match="has the class 'emu', which the model does not know; it knows"):
        open_dataset(str(tmp_path), "test")


def test_views_keep_their_classes_and_channels(tmp_path):
    view = open_dataset(str(make_folder(tmp_path, {"": 3})), "all").with_classes(("bee", "cow", "ant")).with_channels(1)
    half = view.subset([0, 5]).with_transform(lambda image: image.mode)
    assert [half[0], half[1]] == [("L", 2), ("L", 0)] and half.classes == ("bee", "cow", "ant")
    assert half.name(1).endswith("bee/2.png")
    with pytest.raises(ValueError, match="1 or 3 channels, the model takes 4"):
        view.with_channels(4)


def test_a_name_of_two_classes_matches_no_label(tmp_path):
    view = open_dataset(str(make_folder(tmp_path, {"": 3})), "all")
    for names in (("ant", "bee", "cow", "ant"), ("bee", "bee", "ant")):
        with pytest.raises(ValueError, match="the list of classes has two classes called"):
            view.with_classes(names)
    view.base.classes = ("crane", "crane")
    with pytest.raises(ValueError, match="the data has two classes called 'crane'"):
        ImageView(view.base, classes=("crane", "bee"))
    # Where nothing is matched by name, numbers tell the two apart (ImageNet has such).
    assert {ImageView(view.base)[item][1] for item in range(6)} == {0, 1}


def test_loose_images_are_no_class(tmp_path):
    make_folder(tmp_path, {"train": 2, "test": 2})
    Image.new("RGB", (4, 4)).save(tmp_path / "test" / "cover.png")
    with pytest.raises(ValueError, match="images outside its class subfolders"):
        open_dataset(str(tmp_path), "test")


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
