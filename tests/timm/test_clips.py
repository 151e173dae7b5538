"""Clips from files: what is decoded, listed, sampled and cropped, and what is said of files that are broken."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from exit_plugins.timm.clips import (
    ClipTransform,
    FrameFolder,
    FrameLists,
    MultiScaleCrop,
    UnreadableClip,
    VideoFile,
    VideoFolder,
    sample_frames,
)
from exit_plugins.timm.data import open_dataset, open_splits
from exit_plugins.timm.images import UnreadableImage

av = pytest.importorskip("av")


def grey(level: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    return np.full((size[1], size[0], 3), level, np.uint8)


def write_video(
    path: Path,
    levels: list[int],
    size: tuple[int, int] = (64, 48),
    picture: np.ndarray | None = None,
    codec: str = "mpeg4",
) -> Path:
    """A video whose frame i is grey of ``levels[i]``, or ``picture``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            pixels = grey(level, size) if picture is None else picture
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def levels(frames: list[Image.Image]) -> list[float]:
    return [float(np.asarray(frame).mean()) for frame in frames]


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv"])
def test_frames_of_a_video_file_are_those_written(tmp_path, ending):
    written = [10 * i for i in range(23)]
    clip = VideoFile(write_video(tmp_path / f"a.{ending}", written))
    assert len(clip) == 23
    assert levels(list(clip)) == pytest.approx(written, abs=4)
    assert levels(clip.take([3, 20, 3])) == pytest.approx([30, 200, 30], abs=4)
    assert levels([clip[-1]]) == pytest.approx([220], abs=4)
    assert len(pickle.loads(pickle.dumps(clip))) == 23  # as a loader's worker gets it


@pytest.mark.parametrize(
    ("matrix", "place"),
    [
        ((1, 0, 0, 1), lambda x, y, w, h: (x, y)),
        ((0, 1, -1, 0), lambda x, y, w, h: (h - 1 - y, x)),
        ((-1, 0, 0, -1), lambda x, y, w, h: (w - 1 - x, h - 1 - y)),
        ((0, -1, 1, 0), lambda x, y, w, h: (y, w - 1 - x)),
    ],
    ids=["landscape", "portrait", "upside down", "other portrait"],
)
def test_frames_are_upright(tmp_path, matrix, place):
    """``matrix``: (a, b, c, d) of the track header, by which (x, y) is shown at (a x + c y, b x + d y), moved back."""
    pixels = grey(20)
    pixels[:24, :32] = 200  # top left
    path = write_video(tmp_path / "a.mp4", [20] * 3, picture=pixels)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (65536 * value for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(content)
    clip = VideoFile(path)
    shown = np.asarray(clip[1].convert("L"), float)
    assert shown.shape == ((64, 48) if matrix[0] == 0 else (48, 64))
    for x, y in [(8, 8), (56, 8), (8, 40), (56, 40)]:
        right, down = place(x, y, 64, 48)
        assert shown[down, right] == pytest.approx(pixels[y, x, 0], abs=6)
    assert [frame.size for frame in clip] == [clip[0].size] * 3


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", [10 * i for i in range(20)], codec="libx264")
    shift = 8
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                step = packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - shift * step, packet.dts - shift * step, stream
                cut.mux(packet)
    clip = VideoFile(tmp_path / "cut.mp4")
    kept = levels(list(clip))
    assert len(kept) < len(clip)  # there are packets that give no frame
    assert levels([clip[-1]]) == kept[-1:]
    assert len(clip) == len(kept)
    with pytest.raises(IndexError):
        clip[len(kept)]
    # Sampled as a clip of so many frames from the start.
    transform = ClipTransform(4, (3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    expected = [kept[i] for i in sample_frames(len(kept), 4)]
    frames = transform(VideoFile(tmp_path / "cut.mp4"))
    assert (255 * frames.mean((1, 2, 3))).tolist() == pytest.approx(expected, abs=1)


def test_broken_and_missing_videos_are_named(tmp_path):
    whole = write_video(tmp_path / "whole.avi", [10 * i for i in range(20)])
    cases = {"cut.avi": whole.read_bytes()[:40], "empty.avi": b"", "text.avi": b"no video at all" * 50}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableClip, match=name):
            ClipTransform(4, (3, 32, 32))(VideoFile(tmp_path / name))
    # A file whose last frames are gone, after its length was read.
    clip = VideoFile(whole)
    assert len(clip) == 20
    write_video(whole, [0] * 5)
    with pytest.raises(UnreadableClip, match=r"whole.avi breaks off: it has no frame 17"):
        clip.take([2, 17])
    with pytest.raises(UnreadableClip, match="gone.avi"):
        len(VideoFile(tmp_path / "gone.avi"))
    broken = VideoFolder(_folder(tmp_path / "set", broken=True))
    loader = DataLoader(_Transformed(broken, ClipTransform(4, (3, 32, 32))), batch_size=2)
    with pytest.raises(UnreadableClip, match="broken.mp4"):
        list(loader)


def _folder(root: Path, broken: bool = False) -> Path:
    for name in ("walk", "run"):
        for i in range(2):
            write_video(root / name / f"{i}.mp4", [100 + 10 * i] * 6)
    if broken:
        (root / "walk" / "broken.mp4").write_bytes(b"nothing")
    return root


class _Transformed(torch.utils.data.Dataset):
    def __init__(self, base, transform) -> None:
        self.base, self.transform = base, transform

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, item: int):
        clip, target = self.base[item]
        return self.transform(clip), target


def test_a_folder_of_videos_has_a_class_per_subfolder(tmp_path):
    data = VideoFolder(_folder(tmp_path))
    (tmp_path / "run" / "notes.txt").write_text("no video")
    assert data.classes == ("run", "walk") and len(data) == 4 and len(VideoFolder(tmp_path)) == 4
    assert [(clip.path.parent.name, target) for clip, target in (data[i] for i in range(4))] == [
        ("run", 0),
        ("run", 0),
        ("walk", 1),
        ("walk", 1),
    ]
    batch, target = next(iter(DataLoader(_Transformed(data, ClipTransform(8, (3, 32, 32))), batch_size=4)))
    assert batch.shape == (4, 8, 3, 32, 32) and target.tolist() == [0, 0, 1, 1]
    with pytest.raises(FileNotFoundError, match="no folder of videos"):
        VideoFolder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos in"):
        VideoFolder(tmp_path / "empty")


@pytest.fixture
def frames(tmp_path) -> Path:
    """Something-Something's layout: folders of numbered frames, lists, and names of the classes."""
    for name, count in (("100", 9), ("101", 3)):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for i in range(1, count + 1):
            Image.fromarray(grey(10 * i)).save(tmp_path / "frames" / name / f"{i:05d}.jpg")
    (tmp_path / "val_videofolder.txt").write_text("100 9 1\n101 3 0\n")
    (tmp_path / "category.txt").write_text("Pushing something from left to right\nPushing something away\n")
    return tmp_path


def test_frame_folders_are_read_by_their_lists(frames):
    data = FrameLists(frames / "val_videofolder.txt", frames / "frames", classes=frames / "category.txt")
    assert data.classes == ("Pushing something from left to right", "Pushing something away")
    clip, target = data[0]
    assert isinstance(clip, FrameFolder) and len(clip) == 9 and target == 1
    assert levels(list(clip)) == pytest.approx([10 * i for i in range(1, 10)], abs=2)
    assert data.template == "{:05d}.jpg" and len(data) == 2
    assert FrameLists(frames / "val_videofolder.txt", frames / "frames").classes == ("0", "1")


def test_faults_of_lists_and_frames_are_named(frames):
    listed = frames / "val_videofolder.txt"
    (frames / "frames" / "100" / "00005.jpg").unlink()
    clip = FrameLists(listed, frames / "frames")[0][0]
    with pytest.raises(UnreadableImage, match="00005.jpg"):
        clip[4]
    (frames / "frames" / "100" / "00006.jpg").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="00006.jpg"):
        clip[5]
    for text, fault in (("100 nine 1\n", "line 1"), ("\n100 0 1", "line 2.*no frames"), ("", "lists no clips")):
        listed.write_text(text)
        with pytest.raises(ValueError, match=fault):
            FrameLists(listed, frames / "frames")
    listed.write_text("100 9 5\n")
    with pytest.raises(ValueError, match="class 5, and there are 2 names"):
        FrameLists(listed, frames / "frames", classes=frames / "category.txt")
    with pytest.raises(FileNotFoundError, match="no frame folder"):
        FrameLists(listed, frames / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no list of clips"):
        FrameLists(frames / "test_videofolder.txt", frames)


def test_a_split_that_lacks_the_last_class_has_as_many_as_the_training_split(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(grey(20)).save(tmp_path / "a" / "00001.jpg")
    for split, lines in (("train", "a 1 0\na 1 2\n"), ("validation", "a 1 1\n"), ("test", "a 1 3\n")):
        (tmp_path / f"{split}_videofolder.txt").write_text(lines)
    for split in ("train", "validation"):
        assert open_dataset(str(tmp_path), split).classes == ("0", "1", "2")
    with pytest.raises(ValueError, match="has a class 3, and there are 3 names"):
        open_dataset(str(tmp_path), "test")


def test_frames_are_sampled_from_equal_segments():
    # TSM's rule for testing: int(tick / 2 + tick * i) with tick = length / T.
    for length in range(1, 60):
        for count in (1, 3, 8):
            expected = [int(length / count / 2 + length / count * i) for i in range(count)]
            assert sample_frames(length, count).tolist() == expected
    drawn = np.stack([sample_frames(40, 8, training=True) for _ in range(400)])
    for segment in range(8):
        assert set(drawn[:, segment]) == set(range(5 * segment, 5 * segment + 5))
    short = np.stack([sample_frames(3, 8, training=True) for _ in range(50)])
    assert (np.diff(short, axis=1) >= 0).all() and short.min() >= 0 and short.max() <= 2
    with pytest.raises(ValueError, match="cannot take 8 frames of 0"):
        sample_frames(0, 8)


def test_test_transform_is_torchvisions_on_every_frame():
    rng = np.random.default_rng(0)
    clip = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(4)]
    found = ClipTransform(4, (3, 28, 28), crop_pct=0.875)(clip)
    alone = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(32),
            v2.CenterCrop(28),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.testing.assert_close(found, torch.stack([alone(frame) for frame in clip]))
    assert ClipTransform(4, (1, 28, 28), mean=(0.5,), std=(0.5,))(clip).shape == (4, 1, 28, 28)
    assert ClipTransform(4, (3, 28, 60))(clip).shape == (4, 3, 28, 60)
    with pytest.raises(ValueError, match="grey or RGB"):
        ClipTransform(4, (4, 28, 28))


def test_training_crops_alike_on_all_frames_and_never_mirrors_by_itself():
    columns = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 1, 3))
    clip = [Image.fromarray(columns)] * 6
    transform = ClipTransform(6, (3, 24, 24), training=True)
    pixels = torch.stack([transform(clip) for _ in range(40)])
    assert torch.equal(pixels[:, :1].expand_as(pixels), pixels)  # one crop a clip
    assert len({tuple(clip[0, 0, 0, :3].tolist()) for clip in pixels}) > 5  # many of them
    assert (pixels[..., -1] > pixels[..., 0]).all()
    mirrored = ClipTransform(6, (3, 24, 24), training=True, hflip=1.0)(clip)
    assert (mirrored[..., -1] < mirrored[..., 0]).all()
    crop = MultiScaleCrop((24, 24))
    for _ in range(50):
        params = crop.make_params([torch.zeros(6, 3, 48, 64)])
        assert {params["height"], params["width"]} <= {48, 42, 36, 31}
        assert params["top"] + params["height"] <= 48 and params["left"] + params["width"] <= 64


def test_datasets_of_clips_open_by_their_folder(tmp_path, frames):
    for split in ("train", "val"):
        _folder(tmp_path / "videos" / split)
    train, val = (open_dataset(str(tmp_path / "videos"), split) for split in ("train", "validation"))
    assert train.classes == val.classes == ("run", "walk") and train.holds_clips
    assert val.name(0).endswith("val/run/0.mp4")
    tensor, target = val.with_transform(ClipTransform(2, (3, 16, 16)))[3]
    assert tensor.shape == (2, 3, 16, 16) and target == 1
    splits = open_splits(str(tmp_path / "videos"), calibration=0.5)
    assert [len(view) for view in (splits.train, splits.calibration, splits.test)] == [2, 2, 4]
    _folder(tmp_path / "classes")
    assert len(open_dataset(str(tmp_path / "classes"), "all")) == 4
    (frames / "train_videofolder.txt").write_text("101 3 0\n100 9 1\n")
    listed = open_dataset(str(frames), "train", root=str(frames / "frames"))
    assert listed.classes[0].startswith("Pushing") and len(listed[0][0]) == 3
    assert len(open_dataset(str(frames), "validation", root=str(frames / "frames"))) == 2
