"""Frames per second at every exit of a clip model on a video file, at batch 1: whole clips, and a stream.

    python examples/benchmarks/video_speed.py clip.mp4 --threads 1 \\
        --json docs/results/video/speed.json --plot docs/video_speed.png
    python examples/benchmarks/video_speed.py --json docs/results/video/speed.json --plot docs/video_speed.png  # draw

A clip is ``num_frames`` frames taken evenly from the file, which leave together; a stream takes every frame as it comes
and runs each to the exit. Policies are forced to leave at one exit, so weights do not matter and are random: nothing
here says anything about accuracy. Decoding is timed apart.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from torch import Tensor

import exit_plugins  # noqa: F401  registers the models
from exit_plugins import AdaptiveModel, ExitPolicy, exit_costs
from exit_plugins.exits import plots
from exit_plugins.timm.clips import ClipTransform, VideoFile
from exit_plugins.timm.images import input_config
from exit_plugins.timm.video import FrameStream


def leaving_at(index: int, num_exits: int) -> ExitPolicy:
    """The policy by which every sample leaves at one exit."""
    return ExitPolicy([*[np.inf] * index, *[-np.inf] * (num_exits - index)])


def stream_pass(stream: FrameStream, frames: Tensor) -> Callable[[], None]:
    """One run over the frames of a clip, from its first."""

    def run() -> None:
        stream.reset()
        for frame in frames:
            stream(frame)

    return run


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    made = dict(num_frames=args.num_frames, **args.model_kwargs)
    offline = timm.create_model(args.model, **made).eval()
    online = timm.create_model(args.model, online=True, **made).eval().fuse()
    config = input_config(offline)
    size = (args.img_size, args.img_size) if args.img_size else config["input_size"][-2:]
    sample = (args.num_frames, 3, *size)
    video = VideoFile(args.video)
    transform = ClipTransform.of_config({**config, "input_size": sample})
    clip = transform(video)[None]
    costs = exit_costs(offline, sample)
    num_exits = offline.num_exits

    runs: dict[str, Callable[[], Any]] = {
        "decode": lambda: sum(1 for _ in video),
        "prepare": lambda: transform(video),
    }
    for index in range(num_exits):
        policy = leaving_at(index, num_exits)
        adaptive = AdaptiveModel(offline, policy, fuse=True)
        taken = int(adaptive(clip).exit_index)
        assert taken == index, f"asked for exit {index}, taken {taken}"
        runs[f"clip {index}"] = lambda adaptive=adaptive: adaptive(clip)
        runs[f"stream {index}"] = stream_pass(FrameStream(online, policy), clip[0])
    times = interleaved(runs, args.repeats, cpu_time=args.cpu_time)

    def speed(name: str, frames: int) -> dict[str, float]:
        return {**spread(times[name]), "frames_per_second": frames / float(np.median(times[name]))}

    return {
        "machine": machine(),
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "video": {"file": Path(args.video).name, "frames": len(video), "pixels": [video[0].width, video[0].height]},
        "sample": list(sample),
        "clock": "CPU seconds" if args.cpu_time else "wall clock",
        "decode": speed("decode", len(video)),
        "decode_and_prepare_a_clip": spread(times["prepare"]),
        "exits": [
            {
                "exit": index + 1,
                "macs_per_frame": float(costs.macs[index]) / args.num_frames,
                "clip": speed(f"clip {index}", args.num_frames),
                "stream": speed(f"stream {index}", args.num_frames),
            }
            for index in range(num_exits)
        ],
    }


def draw(report: dict[str, Any], path: str) -> None:
    """Frames per second over the MACs of a frame, the exits as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    macs = np.array([row["macs_per_frame"] for row in report["exits"]])
    divisor, prefix = plots.si_unit(macs.max())
    for way, label, marker in (("clip", f"clips of {report['sample'][0]} frames", "o"), ("stream", "a stream", "s")):
        speeds = [row[way]["frames_per_second"] for row in report["exits"]]
        axes.plot(macs / divisor, speeds, marker=marker, label=f"{label}, exits 1 to {len(macs)}")
    axes.set(xlabel=f"MACs per frame ({prefix})", ylabel="frames per second", title=report["model"])
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    plots.save(figure, path)
    print(f"drawn to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="video file; without one the picture is drawn from --json")
    parser.add_argument("--model", default="tsm_dynperceiver_resnet50_0_5x")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json")
    parser.add_argument("--plot", help="picture to draw")
    add_clock_arguments(parser)
    args = parser.parse_args()
    if args.video:
        use_clock(args)
        report = measure(args)
        decode = report["decode"]["frames_per_second"]
        print(f"{report['model']}, {report['video']['file']}: decoding {decode:.1f} frames/s")
        for row in report["exits"]:
            print(
                f"exit {row['exit']}: {row['macs_per_frame'] / 1e9:6.3f}G MACs a frame, clips "
                f"{row['clip']['frames_per_second']:7.1f} frames/s, stream {row['stream']['frames_per_second']:7.1f}"
            )
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, report)
    elif args.json and args.plot:
        report = json.loads(Path(args.json).read_text())
    else:
        parser.error("give a video file to measure, or --json and --plot to draw what was measured.")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    main()
