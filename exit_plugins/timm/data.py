"""Labelled images by one word: a folder, any dataset timm reads, or scikit-learn's digits, in the splits exits need.

Early exits need three disjoint splits: one to train on, one to solve thresholds on, one to report. Thresholds solved
on training images spend more than their budget on new ones, and a policy scored on the images it was solved on is no
test. So a split is what it says or an error; what a dataset lacks is cut from it only when asked for (``holdout``).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from ._views import ImageFiles, ImageView, class_names
from .clips import VideoFolder, holds_videos, list_files, open_list
from .images import EXTENSIONS, read_image
from .motion import MotionSet

__all__ = ["ImageView", "Splits", "class_names", "open_dataset", "open_splits"]

# Name of a split -> the names it goes by.
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval"),
    "test": ("test", "testing"),
}
_ALL = "all"  # the one split of a folder of classes
_TORCH_SPLITS = {"imagenet": ("train", "val"), "places365": ("train", "val")}
_TORCH_SPLITS |= {"inaturalist": ("train", "val"), "inat": ("train", "val")}


@dataclass(frozen=True)
class Splits:
    """Disjoint labelled splits and the names of the classes (index = class)."""

    train: ImageView
    calibration: ImageView
    test: ImageView
    classes: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets and their splits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A dataset that has not been opened yet: where it is, and its splits, each under its own name."""

    where: str
    splits: Mapping[str, Callable[[], ImageView]]
    classes: Callable[[], tuple[str, ...] | None] = lambda: None  # numbering of every split, where there is one
    opens_slices: Callable[[str], ImageView] | None = None  # of a split: "train[:10%]"

    def find(self, split: str) -> str | None:
        """The dataset's own name of a split, None where it has none."""
        if split in self.splits:
            return split
        if _ALL in self.splits and split in _NAMES["train"]:
            return _ALL  # where nothing is held out, everything is there to train on
        synonyms = next((names for names in _NAMES.values() if split in names), ())
        return next((name for name in synonyms if name in self.splits), None)

    def open(self, split: str | Sequence[str]) -> ImageView:
        if not isinstance(split, str):
            split = next((name for name in split if self.find(name)), split[0])
        whole, bracket, part = split.partition("[") if self.opens_slices else (split, "", "")
        name = self.find(whole)
        if name is None:
            raise ValueError(self._without(whole))
        view = self.opens_slices(name + bracket + part) if self.opens_slices and bracket else self.splits[name]()
        classes = self.classes()
        return _checked(view if classes is None else view.with_classes(classes), f"{self.where}, split {name}")

    def _without(self, split: str) -> str:
        if _ALL in self.splits:
            return (
                f"{self.where} has no split {split!r}: a folder of classes is one split, {_ALL!r}. Sort the images "
                "into train/, val/ and test/, or hold some out of it (holdout, --holdout SHARE)."
            )
        has_one = (self.find("validation") is None) != (self.find("test") is None)
        could_be_cut = has_one and split in _NAMES["validation"] + _NAMES["test"]
        advice = "; holdout (--holdout SHARE) cuts it from the other" if could_be_cut else ""
        return f"{self.where} has no split {split!r}; it has {', '.join(sorted(self.splits))}{advice}."

    def holding_out(self, share: float, seed: int) -> "_Source":
        """The dataset with the splits it lacks, cut at random (the same for the same seed).

        A folder of classes gives ``share`` of its images to the test and as many to the validation split. Where one of
        the two is there the other is cut from it, never from the training split, which a model may have learnt.
        """
        if not 0 < share < 1:
            raise ValueError(f"the share held out lies between 0 and 1, got {share:g}.")
        validation, test = self.find("validation"), self.find("test")
        if validation and test:
            raise ValueError(f"{self.where} has the splits {validation} and {test}; there is nothing to hold out.")
        splits = dict(self.splits)
        there = validation or test
        if there:
            held = partial(_halves, self.splits[there], share, seed)
            splits["test" if validation else "validation"] = partial(_part, held, 0)
            splits[there] = partial(_part, held, 1)
        else:
            train = self.find("train")
            if train is None:
                raise ValueError(self._without("train"))
            whole = splits.pop(train)
            parts = partial(_cut, whole, share, share, seed)
            for place, name in enumerate(("train", "validation", "test")):
                splits[name] = partial(_part, parts, place)
        return replace(self, splits=splits)


def _part(parts: Callable[[], Sequence[ImageView]], place: int) -> ImageView:
    return parts()[place]


def _halves(whole: Callable[[], ImageView], share: float, seed: int) -> tuple[ImageView, ImageView]:
    return whole().split(share, seed)


def _cut(whole: Callable[[], ImageView], validation: float, test: float, seed: int) -> tuple[ImageView, ...]:
    """Training, validation and test part of one split; the shares are of the whole."""
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(f"holding out {validation:g} and {test:g} of the images leaves none to train on.")
    view = whole()
    tested, rest = view.split(test, seed)
    held, train = rest.split(validation * len(view) / max(len(rest), 1), seed + 1)
    if not min(len(train), len(held), len(tested)):
        raise ValueError(f"{len(view)} images are too few to hold out {test:g} of them.")
    return train, held, tested


def open_dataset(
    spec: str,
    split: str | Sequence[str] = "validation",
    root: str | None = None,
    holdout: float | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> ImageView:
    """One split of a labelled dataset, as PIL images.

    Classes are numbered by the training split where there is one: a split that lacks a class, or holds an empty
    folder, keeps the others' numbers.

    Args:
        spec: a folder with one subfolder per split and in each one per class, or of classes alone, which is one
            split, ``all``; a timm dataset such as ``torch/cifar100`` or ``hfds/cifar100``; or ``digits``,
            scikit-learn's, unless there is a folder of that name. Of clips: such a folder with videos in the place of
            images, one with Something-Something's lists (``train_videofolder.txt``, ...; ``root`` is where their
            paths start from), or ``motion``, generated from digits, ``motion:SPEC`` from the images of ``SPEC``.
        split: name of the split. ``validation``, ``val``, ``valid`` and ``eval`` are one, ``test`` and ``testing``,
            ``train`` and ``training`` too. Of several names, the first there is.
        root: where timm datasets lie or are to be put.
        holdout: share of the images to hold out as the splits the dataset lacks: as validation and as test split of a
            folder of classes; as the missing one of the two, cut from the other.
        seed: of the holdout's random choice.
        kwargs: go on to ``timm.data.create_dataset``.

    Raises:
        FileNotFoundError, ValueError: there is no such folder or split, or it holds no images, a single class, or
            classes the training split lacks.
    """
    source = _source(spec, root, kwargs)
    return (source if holdout is None else source.holding_out(holdout, seed)).open(split)


def open_splits(spec: str, root: str | None = None, seed: int = 0, calibration: float = 0.2) -> Splits:
    """Training, calibration and test split of a dataset (see ``open_dataset`` for ``spec``), to train on the first.

    The calibration split is the validation split of a dataset that has a test split besides; else it is cut at random
    from the training split (its share is ``calibration``), and the test split is the one there is. A folder of classes
    is divided at random: 20 % to test, ``calibration`` to calibrate.
    """
    source = _source(spec, root, {})
    if _ALL in source.splits:
        train, held_out, test = _cut(partial(source.open, _ALL), calibration, 0.2, seed)
        return Splits(train, held_out, test, train.classes)
    rest = source.open("train")
    if source.find("validation") and source.find("test"):
        return Splits(rest, source.open("validation"), source.open("test"), rest.classes)
    test = source.open(("validation", "test"))
    held_out, train = rest.split(calibration, seed + 1)
    return Splits(train, held_out, test, rest.classes)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of datasets
# ---------------------------------------------------------------------------------------------------------------------


def _source(spec: str, root: str | None, kwargs: dict[str, Any]) -> _Source:
    folder = Path(spec)
    if folder.is_dir():
        return _lists_source(folder, root) if list_files(folder) else _folder_source(folder, kwargs)
    if spec == "motion" or spec.startswith("motion:"):
        return _motion_source(spec, spec.partition(":")[2] or "digits", root)
    if spec == "digits":
        return _Source("digits", {name: partial(_digits, name) for name in _NAMES})
    prefix, _, name = spec.partition("/")
    if prefix.lower() in ("tfds", "wds", "hfids"):
        raise ValueError(f"{spec} streams; splits need a dataset with random access (a folder, torch/... or hfds/...).")
    if prefix.lower() == "torch":
        return _torch_source(spec, name.lower(), root, kwargs)
    if prefix.lower() == "hfds":
        return _hugging_face_source(spec, name, root, kwargs)
    raise FileNotFoundError(
        f"no data at {spec!r}: expected a folder of images (one subfolder per class, or train/ and test/ with one "
        "per class), a timm dataset such as torch/cifar100, or digits."
    )


def _folder_source(folder: Path, kwargs: dict[str, Any]) -> _Source:
    known = {name for names in _NAMES.values() for name in names}
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    # A class may be called "train"; a split holds classes, not images.
    if not any(path.name in known and any(p.is_dir() for p in path.iterdir()) for path in subfolders):
        return _Source(str(folder), {_ALL: partial(_folder_view, folder, kwargs)})
    source = _Source(str(folder), {path.name: partial(_folder_view, path, kwargs) for path in subfolders})
    train = source.find("train")
    if train is None:
        return source
    opens = bool(kwargs) or holds_videos(folder / train)
    numbering = (lambda: source.splits[train]().classes) if opens else partial(_class_folders, folder / train)
    return replace(source, classes=numbering)


def _folder_view(folder: Path, kwargs: dict[str, Any]) -> ImageView:
    if holds_videos(folder):
        return ImageView(VideoFolder(folder))
    try:
        found = create_dataset("", str(folder), search_split=False, **{"input_key": ";".join(EXTENSIONS), **kwargs})
    except RuntimeError as error:  # timm: "Found 0 images"
        raise ValueError(f"{folder} holds no images in class subfolders.") from error
    view = ImageView(ImageFiles(found.reader))
    if "" in view.classes:
        raise ValueError(f"{folder} holds images outside its class subfolders; move them into one, or away.")
    return view


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders with images in them, numbered as timm does."""
    found = {
        Path(path).name if Path(path) != folder else ""
        for path, _, files in os.walk(folder, followlinks=True)
        if any(os.path.splitext(file)[1].lower() in EXTENSIONS for file in files)
    }
    if not found:
        raise ValueError(f"{folder} holds no images in class subfolders.")
    return tuple(sorted(found, key=natural_key))


def _lists_source(folder: Path, root: str | None) -> _Source:
    """Frame folders, listed as TSM's tools do."""
    lists = list_files(folder)

    def opened(split: str) -> ImageView:
        return ImageView(open_list(lists[split], root))

    return _Source(str(folder), {split: partial(opened, split) for split in lists})


# Clips in each split, and the seed they are drawn from.
_MOTION = {"train": (2000, 0), "validation": (1000, 2), "test": (1000, 1)}


def _motion_source(where: str, spec: str, root: str | None) -> _Source:
    """Generated motion of the images of a dataset, each split of its own images."""
    images = _source(spec, root, {})
    if _ALL in images.splits:
        images = images.holding_out(0.2, seed=0)

    def opened(split: str) -> ImageView:
        count, seed = _MOTION[split]
        return ImageView(MotionSet(images.open(split), count, seed=seed))

    return _Source(where, {split: partial(opened, split) for split in _MOTION if images.find(split)})


def _torch_source(spec: str, name: str, root: str | None, kwargs: dict[str, Any]) -> _Source:
    if root is None:
        raise ValueError(f"{spec} needs to know where it lies: give the folder torchvision's files are in (root).")
    if name in ("folder", "image_folder"):
        return _source(root, None, kwargs)

    def opened(split: str) -> ImageView:
        try:
            found = create_dataset(spec, root=root, split=split, **kwargs)
        except AssertionError as error:  # timm, of a name it does not know
            raise ValueError(f"{spec}: {error}.") from error
        if callable(getattr(found, "loader", None)):
            found.loader = read_image
        return ImageView(found)

    # timm takes any other word for the test split.
    return _Source(spec, {split: partial(opened, split) for split in _TORCH_SPLITS.get(name, ("train", "test"))})


def _hugging_face_source(spec: str, name: str, root: str | None, kwargs: dict[str, Any]) -> _Source:
    try:
        from datasets import get_dataset_split_names
    except ModuleNotFoundError as error:
        raise ImportError(f"{spec} needs Hugging Face datasets: pip install datasets") from error

    def opened(split: str) -> ImageView:
        return ImageView(ImageFiles(create_dataset(spec, root=root, split=split, **kwargs).reader))

    splits = {split: partial(opened, split) for split in get_dataset_split_names(name)}
    return _Source(spec, splits, opens_slices=opened)


class _Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8 grey), enlarged to RGB images of ``size`` pixels."""

    classes = tuple("0123456789")

    def __init__(self, size: int = 64) -> None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ImportError("the digits come with scikit-learn: pip install 'exit-plugins[plots]'") from error
        digits = load_digits()
        grey = (digits.images * (255 / 16)).round().astype(np.uint8)
        self.images = [Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC).convert("RGB") for g in grey]
        self.targets = digits.target

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[Image.Image, int]:
        return self.images[item], int(self.targets[item])


def _digits(split: str) -> ImageView:
    # The order of scikit-learn's file is by writer; a fixed shuffle makes the splits alike.
    rest, test = ImageView(_Digits()).split(0.8, seed=0)
    validation, train = rest.split(0.2, seed=1)
    return {"train": train, "validation": validation, "test": test}[split]


def _checked(view: ImageView, where: str) -> ImageView:
    if len(view) == 0:
        raise ValueError(f"{where} holds no images.")
    if len(view.classes) < 2:
        raise ValueError(
            f"{where} has a single class, {view.classes[0]!r}; a classifier needs at least two class subfolders."
        )
    return view
