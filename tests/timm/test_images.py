"""Pictures as they are in the world: each kind of file against the pixels that were put into it."""

import io
from contextlib import suppress

import numpy as np
import pytest
import timm
from PIL import Image, ImageCms

from exit_plugins.timm.data import open_dataset
from exit_plugins.timm.images import UnreadableImage, input_config, read_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def stored(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(file) -> np.ndarray:
    return np.asarray(read_image(file))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert (pixels(stored(deep, kind)) == RAMP).all()
    dark = Image.fromarray(np.full((4, 4), 300, np.uint16))
    assert (pixels(stored(dark, kind)) == 1).all()  # 300 of 65,535, not clipped to white


def test_twelve_bits_and_white_is_zero_in_a_tiff():
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert (pixels(stored(deep, "TIFF", tiffinfo={262: 0})) == 255 - RAMP).all()
    twelve = np.array([0, 4095, 2048, 1024])
    packed = bytes(b for a, c in twelve.reshape(-1, 2) for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255))
    data = stored(Image.fromarray(np.zeros((1, 4), np.uint16)), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        offset = image.tag_v2[273][0]
    data = data[:offset] + packed + data[offset + len(packed) :]
    bits = data.index((258).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")) + 8
    data = data[:bits] + (12).to_bytes(2, "little") + data[bits + 2 :]
    assert pixels(data).tolist() == [[0, 255, 128, 64]]


def test_float_pixels_are_brightness_from_zero_to_one_or_refused():
    assert (pixels(stored(Image.fromarray(RAMP / np.float32(255)), "TIFF")) == RAMP).all()
    for values in (RAMP.astype(np.float32), np.full((2, 2), np.nan, np.float32), np.full((2, 2), -0.5, np.float32)):
        with pytest.raises(UnreadableImage, match=r"x\.tif.*between 0 and 1"):
            read_image(stored(Image.fromarray(values), "TIFF"), "x.tif")
    with pytest.raises(UnreadableImage, match=r"x\.tif.*32-bit integer"):
        read_image(stored(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255
    # How the sensor stored it, by the table of the EXIF standard.
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "TIFF"):
        found = pixels(stored(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif))
        assert found.shape == upright.shape
        assert np.abs(found.astype(int) - upright).max() < 30  # JPEG is lossy


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        found = pixels(stored(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
        assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 1


def test_transparent_pixels_lie_on_white():
    colours = np.zeros((2, 2, 4), np.uint8)  # black under transparency
    colours[0, 0] = (10, 200, 30, 255)
    colours[1, 1] = (0, 0, 0, 128)
    white = 255 - (255 - colours[..., :3].astype(float)) * (colours[..., 3:] / 255)
    assert np.abs(pixels(stored(Image.fromarray(colours), "PNG")) - white).max() <= 1
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    palette.putpalette([10, 200, 30, 0, 0, 0])
    expected = [[[10, 200, 30], [255] * 3], [[255] * 3, [10, 200, 30]]]
    for kind in ("PNG", "GIF"):
        assert pixels(stored(palette, kind, transparency=1)).tolist() == expected
    assert pixels(stored(palette, "PNG", transparency=bytes([255, 0]))).tolist() == expected
    grey = Image.merge("LA", [Image.fromarray(np.array([[7, 7]], np.uint8)), Image.fromarray(np.uint8([[255, 0]]))])
    assert pixels(stored(grey, "PNG")).tolist() == [[[7] * 3, [255] * 3]]


def test_cmyk_goes_through_its_profile(monkeypatch):
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert pixels(stored(cyan, "TIFF"))[0, 0].tolist() == [0, 255, 255]
    # A profile of another colour space, and one that is damaged, are as none.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile"):
        assert pixels(stored(cyan, "TIFF", icc_profile=profile))[0, 0].tolist() == [0, 255, 255]
    asked = []

    def convert(image, source, target, **options):
        asked.append((image.mode, options["outputMode"]))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    assert pixels(stored(cyan, "JPEG", icc_profile=srgb))[0, 0].tolist() == [1, 2, 3] and asked == [("CMYK", "RGB")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is damaged in the files
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_files_are_refused_by_name(kind, tmp_path):
    rng = np.random.default_rng(0)
    whole = stored(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for cut in (0, 10, len(whole) // 2):
        (tmp_path / "short").write_bytes(whole[:cut])
        with pytest.raises(UnreadableImage, match="short"):
            read_image(tmp_path / "short")
    for start in range(8, 200, 7):  # damaged in the middle: read, or refused; never another error
        mixed = whole[:start] + bytes(rng.integers(0, 256, 16, dtype=np.uint8)) + whole[start + 16 :]
        with suppress(UnreadableImage):
            assert read_image(mixed).mode in ("L", "RGB")
    with pytest.raises(UnreadableImage, match=r"there is no image .*nowhere\.png"):
        read_image(tmp_path / "nowhere.png")


def test_folders_are_read_by_the_same_reader(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "deep.tiff").write_bytes(stored(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"))
        (tmp_path / name / "short.png").write_bytes(b"\x89PNG")
    view = open_dataset(str(tmp_path), "all").with_channels(1)
    assert len(view) == 4  # a kind of file timm does not look for, and one it would replace by its neighbour
    for item in range(4):
        if view.name(item).endswith(".tiff"):
            assert (np.asarray(view[item][0]) == RAMP).all()
        else:
            with pytest.raises(UnreadableImage, match=r"short\.png"):
                view[item]


def test_channels_come_from_the_model():
    model = timm.create_model("msdnet_test", in_chans=1)
    config = input_config(model)
    assert config["input_size"] == (1, 32, 32) and len(config["mean"]) == len(config["std"]) == 1
    three = input_config(timm.create_model("msdnet_test"))
    assert config["mean"][0] == pytest.approx(np.mean(three["mean"])) and three["input_size"] == (3, 32, 32)
    assert input_config(model, (48, 40), 0.5)["input_size"] == (1, 48, 40)
    with pytest.raises(ValueError, match="reads images of 1 channels, an input size of 3"):
        input_config(model, (3, 32, 32))
