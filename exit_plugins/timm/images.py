"""From a file to what a model reads: one reader of images for every door, so that a picture is the same everywhere.

What it decides, where files in the world differ:

* The first frame of an animation, the first page of a TIFF.
* EXIF orientation is applied.
* 16-bit grey is scaled to 8 bits (PIL's own conversion clips it to white); grey of fewer bits in 16-bit words (12-bit
  TIFF) by its own range. Float pixels are brightness from 0 to 1; any others, and 32-bit integers, have no agreed
  range and are refused.
* CMYK goes through its embedded profile where it has one. Profiles of RGB images are left aside, as timm and
  torchvision do.
* Transparent pixels lie on white, as viewers show them; the colours stored under them mean nothing.
"""

import io
import os
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps
from timm.data import resolve_data_config
from timm.models import get_model_input_config

from ..exits.clips import sample_size
from ..exits.digests import describe_model
from ..exits.reading import UnreadableFile
from ._host import TimmModel

__all__ = ["EXTENSIONS", "MODES", "UnreadableImage", "input_config", "read_image"]

# Endings of files that are looked at as images in folders. What is among them and cannot be read is an error that
# names the file; what is not is no image.
EXTENSIONS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)

# Channels of a model's input -> PIL mode of its images.
MODES = {1: "L", 3: "RGB"}

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0


class UnreadableImage(UnreadableFile):
    """A file that is no image, is damaged, or holds pixels of unknown meaning; the message names it and says why."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker raises it anew, with its own traceback as the message.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_image(file: str | os.PathLike | bytes | IO[bytes], name: str | None = None) -> Image.Image:
    """The picture in a file, as 8-bit grey (mode ``L``) or ``RGB``, upright.

    Args:
        file: a path, the bytes of a file, or an open binary file.
        name: what errors call it; default the path.

    Raises:
        UnreadableImage: there is no picture, it is damaged, or its pixels have no agreed range.
    """
    if name is None:
        name = "the image" if isinstance(file, bytes) or hasattr(file, "read") else os.fspath(file)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            return _eight_bits(image)
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"{name} is not an image PIL can read.") from error
    except FileNotFoundError as error:
        raise UnreadableImage(f"there is no image {name}.") from error
    except OSError as error:
        # Of the file itself (no such file, permission) the system's own words; else PIL's (truncated, broken).
        raise UnreadableImage(f"cannot read the image {name}: {error.strerror or error}.") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{name} is too large an image: {error}.") from error
    # Decoders of damaged files raise whatever comes to them: ValueError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise UnreadableImage(f"cannot read the image {name}: {error or type(error).__name__}.") from error


def input_config(
    model: TimmModel, input_size: Sequence[int] | None = None, crop_pct: float | None = None
) -> dict[str, Any]:
    """timm's preprocessing of a model, in as many channels as the model reads.

    timm takes the channels from the pretrained configuration, which says three of a model built for one. Mean and
    deviation of other channels are the average of those given.

    Args:
        input_size: (height, width), or (channels, height, width); default the model's.
        crop_pct: share of the resized image that is kept; default the model's.

    Returns:
        ``input_size`` (C, H, W), ``mean`` and ``std`` (C,), ``interpolation``, ``crop_pct`` and ``crop_mode``, as
        ``timm.data.create_transform`` takes them. Of a model of clips, ``input_size`` is (T, C, H, W), and
        ``clips.ClipTransform.of_config`` takes them.

    Raises:
        ValueError: the model reads another number of channels than asked for.
    """
    config = resolve_data_config({} if crop_pct is None else {"crop_pct": crop_pct}, model=model)
    channels = describe_model(model)["in_chans"] or config["input_size"][0]
    if input_size is None:  # timm's preprocessing is of the size the weights are from, not that the model was built for
        input_size = get_model_input_config(model)["input_size"][-2:]
    size = tuple(config["input_size"] if input_size is None else input_size)
    if input_size is not None and len(size) == 3 and size[0] != channels:
        raise ValueError(f"the model reads images of {channels} channels, an input size of {size[0]} was asked for.")
    config["input_size"] = sample_size(model, (channels, *size[-2:]))
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def _eight_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    bits, inverted = tags.get(_BITS, (16,))[0], tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    profile, source = image.info.get("icc_profile"), image.format
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and source in ("PNG", "PPM")):
        # Pillow says "I" of 16-bit PNGs in older versions, and of PGMs, which it scales to 16 bits.
        return _scaled(np.asarray(image).astype(np.float64), float(2**bits - 1), inverted)
    if image.mode == "I":
        raise ValueError("32-bit integer pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode == "F":
        return _scaled(np.asarray(image, dtype=np.float64), 1.0, inverted)
    if image.mode == "CMYK" and profile:
        return _through_profile(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF says nothing about the pixels, and Pillow has no one error for it
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _scaled(values: np.ndarray, most: float, inverted: bool) -> Image.Image:
    """Grey values from 0 to ``most`` as 8 bits."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= most):  # NaN too
        raise ValueError(
            f"its pixels go from {low:g} to {high:g}, and grey levels of this kind lie between 0 and {most:g}; scale "
            "them, or save it with 8 or 16 bits"
        )
    values = (most - values if inverted else values) * (255.0 / most)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None  # it is, unless it was to change the image in place
        return converted
    except (ImageCms.PyCMSError, OSError):  # damaged, or of another colour space: as if there were none
        return image.convert("RGB")
