"""ONNX or OpenVINO files that really stop early, verified against torch before they are written.

Writes a folder with one file per segment, run by exit_plugins.exits.export.ExportedAdaptiveModel, or with --single-file
one ONNX file in which every image leaves by itself, for any program that runs ONNX.

With --int8 or --bfloat16 (OpenVINO) the export is also written in that precision: ranges are set on some images of
--data, thresholds are solved again for the policy's budget on half of the others, and the rest compares the accuracy
of both. Where it falls by more than --max-drop, nothing is written in the lower precision. Give images that the model
was not trained on.

examples:
  exit-plugins export chase_cifar --num-classes 100 --checkpoint runs/chase/model/model.safetensors \\
      --policy runs/chase/policy.json --output runs/chase/onnx
  exit-plugins export msdnet_cifar_batch --pretrained --policy policy.json --output float32 --runtime openvino \\
      --int8 int8 --data torch/cifar100 --split test
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ..exits import export
from ..exits.export.manifest import check_replaceable
from ..exits.policy import ExitPolicy, weights_digest
from ..timm.data import ImageView
from .common import (
    Output,
    add_data_arguments,
    add_json_argument,
    make_loader,
    open_data,
    percent,
    print_json,
    print_table,
)
from .models import (
    add_force_argument,
    add_model_arguments,
    data_config,
    known_model,
    match_classes,
    number,
    open_model,
    whole,
)
from .tables import check_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy file written by solve")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder to write, or the file of --single-file")
    parser.add_argument("--runtime", choices=export.RUNTIMES, help="what runs the files (default: onnx)")
    parser.add_argument("--format", choices=export.RUNTIMES, help=argparse.SUPPRESS)  # the old name of --runtime
    parser.add_argument("--single-file", action="store_true", help="one ONNX file with the early exits inside")
    lower = parser.add_argument_group("lower precision (needs --data)")
    for name, runtimes in (("int8", "either runtime"), ("bfloat16", "--runtime openvino")):
        lower.add_argument(f"--{name}", metavar="FOLDER", help=f"also write an export in {name} here ({runtimes})")
    lower.add_argument(
        "--calibration",
        type=whole(1),
        default=300,
        metavar="N",
        help="images int8 ranges are set on (default: %(default)s)",
    )
    lower.add_argument(
        "--max-drop",
        type=number(0, 1),
        default=0.005,
        metavar="D",
        help="highest loss of accuracy, at the last exit and at the same budget, 1 for any (default: %(default)s)",
    )
    add_data_arguments(parser, splits=("validation",))
    add_force_argument(parser)
    add_json_argument(parser)


def outputs(args: argparse.Namespace) -> list[Output]:
    lower = [Output(name, getattr(args, name), True) for name in export.LOWER_PRECISIONS if getattr(args, name)]
    return [Output("output", args.output, not args.single_file), *lower]


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy)
    if args.format:
        print("warning: --format goes in the next release; write --runtime.", file=sys.stderr)
    runtime = args.runtime or args.format or "onnx"
    asked = [name for name in export.LOWER_PRECISIONS if getattr(args, name)]
    if args.single_file and (runtime != "onnx" or asked):
        raise ValueError("--single-file is one float32 ONNX file; leave out --runtime openvino, --int8 and --bfloat16.")
    if asked and not args.data:
        raise ValueError(f"--{asked[0]} needs images to set ranges on and to compare the accuracy on: give --data.")
    if args.bfloat16 and runtime != "openvino":
        raise ValueError("--bfloat16 is a choice of OpenVINO: give --runtime openvino.")
    for folder in ([] if args.single_file else [args.output]) + [getattr(args, name) for name in asked]:
        check_replaceable(Path(folder))
    known = known_model(args, policy)
    model = open_model(args, known).cpu()
    policy.check_model(model)
    check_weights(policy, weights_digest(model), args.force)
    config = data_config(args, model, known)
    size = config["input_size"]
    # Before the long work: what is wrong with the data shall not wait for it.
    calibration, held_out = (
        _parts(make_loader(match_classes(open_data(args)[0], model, known), args, config), args.calibration)
        if asked
        else ((), ())
    )
    if args.single_file:
        export.export_graph(model, policy, args.output, size)
    else:
        export.export_segments(model, policy, args.output, size, runtime)
    report: dict[str, Any] = {"written": _written(Path(args.output)), "input_size": list(size), "verified": True}
    for name in asked:
        folder = getattr(args, name)
        report[name] = export.quantize_segments(
            args.output, folder, calibration, precision=name, held_out=held_out, max_drop=args.max_drop
        )
        report["written"] += _written(Path(folder))
    if args.json:
        print_json(report)
        return 0
    print("verified against torch; written:")
    print_table(["file", "MB"], [[entry["file"], f"{entry['bytes'] / 1e6:.2f}"] for entry in report["written"]])
    for name in asked:
        print()
        _print_accuracy(name, report[name])
    return 0


def _parts(loader: DataLoader[Any], count: int) -> tuple[Iterable[Any], Iterable[Any]]:
    """Batches of ``count`` images and of all others: drawn at random, or the first ones of a data set that streams.

    ValueError where fewer than two are left.
    """
    data = loader.dataset
    if not isinstance(data, ImageView):
        batches = math.ceil(count / (loader.batch_size or 1))
        return _Slice(loader, 0, batches), _Slice(loader, batches, None)
    if len(data) < count + 2:
        raise ValueError(
            f"--calibration {count} leaves {max(len(data) - count, 0)} of {len(data)} images to solve thresholds and "
            "compare the accuracy on; give more images, or a smaller --calibration."
        )
    order = np.random.default_rng(0).permutation(len(data))
    calibration, rest = (
        DataLoader(data.subset(np.sort(part)), loader.batch_size, num_workers=loader.num_workers)
        for part in (order[:count], order[count:])
    )
    return calibration, rest


class _Slice:
    """Some consecutive batches of a loader, each time it is read."""

    def __init__(self, loader: DataLoader[Any], start: int, stop: int | None) -> None:
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.start, self.stop)


def _print_accuracy(precision: str, found: dict[str, Any]) -> None:
    pairs = zip(found["accuracy_float32"], found[f"accuracy_{precision}"], strict=True)
    rows = [[f"exit {k + 1}", percent(before), percent(after)] for k, (before, after) in enumerate(pairs)]
    print_table([f"accuracy, {found['samples']} images", "float32", precision], rows)
    policy = found["under_policy"]
    low, high = (100 * end for end in policy["interval"])
    print(
        f"thresholds solved again; under them {percent(policy['float32'])} and {percent(policy[precision])}, a fall of "
        f"{100 * policy['drop']:.2f} points ({low:.2f} to {high:.2f}, {policy['samples']} images)"
    )


def _written(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [{"file": str(file), "bytes": file.stat().st_size} for file in files]
