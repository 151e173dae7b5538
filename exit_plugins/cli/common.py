"""What the commands share: opening data, costs, and printing."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose, Grayscale

from ..exits.files import check_apart, check_folder, check_target
from ..exits.schema import plain
from ..timm.clips import VIDEO_EXTENSIONS, ClipTransform
from ..timm.data import ImageView, class_names, open_dataset
from ..timm.images import EXTENSIONS
from .models import device_of, number, whole
from .modes import MODES

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def add_data_arguments(
    parser: argparse.ArgumentParser, splits: Sequence[str], max_bad: int | None = None, required: bool = False
) -> None:
    """``splits``: the default, the first of them there is. ``max_bad``: unreadable images left out, None for any."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        metavar="DATA",
        help="folder of class subfolders, any timm data set (torch/cifar100, hfds/..., wds/..., tfds/...), or digits; "
        "for models of clips videos in class subfolders, a folder with Something-Something's lists, or motion",
    )
    group.add_argument("--data-dir", metavar="DIR", help="where timm data sets lie")
    group.add_argument(
        "--split",
        default=tuple(splits),
        metavar="SPLIT",
        help=f"(default: {', or where there is none '.join(splits)})",
    )
    group.add_argument(
        "--holdout",
        type=number(0, 1, open_below=True, open_above=True),
        metavar="SHARE",
        help="cut the splits that are missing: a folder of classes gives SHARE of its images to test and to validation "
        "each; where one of the two is there, the other is cut from it",
    )
    group.add_argument("--holdout-seed", type=int, default=0, metavar="N", help="of that choice (default: 0)")
    group.add_argument(
        "--class-names",
        metavar="FILE",
        help="names of the model's classes, one a line by index, or data as in --data whose classes they are (default: "
        "those of the policy, the table or the card beside the checkpoint)",
    )
    group.add_argument(
        "--max-bad",
        type=whole(0),
        default=math.inf if max_bad is None else max_bad,
        metavar="N",
        help="leave out at most N unreadable images, each named "
        + ("(default: any number)" if max_bad is None else f"(default: {max_bad})"),
    )
    group.add_argument("--batch-size", type=whole(1), default=64, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--workers", type=whole(0), default=0, metavar="N", help="loader processes (default: %(default)s)"
    )
    group.add_argument("--limit", type=whole(1), metavar="N", help="use N images of the split, drawn at random")


def add_confidence_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", choices=("max_softmax", "entropy", "margin"), help="confidence (default: max_softmax)"
    )


class _Stream(IterableDataset[tuple[Any, int]]):
    """A timm data set without random access, transformed."""

    def __init__(self, base: Any, transform: Any) -> None:
        base.transform = transform
        self.base = base

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, target in self.base:
            yield image, int(target)


def open_data(args: argparse.Namespace, split: str | None = None) -> tuple[Any, tuple[str, ...]]:
    """(data set of PIL images, names of its classes); the names are empty for a data set that streams."""
    split = split or args.split
    if args.data.split("/")[0] in ("tfds", "wds", "hfids") and not Path(args.data).exists():
        split = split if isinstance(split, str) else split[0]
        return create_dataset(args.data, root=args.data_dir, split=split, batch_size=args.batch_size), ()
    view = open_dataset(args.data, split, args.data_dir, args.holdout, args.holdout_seed)
    if args.limit and args.limit < len(view):
        view = view.subset(np.sort(np.random.default_rng(0).permutation(len(view))[: args.limit]))
    return view, class_names(view)


def make_loader(data: Any, args: argparse.Namespace, config: dict[str, Any]) -> DataLoader[Any]:
    """Batches of images as the model of this preprocessing reads them; an unreadable image is an error."""
    return DataLoader(transformed(data, config), args.batch_size, num_workers=args.workers)


def transformed(data: Any, config: dict[str, Any]) -> Dataset[Any]:
    of_clips = len(config["input_size"]) == 4
    if of_clips != getattr(data, "holds_clips", False):
        kinds = ("images", "clips") if of_clips else ("clips", "images")
        raise ValueError(f"the data holds {kinds[0]} and the model reads {kinds[1]}.")
    if of_clips:
        clips: Dataset[Any] = data.with_transform(ClipTransform.of_config(config))
        return clips
    transform, channels = create_transform(**{**config, "is_training": False}), config["input_size"][0]
    if isinstance(data, ImageView):
        return data.with_channels(channels).with_transform(transform)
    return _Stream(data, Compose([Grayscale(1), transform]) if channels == 1 else transform)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are written
# ---------------------------------------------------------------------------------------------------------------------

# Of the files in a folder that is read: those that are, whichever command reads it.
_READ_ENDINGS = (*EXTENSIONS, *VIDEO_EXTENSIONS, ".safetensors", ".bin", ".pt", ".pth", ".onnx", ".xml")
_READ_NAMES = ("config.json", "export.json")


class Output(NamedTuple):
    """A file, or a folder, that a command writes, and the argument that names it."""

    argument: str
    path: str | Path
    is_folder: bool = False


def check_outputs(args: argparse.Namespace, outputs: Sequence[Output]) -> None:
    """Before the work: ValueError or OSError where what is to be written cannot be, or is what the command reads.

    Whatever else the arguments name counts as read, so that no command has to say it of each.
    """
    if not is_main():
        return
    ours = {output.argument for output in outputs}
    values = [value for name, value in vars(args).items() if name not in ours]
    texts = [text for value in values for text in (value if isinstance(value, (list, tuple)) else [value])]
    read = [text.removeprefix("local-dir:") for text in texts if isinstance(text, str) and text]
    for place, output in enumerate(outputs):
        check_apart(output.path, [*read, *(other.path for other in outputs[:place])])
        if output.is_folder:
            check_folder(output.path)
        else:
            check_apart(output.path, _read_within(output.path, read))
            check_target(output.path)


def _read_within(path: str | Path, folders: Sequence[str]) -> list[Path]:
    """The file at ``path``, if there is one and it is what is read of one of the folders around it."""
    found = Path(path).resolve()
    if not found.is_file() or not (found.suffix.lower() in _READ_ENDINGS or found.name in _READ_NAMES):
        return []
    return [found for folder in folders if os.path.isdir(folder) and Path(folder).resolve() in found.parents][:1]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def start_processes(args: argparse.Namespace) -> None:
    """Join the other processes when torchrun or accelerate started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        device = device_of(args)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------------


def add_cost_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """``several``: latency may be asked for at more than one batch size, each with an outcome of its own."""
    parser.add_argument(
        "--cost",
        choices=("macs", "latency"),
        default="macs",
        help="what budgets are in: MACs, or seconds per image measured now on this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--cost-batch",
        type=whole(1),
        nargs="+" if several else 1,
        default=[1],
        metavar="N",
        help="batch size latency is measured at"
        + ("; of several, each gets a policy of its own (-o p.json: p-b1.json, p-b8.json)" if several else ""),
    )
    parser.add_argument(
        "--cost-mode",
        choices=[mode for mode in MODES if mode != "channels_last"],  # no mode of a run that goes by a name
        default="fused",
        help="form latency is measured in, see profile --modes (default: %(default)s)",
    )


_AMOUNT = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|[kKMGT]?|ms|us|s)", re.IGNORECASE)
_UNITS = {"s": {"ms": 1e-3, "us": 1e-6, "s": 1.0}, "MACs": {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}}
_HINTS = {"s": "in seconds: 0.012, 12ms, 800us", "MACs": "in MACs: 0.4e9, 400M, 0.4G"}


def parse_budget(text: str, costs: NDArray[Any], unit: str) -> float:
    """A number of ``unit`` ("MACs" or "s", what ``costs`` are in), or ``60%`` of the last exit's cost.

    ValueError for another unit: MACs in seconds, or the other way round, are a budget that means nothing.
    """
    match = _AMOUNT.fullmatch(text.strip())
    try:
        value = float(match[1]) if match else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a budget; write 0.4e9, 400M, 0.4G, 12ms or 60%.") from None
    suffix = match[2].lower() if match else ""
    if suffix == "%":
        value *= float(costs[-1]) / 100
    elif suffix:
        if suffix not in _UNITS[unit]:
            cost = "--cost macs, the default" if unit == "MACs" else "--cost latency"
            raise ValueError(
                f"the budget {text!r} is not in the unit of {cost}; write it {_HINTS[unit]}, or as 60% of the last "
                "exit's cost, or give the other --cost."
            )
        value *= _UNITS[unit][suffix]
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a budget is a positive, finite cost, got {text!r}.")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------------------------


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")


def print_json(value: Any) -> None:
    print(json.dumps(plain(value, "the answer"), indent=2, allow_nan=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], file: Any = None) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=file or sys.stdout)


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def amount(value: float, unit: str) -> str:
    """1.23e8, "MACs" -> "123.0 MMACs"."""
    from ..exits.plots import si_unit

    divisor, prefix = si_unit(value)
    return f"{value / divisor:.4g} {prefix}{unit}"
