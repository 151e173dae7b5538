"""The command line on clips: the generated ones, and a video file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import exit_plugins
from exit_plugins.cli import main

av = pytest.importorskip("av")

KWARGS = ["--model-kwargs", "num_frames=3"]
SIZE = ["--input-size", "32"]


def shown(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(7):
            frame = np.full((48, 64, 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_profile_counts_the_frames_and_the_rival_on_clips(capsys):
    counted = [*SIZE, "--no-latency", "--plain", "resnet18", "--json"]
    assert main(["profile", "tsm_dynperceiver_test", *KWARGS, *counted]) == 0
    clips = shown(capsys)
    assert main(["profile", "dynperceiver_test", *counted]) == 0
    images = shown(capsys)
    assert clips["input_size"] == [3, 3, 32, 32] and images["input_size"] == [3, 32, 32]
    assert [e["macs"] for e in clips["exits"]] == pytest.approx([3 * e["macs"] for e in images["exits"]])
    assert clips["plain"]["macs"] == pytest.approx(3 * images["plain"]["macs"])


def test_solve_evaluate_and_predict_take_clips(tmp_path, video, capsys):
    policy = tmp_path / "policy.json"
    common = ["--data", "motion", "--limit", "12", "--batch-size", "4"]
    model = ["tsm_dynperceiver_test", *KWARGS, *SIZE]
    assert main(["solve", *model, *common, "--budget", "90%", "--split", "validation", "--output", str(policy)]) == 0
    assert main(["evaluate", *model, *common, "--split", "test", "--policy", str(policy), "--json"]) == 0
    capsys.readouterr()
    made = exit_plugins.ExitPolicy.load(policy)
    assert made.model["input_size"] == [3, 3, 32, 32] and made.model["classes"] == list(
        exit_plugins.timm.motion.CLASSES
    )

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    # The model, its frames, its size and the names come from the policy.
    assert main(["predict", str(video), str(broken), "--policy", str(policy), "--json"]) == 1
    output = capsys.readouterr()
    (row,) = json.loads(output.out)
    assert row["clip"] == str(video) and row["label"] in made.model["classes"] and row["exit"] in (1, 2, 3, 4)
    assert row["seconds"] > 0 and "broken.mp4 is no video" in output.err
    assert main(["predict", str(tmp_path), "--policy", str(policy)]) == 1
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["label", "confidence", "exit", "MACs", "time", "clip"] and line.endswith(f"  {video}")


def test_damaged_clips_are_named_counted_and_left_out(tmp_path, video, capsys):
    for name in ("ant", "bee"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        shutil.copy(video, tmp_path / "data" / "val" / name / "a.mp4")
    (tmp_path / "data" / "val" / "bee" / "b.mp4").write_bytes(b"no video")
    (tmp_path / "names").write_text("ant\nbee")
    words = ["tsm_dynperceiver_test", *KWARGS, *SIZE, "--data", str(tmp_path / "data"), "--num-classes", "2"]
    words += ["--class-names", str(tmp_path / "names")]
    assert main(["evaluate", *words, "--split", "val"]) == 0
    said = capsys.readouterr().err
    assert "left out: " in said and "b.mp4 is no video" in said and "1 of 3 clips could not be read" in said
    assert main(["solve", *words, "--split", "val", "--budget", "90%", "-o", str(tmp_path / "policy.json")]) == 2
    assert "b.mp4 is no video" in capsys.readouterr().err


def test_clips_and_images_are_not_mixed_up(capsys):
    assert main(["evaluate", "tsm_dynperceiver_test", "--data", "digits", "--num-classes", "10"]) != 0
    assert "the data holds images and the model reads clips" in capsys.readouterr().err
    assert main(["evaluate", "dynperceiver_test", "--data", "motion"]) != 0
    assert "the data holds clips and the model reads images" in capsys.readouterr().err
