"""Some samples of a labelled dataset: which ones, how they are read, and how their classes are numbered."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import MODES, UnreadableImage, read_image

__all__ = ["ImageFiles", "ImageView", "class_names"]


@dataclass(eq=False)
class ImageView(Dataset):
    """Some samples of a dataset of (PIL image, class index) pairs, or of clips, under a transform of their own.

    Attributes:
        base: the dataset, as torch's: with a length and items; ``classes`` and ``name(item)`` where it has them.
        index: (N,) the samples of it that are seen; default all.
        transform: from a PIL image to whatever is wanted.
        classes: names of the classes, index = class; None takes the base's own.
        channels: 3 for RGB images, 1 for grey ones; None leaves them as they are.
    """

    base: Any
    index: NDArray[Any] = None  # type: ignore[assignment]  # all of them, once it is made
    transform: Callable | None = None
    classes: tuple[str, ...] = None  # type: ignore[assignment]  # the base's, once it is made
    channels: int | None = 3

    def __post_init__(self) -> None:
        self.index = np.arange(len(self.base)) if self.index is None else np.asarray(self.index)
        own = _own_classes(self.base)
        self.classes = tuple(map(str, (own or _numbers(self.base)) if self.classes is None else self.classes))
        if self.channels is not None and self.channels not in MODES:
            raise ValueError(f"images have 1 or 3 channels, the model takes {self.channels}.")
        self._number = None if own in (None, self.classes) else _numbering(own, self.classes)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, target = self.base[int(self.index[item])]
        if self.channels is not None and isinstance(image, Image.Image):
            image = image.convert(MODES[self.channels])
        if self.transform is not None:
            image = self.transform(image)
        return image, int(target) if self._number is None else self._number[int(target)]

    @property
    def own_classes(self) -> tuple[str, ...]:
        """Names of the classes this dataset has, which ``with_classes`` may have put among others."""
        return _own_classes(self.base) or self.classes

    @property
    def named(self) -> bool:
        """Whether the dataset names its classes; ``classes`` are plain numbers where it does not."""
        return _own_classes(self.base) is not None

    def name(self, item: int) -> str:
        """What a sample is called: its file where it has one."""
        number = int(self.index[item])
        return self.base.name(number) if callable(getattr(self.base, "name", None)) else f"image {number}"

    @property
    def holds_clips(self) -> bool:
        """Whether its samples are clips, sequences of PIL images, and not images."""
        return getattr(self.base, "holds_clips", False)

    def subset(self, index: Sequence[int] | NDArray[Any]) -> "ImageView":
        """The samples at these places of the view (integers, or a boolean mask)."""
        return replace(self, index=self.index[np.asarray(index)])

    def with_transform(self, transform: Callable[[Image.Image], Tensor] | None) -> "ImageView":
        """The same samples under another transform."""
        return replace(self, transform=transform)

    def with_channels(self, channels: int) -> "ImageView":
        """The same samples as images of 3 channels (RGB) or 1 (grey)."""
        return replace(self, channels=channels)

    def with_classes(self, classes: Sequence[str]) -> "ImageView":
        """The same samples, their classes numbered as in ``classes``, by name.

        Raises:
            ValueError: there are samples of a class that is not among them, or a name is there twice.
        """
        own = _own_classes(self.base)
        foreign = [name for name in own or self.classes if name not in set(map(str, classes))]
        if foreign:
            raise ValueError(
                f"the data has {_listed('class', foreign)}, which the model does not know; it knows "
                f"{_listed('class', classes)}."
            )
        return replace(self, classes=tuple(classes))

    def split(self, share: float, seed: int = 0) -> tuple["ImageView", "ImageView"]:
        """Two disjoint random parts, the first with ``share`` of the samples."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = round(share * len(self))
        return self.subset(order[:cut]), self.subset(order[cut:])


def class_names(view: ImageView) -> tuple[str, ...]:
    """Names of the classes of a view, in the order of their indices."""
    return view.classes


class ImageFiles(Dataset):
    """The files a timm reader finds, read by this package's reader of images."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, item: int) -> tuple[Image.Image, int]:
        try:
            file, target = self.reader[item][:2]
        except OSError as error:
            raise UnreadableImage(f"cannot read the image {self.name(item)}: {error.strerror}.") from error
        with file:
            return read_image(file, self.name(item)), target

    def name(self, item: int) -> str:
        return self.reader.filename(item, absolute=True) or f"image {item}"


def _own_classes(base: Any) -> tuple[str, ...] | None:
    """The dataset's own names of its classes, None where it has none."""
    names = getattr(base, "classes", None)
    if names is None and hasattr(base, "reader"):
        mapping = getattr(base.reader, "class_to_idx", None)
        names = sorted(mapping, key=mapping.get) if mapping else None
        if not names and hasattr(base.reader, "dataset"):  # Hugging Face datasets
            feature = base.reader.dataset.features.get(getattr(base.reader, "label_key", "label"))
            names = getattr(feature, "names", None)
    return None if names is None else tuple(str(name) for name in names)


def _numbering(own: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The number in ``classes`` of each of the dataset's own, -1 for one that is not there.

    ValueError where a name is there twice: which of the two is meant, a name cannot say.
    """
    for whose, names in (("the data", own), ("the list of classes", classes)):
        twice = sorted({name for name, count in Counter(names).items() if count > 1})
        if twice:
            raise ValueError(
                f"{whose} has two classes called {twice[0]!r} (of {len(names)}), so labels cannot be matched by name; "
                "give every class a name of its own."
            )
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers.get(name, -1) for name in own]


def _numbers(base: Any) -> list[str]:
    """Names for classes that have none: their numbers."""
    targets = getattr(base, "targets", None)
    if targets is None and hasattr(getattr(base, "reader", None), "iter_targets"):
        targets = base.reader.iter_targets()
    if targets is None:
        targets = (base[i][1] for i in range(len(base)))
    return [str(i) for i in range(1 + max(map(int, targets), default=-1))]


def _listed(what: str, names: Sequence[str], most: int = 5) -> str:
    plural = {"class": "classes"}.get(what, what)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"the {what if len(names) == 1 else plural} {', '.join(map(repr, names[:most]))}{more}"
