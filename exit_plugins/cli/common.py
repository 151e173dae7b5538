"""What the commands share: opening models and data, costs, and printing."""

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import load_checkpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..exits.costs import exit_costs, exit_latency
from ..exits.evaluation import check_same_confidence
from ..exits.policy import ExitPolicy
from ..exits.protocol import check_multi_exit
from ..exits.table import ExitTable, collect_exits
from ..timm.data import ImageView, class_names, open_dataset

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    group = parser.add_argument_group("model")
    what = "timm name of a multi-exit model, or local-dir:FOLDER, hf-hub:NAME"
    if positional:
        parser.add_argument("model", metavar="MODEL", help=what)
    else:
        group.add_argument("--model", metavar="MODEL", help=what + " (default: the policy's)")
    group.add_argument("--checkpoint", metavar="FILE", help="weights (safetensors, or a training checkpoint)")
    group.add_argument("--pretrained", action="store_true", help="published weights")
    group.add_argument("--num-classes", type=int, metavar="N", help="default: those of the data, or the model's own")
    group.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="more arguments of the model, e.g. in_chans=1",
    )
    group.add_argument(
        "--input-size", type=_input_size, metavar="SIZE", help="224, or 3,224,224 (default: the model's)"
    )
    group.add_argument("--crop-pct", type=float, metavar="P", help="share of the resized image that is kept")
    group.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")


def _input_size(text: str) -> tuple[int, int, int]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) == 1:
        sizes = (3, sizes[0], sizes[0])
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size like 224 nor channels,height,width")
    return sizes


def open_model(
    args: argparse.Namespace, name: str | None = None, num_classes: int | None = None, needs_weights: bool = True
) -> nn.Module:
    """The multi-exit model the arguments name, in evaluation mode on the device asked for.

    ``num_classes`` is the data's; ``needs_weights=False`` where only its costs are wanted.
    """
    kwargs = {}
    for pair in args.model_kwargs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--model-kwargs takes NAME=VALUE, got {pair!r}.")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    classes = args.num_classes or num_classes
    if classes:
        kwargs["num_classes"] = classes
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}.")
    name = name or args.model
    if ":" not in name and not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
        raise ValueError(f"timm knows no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "."))
    model = timm.create_model(name, pretrained=args.pretrained, **kwargs)
    check_multi_exit(model)
    if args.checkpoint:
        _load_weights(model, name, args.checkpoint)
    if needs_weights and not args.checkpoint and not args.pretrained and ":" not in name:
        print(f"warning: {name} has random weights; give --checkpoint or --pretrained.", file=sys.stderr)
    return model.to(device_of(args)).eval()


def _load_weights(model: nn.Module, name: str, checkpoint: str) -> None:
    """Strictly; torch names every tensor that does not fit, a line should do."""
    try:
        load_checkpoint(model, checkpoint)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        first = faults[0] if len(faults[0]) < 160 else faults[0][:160] + "..."
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(
            f"{checkpoint} does not fit {name} with {getattr(model, 'num_classes', '?')} classes: {first}{more}; check "
            "the name, --num-classes and --model-kwargs."
        ) from error


def device_of(args: argparse.Namespace) -> torch.device:
    if args.device:
        return torch.device(args.device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def data_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing of the model, with what the arguments change of it."""
    asked = {"input_size": args.input_size, "crop_pct": args.crop_pct}
    return resolve_data_config({key: value for key, value in asked.items() if value is not None}, model=model)


# ---------------------------------------------------------------------------------------------------------------------
# Data and tables
# ---------------------------------------------------------------------------------------------------------------------


def add_data_arguments(parser: argparse.ArgumentParser, split: str, required: bool = False) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        metavar="DATA",
        help="folder of class subfolders, any timm data set (torch/cifar100, hfds/..., wds/..., tfds/...), or digits",
    )
    group.add_argument("--data-dir", metavar="DIR", help="where timm data sets lie")
    group.add_argument("--split", default=split, metavar="SPLIT", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes (default: %(default)s)")
    group.add_argument("--limit", type=int, metavar="N", help="use N images of the split, drawn at random")


def add_confidence_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", choices=("max_softmax", "entropy", "margin"), help="confidence (default: max_softmax)"
    )


class _Stream(IterableDataset):
    """A timm data set without random access, transformed."""

    def __init__(self, base: Any, transform: Any) -> None:
        base.transform = transform
        self.base = base

    def __iter__(self):
        for image, target in self.base:
            yield image, int(target)


def open_data(args: argparse.Namespace, split: str | None = None) -> tuple[Any, tuple[str, ...]]:
    """(data set of PIL images, names of its classes); the names are empty for a data set that streams."""
    split = split or args.split
    if args.data.split("/")[0] in ("tfds", "wds", "hfids") and not Path(args.data).exists():
        return create_dataset(args.data, root=args.data_dir, split=split, batch_size=args.batch_size), ()
    view = open_dataset(args.data, split, args.data_dir)
    names = class_names(view)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be positive, got {args.limit}.")
    if args.limit and args.limit < len(view):
        chosen = np.sort(np.random.default_rng(0).permutation(len(view))[: args.limit])
        view = ImageView(view.base, view.index[chosen], view.transform)
    return view, names


def make_loader(data: Any, args: argparse.Namespace, config: dict[str, Any]) -> DataLoader:
    transform = create_transform(**{**config, "is_training": False})
    dataset: Dataset = data.with_transform(transform) if isinstance(data, ImageView) else _Stream(data, transform)
    return DataLoader(dataset, args.batch_size, num_workers=args.workers)


def collect(
    model: nn.Module,
    data: Any,
    args: argparse.Namespace,
    measure: str = "max_softmax",
    temperatures: Sequence[float] | None = None,
    keep_logits: bool = True,
    save: str | None = None,
) -> ExitTable:
    """The exit table of a data set; with ``save`` it is written there, and an interrupted run goes on where it was."""
    return collect_exits(
        model,
        make_loader(data, args, data_config(args, model)),
        measure=measure,
        temperatures=temperatures,
        keep_logits=keep_logits,
        part_file=f"{save}.part" if save else None,
        save_as=save,
    )


def fit_table(table: ExitTable, policy: ExitPolicy) -> ExitTable:
    """The table under the policy's confidence measure and temperatures."""
    try:
        check_same_confidence(policy, table)
    except ValueError:
        table = table.with_confidence(policy.measure, policy.temperatures.tolist())
    return table


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


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cost",
        choices=("macs", "latency"),
        default="macs",
        help="what budgets are in: MACs, or seconds per image measured now on this machine (default: %(default)s)",
    )
    parser.add_argument("--cost-batch", type=int, default=1, metavar="N", help="batch size latency is measured at")


def costs_of(args: argparse.Namespace, model: nn.Module) -> tuple[np.ndarray, str]:
    """Cumulative cost (K,) per image and its unit."""
    size = data_config(args, model)["input_size"]
    if args.cost == "macs":
        return exit_costs(model, size).macs, "MACs"
    batch = torch.randn((args.cost_batch, *size), generator=torch.Generator().manual_seed(0))
    return exit_latency(model, batch) / args.cost_batch, "s"


_AMOUNT = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|[kKMGT]?|ms|us|s)", re.IGNORECASE)


def parse_budget(text: str, costs: np.ndarray) -> float:
    """``0.4e9``, ``400M``, ``0.4G``, ``12ms``, or ``60%`` of the last exit's cost."""
    match = _AMOUNT.fullmatch(text.strip())
    try:
        number = float(match[1]) if match else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a budget; write 0.4e9, 400M, 0.4G, 12ms or 60%.") from None
    unit = match[2] if match else ""
    if unit == "%":
        return number / 100 * float(costs[-1])
    if unit.lower() in ("ms", "us", "s"):
        return number * {"ms": 1e-3, "us": 1e-6, "s": 1.0}[unit.lower()]
    return number * {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit.upper()]


# ---------------------------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------------------------


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=_plain, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


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
