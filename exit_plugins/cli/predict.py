"""Classify images or clips under a policy: label, confidence, exit taken and time of each.

What the model reads decides: images, or video files for a model of clips. Every one is run alone, as a service would,
so the time is what it took to reach its exit. The model is the one the policy was made for. Rows are printed as they
come; a file that cannot be read is named on stderr, the others go on, and the exit status is then 1.

example:
  exit-plugins predict photos/*.jpg --policy policy.json --checkpoint model.safetensors --class-names names.txt
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn

from ..exits.adaptive import AdaptiveModel
from ..exits.policy import ExitPolicy, weights_digest
from ..timm.clips import VIDEO_EXTENSIONS, ClipTransform, VideoFile
from ..timm.images import EXTENSIONS, MODES, UnreadableImage, read_image
from .common import add_json_argument, amount
from .models import (
    add_force_argument,
    add_model_arguments,
    class_names_of,
    data_config,
    known_model,
    model_classes,
    open_model,
)
from .tables import check_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="FILE", help="image or video files, or folders of them")
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy file written by solve")
    add_model_arguments(parser, positional=False)
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="text file with one class a line, or data as in --data, for its classes (default: the policy's)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where timm data sets lie")
    add_force_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy)
    shown, args.class_names = class_names_of(args), None  # names to print, whatever the policy calls the classes
    known = known_model(args, policy)
    if args.model is None and known["architecture"] is None:
        raise ValueError("this policy does not say what model it is for; give --model.")
    model = open_model(args, known)
    policy.check_model(model)
    check_weights(policy, weights_digest(model), args.force)
    names = _names(model, known, shown)
    answers = _Answers(model, policy, data_config(args, model, known), names)
    paths = _files(args.images, answers.kind)
    rows = answers.of(paths)
    if args.json:
        _print_json(rows)
    else:
        _print_rows(rows, answers.kind, paths, names, policy.num_exits)
    return 1 if answers.failed else 0


class _Answers:
    """Classifies files one by one."""

    def __init__(self, model: nn.Module, policy: ExitPolicy, config: dict[str, Any], names: Sequence[str]) -> None:
        self.adaptive = AdaptiveModel(model, policy)
        self.kind = "clip" if len(config["input_size"]) == 4 else "image"
        channels = config["input_size"][-3]
        if channels not in MODES:
            raise ValueError(f"{self.kind}s have 1 or 3 channels, the model takes {channels}.")
        if self.kind == "clip":
            transform = ClipTransform.of_config(config)
            self.read = lambda path: transform(VideoFile(path))
        else:
            transform = create_transform(**{**config, "is_training": False})
            self.read = lambda path: transform(read_image(path).convert(MODES[channels]))
        self.device = next(model.parameters()).device
        self.names = names
        self.failed = 0

    def of(self, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """A row for each file that can be read; the others are named on stderr and counted."""
        warm = False
        for path in paths:
            try:
                pixels = self.read(path)[None].to(self.device)
            except UnreadableImage as error:
                self.failed += 1
                print(f"exit-plugins predict: {error}", file=sys.stderr)
                continue
            if not warm:
                self.adaptive(pixels)  # the first run pays for set-up that is no image's
                warm = True
            start = time.perf_counter()
            out = self.adaptive(pixels)
            answer = int(out.logits[0].argmax())  # waits for the device
            seconds = time.perf_counter() - start
            yield {
                self.kind: str(path),
                "class": answer,
                "label": self.names[answer],
                "confidence": None if torch.isnan(out.confidence[0]) else float(out.confidence[0]),
                "exit": int(out.exit_index[0]) + 1,
                "seconds": seconds,
            }


def _print_json(rows: Iterable[dict[str, Any]]) -> None:
    """A JSON list, row by row, closed whatever happens."""
    print("[", end="")
    try:
        for number, row in enumerate(rows):
            print("," * (number > 0) + "\n  " + json.dumps(row, allow_nan=False), end="", flush=True)
    finally:
        print("\n]")


def _print_rows(
    rows: Iterable[dict[str, Any]], kind: str, paths: Sequence[Path], names: Sequence[str], num_exits: int
) -> None:
    """A table whose columns are as wide as anything that may come."""
    widths = (max(5, *(len(str(path)) for path in paths)), max(5, *map(len, names)), 10, 4, 8)

    def show(*cells: str) -> None:
        image, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join([image.strip().ljust(widths[0]), *others]).rstrip(), flush=True)

    show(kind, "label", "confidence", "exit", "time")
    for row in rows:
        sure = "NaN" if row["confidence"] is None else f"{row['confidence']:.3f}"
        show(row[kind], row["label"], sure, f"{row['exit']}/{num_exits}", amount(row["seconds"], "s"))


def _files(arguments: list[str], kind: str) -> list[Path]:
    """The files named and those in the folders named; a file that is not there is found out when it is read."""
    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            endings = VIDEO_EXTENSIONS if kind == "clip" else EXTENSIONS
            inside = sorted(p for p in argument.rglob("*") if p.suffix.lower() in endings)
            if not inside:
                raise ValueError(f"no {kind}s in {argument}.")
            paths += inside
        else:
            paths.append(argument)
    return paths


def _names(model: nn.Module, known: dict[str, Any], shown: list[str] | None) -> list[str]:
    """What to print for each class: the names given, the model's, ImageNet's, or the numbers."""
    if shown is not None:
        if len(shown) != model.num_classes:
            raise ValueError(f"--class-names names {len(shown)} classes, the model has {model.num_classes}.")
        return shown
    names = model_classes(model, known)
    subset = infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    if info is not None and (names is None or names == info.label_names()):
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return names or [str(i) for i in range(model.num_classes)]
