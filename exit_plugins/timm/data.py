"""Labelled images by one word: a folder, any dataset timm reads, or scikit-learn's digits, in the splits exits need.

Early exits need three disjoint splits: one to train on, one to solve thresholds on, one to report. Thresholds solved
on training images spend more than their budget on new ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["ImageView", "Splits", "open_dataset", "open_splits"]

_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "validation", "val", "valid", "eval")
_SPLIT_NAMES = {
    "train": _TRAIN_NAMES,
    "validation": ("validation", "val", "valid", "eval"),
    "test": ("test",),
}


class ImageView(Dataset):
    """Some samples of a dataset of (PIL image, class index) pairs, under a transform of their own."""

    def __init__(self, base: Dataset, index: Sequence[int] | None = None, transform: Callable | None = None) -> None:
        self.base = base
        self.index = np.arange(len(base)) if index is None else np.asarray(index)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, target = self.base[int(self.index[item])]
        if self.transform is not None:
            image = self.transform(image)
        return image, int(target)

    def with_transform(self, transform: Callable[[Image.Image], Tensor] | None) -> "ImageView":
        """The same samples under another transform."""
        return ImageView(self.base, self.index, transform)

    def split(self, share: float, seed: int = 0) -> tuple["ImageView", "ImageView"]:
        """Two disjoint random parts, the first with ``share`` of the samples."""
        order = self.index[np.random.default_rng(seed).permutation(len(self))]
        cut = round(share * len(self))
        return ImageView(self.base, order[:cut], self.transform), ImageView(self.base, order[cut:], self.transform)


@dataclass(frozen=True)
class Splits:
    """Disjoint labelled splits and the names of the classes (index = class)."""

    train: ImageView
    calibration: ImageView
    test: ImageView
    classes: tuple[str, ...]


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
        self.images = [Image.fromarray(g).resize((size, size), Image.BICUBIC).convert("RGB") for g in grey]
        self.targets = digits.target

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[Image.Image, int]:
        return self.images[item], int(self.targets[item])


def open_dataset(spec: str, split: str = "validation", root: str | None = None, **kwargs: Any) -> ImageView:
    """One split of a labelled dataset, as PIL images.

    Args:
        spec: a folder in ImageFolder layout, with or without one subfolder per split; a timm dataset such as
            ``torch/cifar100`` or ``hfds/cifar100``; or ``digits``.
        split: name of the split. ``validation`` also finds ``val`` and, where there is neither, ``test``.
        root: where timm datasets lie or are to be put.
        kwargs: go on to ``timm.data.create_dataset``.

    Raises:
        FileNotFoundError, ValueError: there is no such folder or split, or it holds no images or a single class.
    """
    if spec == "digits":
        view = ImageView(_Digits())
        # The order of scikit-learn's file is by writer; a fixed shuffle makes the splits alike.
        train, test = view.split(0.8)
        return train if split in _TRAIN_NAMES else test
    prefix = spec.partition("/")[0].lower() if not Path(spec).exists() else ""
    if prefix in ("tfds", "wds", "hfids"):
        raise ValueError(f"{spec} streams; splits need a dataset with random access (a folder, torch/... or hfds/...).")
    if prefix == "torch" and root is None:
        raise ValueError(f"{spec} needs to know where it lies: give the folder torchvision's files are in (root).")
    if prefix in ("torch", "hfds"):
        return _checked(ImageView(create_dataset(spec, root=root, split=split, **kwargs)), spec)
    folder = Path(spec)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data at {spec!r}: expected a folder of images (one subfolder per class, or train/ and test/ with one "
            "per class), a timm dataset such as torch/cifar100, or digits."
        )
    found = _split_folder(folder, split)
    if found is None:
        raise ValueError(
            f"{spec} has no split {split!r}; it has {', '.join(sorted(p.name for p in folder.iterdir()))}."
        )
    try:
        base = create_dataset("", root=str(found), split=split, search_split=False, **kwargs)
    except RuntimeError as error:  # timm: "Found 0 images"
        raise ValueError(f"{found} holds no images in class subfolders.") from error
    return _checked(ImageView(base), str(found))


def open_splits(spec: str, root: str | None = None, seed: int = 0, calibration: float = 0.2) -> Splits:
    """Training, calibration and test split of a dataset (see ``open_dataset`` for ``spec``).

    The calibration split is cut from the training split at random (its share is ``calibration``). A folder without
    split subfolders is divided 60 / 20 / 20 at random.
    """
    folder = Path(spec)
    if folder.is_dir() and _split_folder(folder, "train") is None:
        whole = open_dataset(spec, "all")
        test, rest = whole.split(0.2, seed)
        calibration *= len(whole) / max(len(rest), 1)
    else:
        rest, test = open_dataset(spec, "train", root), open_dataset(spec, "validation", root)
        names = class_names(rest), class_names(test)
        if names[0] != names[1]:
            raise ValueError(
                f"{spec}: the training split has classes {names[0][:5]}..., the test split {names[1][:5]}..."
            )
    held_out, train = rest.split(calibration, seed + 1)
    return Splits(train, held_out, test, class_names(rest))


def class_names(view: ImageView) -> tuple[str, ...]:
    """Names of the classes of a view, in the order of their indices."""
    base = view.base
    names = getattr(base, "classes", None)
    if names is None and hasattr(base, "reader"):
        mapping = getattr(base.reader, "class_to_idx", None)
        names = sorted(mapping, key=mapping.get) if mapping else None
        if not names and hasattr(base.reader, "dataset"):  # Hugging Face datasets
            feature = base.reader.dataset.features.get(getattr(base.reader, "label_key", "label"))
            names = getattr(feature, "names", None)
    if names is None:
        count = 1 + max(int(base[i][1]) for i in range(len(base)))
        names = [str(i) for i in range(count)]
    return tuple(str(name) for name in names)


def _split_folder(folder: Path, split: str) -> Path | None:
    """Subfolder of ``split``, the folder itself where it has no split subfolders, None where it lacks this split."""
    has_splits = any((folder / name).is_dir() for name in (*_TRAIN_NAMES, *_TEST_NAMES))
    if not has_splits:
        return None if split in _TRAIN_NAMES else folder
    names = (split, *_SPLIT_NAMES.get(split, ()), *(("test",) if split == "validation" else ()))
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _checked(view: ImageView, where: str) -> ImageView:
    if len(view) == 0:
        raise ValueError(f"{where} holds no images.")
    if len(class_names(view)) < 2:
        raise ValueError(
            f"{where} has a single class, {class_names(view)[0]!r}; a classifier needs at least two class subfolders."
        )
    return view
