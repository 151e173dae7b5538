"""Clips from files: videos in a folder per class, or frame folders with list files; and what a model is given of them.

A clip is a sequence of PIL images, one a frame, read when asked for. ``ClipTransform`` picks the frames and makes one
tensor (T, C, H, W) of them, with the same crop and flip on every frame.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from ..exits.reading import text_lines
from .images import EXTENSIONS, MODES, UnreadableImage, read_image

__all__ = [
    "VIDEO_EXTENSIONS",
    "ClipTransform",
    "FrameFolder",
    "FrameLists",
    "MultiScaleCrop",
    "UnreadableClip",
    "VideoFile",
    "VideoFolder",
    "sample_frames",
]

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")


# ---------------------------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------------------------


class UnreadableClip(UnreadableImage):
    """A file that is no video, is damaged or holds no frames; the message names it. It is dealt with as images are."""


class _Frames(Sequence[Image.Image]):
    """A clip as a sequence of its frames: who makes one says how many there are, and how some of them are read."""

    def take(self, indices: Sequence[int]) -> list[Image.Image]:
        """The frames at ``indices``, which may repeat, in their order."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return _choose(self, lambda length: range(length)[index])
        return _choose(self, lambda length: [range(length)[index]])[0]


class VideoFile(_Frames):
    """The frames of a video file, decoded by PyAV (the extra ``video``) when asked for.

    ``take`` decodes from the start to the last frame asked for, once, and keeps no other: exact in every container, and
    quick for the seconds-long clips that are classified. Frames are upright, as players show them: the rotation that a
    telephone writes beside the pictures is applied.

    The length is the number of packets, and where fewer frames than packets come out of a file that ends without an
    error (an edit list hides some, or a cut left some without what they build on), the number of these frames, from
    the first ``take`` that meets it.

    Raises, when read:
        ImportError: PyAV is not installed.
        UnreadableClip: there is no such file, it is no video, or it is damaged; it is named.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._length: int | None = None

    def __repr__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        if self._length is None:
            with self._opened() as (container, stream):
                # Packets are counted without decoding; the number in the header is often missing or wrong.
                self._length = sum(packet.size > 0 for packet in container.demux(stream))
            if self._length == 0:
                raise UnreadableClip(f"{self.path} holds no frames; copy or cut it anew.")
        return self._length

    def __iter__(self) -> Iterator[Image.Image]:
        with self._opened() as (container, stream):
            for frame in container.decode(stream):
                yield _upright(frame)

    def take(self, indices: Sequence[int]) -> list[Image.Image]:
        wanted = {int(index) for index in indices}
        found: dict[int, Image.Image] = {}
        count = 0
        with self._opened() as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                count = index + 1
                if index in wanted:
                    found[index] = _upright(frame)
                    if len(found) == len(wanted):
                        break
        if len(found) < len(wanted):
            missing = max(wanted - found.keys())
            self._length = count or None
            raise UnreadableClip(
                f"{self.path} breaks off: it has no frame {missing}, {count} can be decoded; copy or cut it anew."
            )
        return [found[int(index)] for index in indices]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        try:
            import av
        except ModuleNotFoundError as error:
            raise ImportError("reading video files needs PyAV: pip install 'exit-plugins[video]'") from error
        if not self.path.is_file():
            raise UnreadableClip(f"there is no video {self.path}.")
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise UnreadableClip(f"{self.path} holds no video stream.")
                yield container, container.streams.video[0]
        except av.error.FFmpegError as error:
            raise UnreadableClip(f"{self.path} is no video that can be decoded ({error.strerror}).") from error


class FrameFolder(_Frames):
    """A clip as a folder of numbered images: ``template`` names the frames, from 1 to ``length``.

    Raises, when read:
        UnreadableImage: a frame is missing, or no image; it is named.
    """

    def __init__(self, folder: str | Path, length: int, template: str = "{:05d}.jpg") -> None:
        self.folder, self.length, self.template = Path(folder), length, template

    def __repr__(self) -> str:
        return str(self.folder)

    def __len__(self) -> int:
        return self.length

    def take(self, indices: Sequence[int]) -> list[Image.Image]:
        numbers = range(1, 1 + self.length)
        return [read_image(self.folder / self.template.format(numbers[index])) for index in indices]


def _upright(frame: Any) -> Image.Image:
    """A decoded frame as players show it."""
    image: Image.Image = frame.to_image()
    turned = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }.get(round(frame.rotation) % 360)
    return image if turned is None else image.transpose(turned)


def _choose(clip: Sequence[Image.Image], choice: Callable[[int], Sequence[int]]) -> list[Image.Image]:
    """The frames at ``choice(length)``; a second time where reading shows that the clip is shorter than it seemed."""
    length = len(clip)
    try:
        return _take(clip, choice(length))
    except UnreadableClip:
        if len(clip) == length:
            raise
    return _take(clip, choice(len(clip)))


def _take(clip: Sequence[Image.Image], indices: Sequence[int]) -> list[Image.Image]:
    take = getattr(clip, "take", None)
    return take(indices) if take is not None else [clip[index] for index in indices]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------


class VideoFolder(Dataset):
    """Video files in one subfolder per class: samples are (VideoFile, index of the class).

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no video in it.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no folder of videos at {root}.")
        found = sorted(
            (path for path in root.glob("*/**/*") if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file()),
            key=lambda path: path.relative_to(root).parts,
        )
        if not found:
            raise ValueError(f"no videos in {root}: expected files such as {root / 'CLASS' / 'clip.mp4'}.")
        names = [path.relative_to(root).parts[0] for path in found]
        self.classes = tuple(sorted(set(names)))
        self.samples = [(path, self.classes.index(name)) for path, name in zip(found, names, strict=True)]

    holds_clips = True

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, item: int) -> str:
        return str(self.samples[item][0])

    def __getitem__(self, item: int) -> tuple[VideoFile, int]:
        path, target = self.samples[item]
        return VideoFile(path), target


class FrameLists(Dataset):
    """Something-Something's layout as TSM's tools write it: frame folders, and a list of them for every split.

    A line of the list is ``path num_frames class``: the clip's folder below ``root``, the number of its frames, and the
    index of its class.

    Args:
        list_file: the split's list.
        root: folder that the paths in it start from.
        template: names of the frames; by default what the first clip has (00001.jpg, 000001.jpg or img_00001.jpg).
        classes: names of the classes, or a file with one a line; by default their indices.

    Raises:
        FileNotFoundError: there is no list, or not the first clip.
        ValueError: a line is not of this form, has no frames, or a class without a name; file and line are named.
    """

    def __init__(
        self,
        list_file: str | Path,
        root: str | Path,
        template: str | None = None,
        classes: Sequence[str] | str | Path | None = None,
    ) -> None:
        list_file, self.root = Path(list_file), Path(root)
        if not list_file.is_file():
            raise FileNotFoundError(f"no list of clips at {list_file}.")
        self.samples = [
            _parse(line, f"{list_file}, line {number}")
            for number, line in enumerate(text_lines(list_file), 1)
            if line.strip()
        ]
        if not self.samples:
            raise ValueError(f"{list_file} lists no clips.")
        if isinstance(classes, (str, Path)):
            classes = [line.strip() for line in text_lines(classes) if line.strip()]
        count = 1 + max(target for _, _, target in self.samples)
        self.classes = tuple(classes) if classes is not None else tuple(map(str, range(count)))
        if len(self.classes) < count:
            raise ValueError(f"{list_file} has a class {count - 1}, and there are {len(self.classes)} names.")
        self.template = template or _template(self.root / self.samples[0][0])

    holds_clips = True

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, item: int) -> str:
        return str(self.root / self.samples[item][0])

    def __getitem__(self, item: int) -> tuple[FrameFolder, int]:
        path, length, target = self.samples[item]
        return FrameFolder(self.root / path, length, self.template), target


def holds_videos(folder: Path) -> bool:
    """Whether the first file of a known kind below a folder is a video, and not an image."""
    for _, _, files in os.walk(folder, followlinks=True):
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if ending in VIDEO_EXTENSIONS or ending in EXTENSIONS:
                return ending in VIDEO_EXTENSIONS
    return False


def list_files(folder: Path) -> dict[str, Path]:
    """Something-Something's lists in a folder, by split: ``train_videofolder.txt`` is that of ``train``."""
    return {path.name.partition("_")[0]: path for path in sorted(folder.glob("*_videofolder.txt"))}


def open_list(path: Path, root: str | Path | None = None) -> FrameLists:
    """The clips of a list; the names of the classes from ``category.txt`` beside it, where there is one.

    Otherwise the list for training beside it says how many classes there are: another split may lack the last ones.
    ``root``: where the paths of the list start from, by default the folder of the list.
    """
    names = path.with_name("category.txt")
    if names.is_file():
        return FrameLists(path, root or path.parent, classes=names)
    lists = list_files(path.parent)
    train = lists.get("train", lists.get("training", path))
    # With a template nothing is looked up among the frames, which may not be there.
    classes = None if train == path else FrameLists(train, root or path.parent, template="-").classes
    return FrameLists(path, root or path.parent, classes=classes)


def _parse(line: str, where: str) -> tuple[str, int, int]:
    """``path num_frames class``; the path may hold spaces."""
    match = re.fullmatch(r"(.+?)\s+(\d+)\s+(\d+)", line.strip())
    if match is None:
        raise ValueError(f"{where}: expected 'path num_frames class', got {line.strip()!r}.")
    if int(match[2]) < 1:
        raise ValueError(f"{where}: the clip {match[1]} has no frames.")
    return match[1], int(match[2]), int(match[3])


def _template(folder: Path) -> str:
    """How the frames of a clip are named, after its first one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no frame folder at {folder}; the paths of the list start from another folder.")
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(\D*)(0*1)(\.\w+)", path.name)
        if match is not None:
            return f"{match[1]}{{:0{len(match[2])}d}}{match[3]}"
    raise ValueError(f"{folder} has no first frame such as 00001.jpg.")


# ---------------------------------------------------------------------------------------------------------------------
# What the model is given
# ---------------------------------------------------------------------------------------------------------------------


def sample_frames(length: int, num_frames: int, training: bool = False) -> np.ndarray:
    """Indices (``num_frames``,) of the frames taken of ``length``: one from each of so many equal segments.

    TSM's sampling: in training the frame's position in its segment is random (torch's generator, which loaders seed in
    every worker), otherwise its middle. A clip shorter than ``num_frames`` has frames repeated.

    ValueError if one of the two numbers is below 1.
    """
    if length < 1 or num_frames < 1:
        raise ValueError(f"cannot take {num_frames} frames of {length}.")
    position = torch.rand(num_frames).numpy() if training else np.full(num_frames, 0.5)
    indices = ((np.arange(num_frames) + position) * length / num_frames).astype(np.int64)
    return np.minimum(indices, length - 1)


class MultiScaleCrop(v2.Transform):
    """TSM's training crop: sides of 1, 7/8, 3/4 or 2/3 of the shorter side, at one of 13 places, resized to ``size``.

    Height and width differ by at most one step of these scales.
    """

    scales = (1.0, 0.875, 0.75, 0.66)

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        height, width = v2.functional.get_size(flat_inputs[0])
        sides = [int(min(height, width) * scale) for scale in self.scales]
        pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
        crop_height, crop_width = pairs[int(torch.randint(len(pairs), ()))]
        # Corners, edges and centre in quarters of the room there is, as (down, right).
        places = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(1, 1), (1, 3), (3, 1), (3, 3)]
        down, right = places[int(torch.randint(len(places), ()))]
        return {
            "top": (height - crop_height) * down // 4,
            "left": (width - crop_width) * right // 4,
            "height": crop_height,
            "width": crop_width,
        }

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return v2.functional.resized_crop(
            inpt, **params, size=list(self.size), interpolation=self.interpolation, antialias=True
        )


class ClipTransform:
    """A clip, a sequence of PIL images, to a normalised tensor (``num_frames``, C, H, W).

    Args:
        num_frames: T frames, taken by ``sample_frames``.
        input_size: (C, H, W) of the frames; one channel makes them grey.
        training: random positions and ``MultiScaleCrop``, instead of middles and a centre crop.
        mean, std: as in timm's data configuration.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: share of the shorter side that the centre crop keeps.
        hflip: probability of a mirrored clip in training; 0, since mirroring swaps labels such as "left to right".
        crop: in training, whether to crop at random at all.
    """

    def __init__(
        self,
        num_frames: int,
        input_size: tuple[int, int, int] = (3, 224, 224),
        training: bool = False,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        interpolation: str = "bilinear",
        crop_pct: float = 0.875,
        hflip: float = 0.0,
        crop: bool = True,
    ) -> None:
        channels, *size = input_size
        if channels not in MODES:
            raise ValueError(f"clips are grey or RGB, 1 or 3 channels; got {channels}.")
        self.num_frames, self.training, self.mode = num_frames, training, MODES[channels]
        mode = InterpolationMode(interpolation)
        steps: list[v2.Transform]
        if training and crop:
            steps = [MultiScaleCrop((size[0], size[1]), mode)]
        else:
            steps = [v2.Resize([int(side / crop_pct) for side in size][:: len(size)], mode), v2.CenterCrop(size)]
        if training and hflip:
            steps.append(v2.RandomHorizontalFlip(hflip))
        mean, std = (list(values)[:channels] for values in (mean, std))
        self.pixels = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    @classmethod
    def of_config(cls, config: Mapping[str, Any], training: bool = False, **kwargs: Any) -> "ClipTransform":
        """After ``images.input_config`` of a clip model, whose ``input_size`` is (T, C, H, W)."""
        num_frames, *size = config["input_size"]
        shared = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        return cls(num_frames, tuple(size), training, **shared, **kwargs)

    def __call__(self, clip: Sequence[Image.Image]) -> Tensor:
        taken = _choose(clip, lambda length: sample_frames(length, self.num_frames, self.training).tolist())
        frames = [np.array(frame.convert(self.mode)) for frame in taken]
        stacked = torch.from_numpy(np.stack(frames))
        return self.pixels(stacked.permute(0, 3, 1, 2) if stacked.ndim == 4 else stacked[:, None])
