"""Classify images under a policy: label, confidence, exit taken and time of each.

Every image is run alone, as a service would, so the time is what it took to reach its exit. The model is the one the
policy was made for.

example:
  exit-plugins predict photos/*.jpg --policy policy.json --checkpoint model.safetensors --class-names names.txt
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform

from ..exits.adaptive import AdaptiveModel
from ..exits.policy import ExitPolicy
from ..timm.data import class_names, open_dataset
from .common import add_json_argument, add_model_arguments, amount, data_config, open_model, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy file written by solve")
    add_model_arguments(parser, positional=False)
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="text file with one class a line, or data as in --data (its classes' names)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where timm data sets lie")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy)
    about = policy.model or {}
    name = args.model or about.get("architecture")
    if name is None:
        raise ValueError("this policy does not say what model it is for; give --model.")
    paths = _image_files(args.images)
    model = open_model(args, name, num_classes=about.get("num_classes"))
    names = _names(args, model.num_classes)
    adaptive = AdaptiveModel(model, policy)
    transform = create_transform(**{**data_config(args, model), "is_training": False})
    device = next(model.parameters()).device
    found = []
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels = transform(image.convert("RGB"))[None].to(device)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not an image PIL can read.") from error
        if i == 0:
            adaptive(pixels)  # the first run pays for set-up that is no image's
        start = time.perf_counter()
        out = adaptive(pixels)
        answer = int(out.logits[0].argmax())  # waits for the device
        seconds = time.perf_counter() - start
        found.append(
            {
                "image": str(path),
                "class": answer,
                "label": names[answer] if answer < len(names) else str(answer),
                "confidence": None if torch.isnan(out.confidence[0]) else float(out.confidence[0]),
                "exit": int(out.exit_index[0]) + 1,
                "seconds": seconds,
            }
        )
    if args.json:
        print_json(found)
        return 0
    print_table(
        ["image", "label", "confidence", "exit", "time"],
        [
            [
                row["image"],
                row["label"],
                "NaN" if row["confidence"] is None else f"{row['confidence']:.3f}",
                f"{row['exit']}/{policy.num_exits}",
                amount(row["seconds"], "s"),
            ]
            for row in found
        ],
    )
    return 0


def _image_files(arguments: list[str]) -> list[Path]:
    endings = set(Image.registered_extensions())
    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            inside = sorted(p for p in argument.rglob("*") if p.suffix.lower() in endings)
            if not inside:
                raise ValueError(f"no images in {argument}.")
            paths += inside
        elif argument.is_file():
            paths.append(argument)
        else:
            raise FileNotFoundError(f"no image at {argument}.")
    return paths


def _names(args: argparse.Namespace, num_classes: int) -> list[str]:
    if args.class_names is None:
        if num_classes == 1000:
            info = ImageNetInfo()
            return [info.index_to_description(i) for i in range(1000)]
        return []
    if Path(args.class_names).is_file():
        names = Path(args.class_names).read_text().split("\n")
        names = [name.strip() for name in names if name.strip()]
    else:
        names = list(class_names(open_dataset(args.class_names, root=args.data_dir)))
    if len(names) != num_classes:
        raise ValueError(f"{args.class_names} names {len(names)} classes, the model has {num_classes}.")
    return names
