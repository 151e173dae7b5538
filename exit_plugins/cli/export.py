"""ONNX or OpenVINO files that really stop early, verified against torch before they are written.

Writes a folder with one file per segment, run by exit_plugins.exits.export.ExportedAdaptiveModel, or with --single-file
one ONNX file in which every image leaves by itself, for any program that runs ONNX. With --int8 an ONNX export is also
quantised, on images of --data, and the accuracy of every exit is shown before and after.

example:
  exit-plugins export chase_cifar --num-classes 100 --checkpoint runs/chase/model/model.safetensors \\
      --policy runs/chase/policy.json --output runs/chase/onnx
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..exits import export
from ..exits.collecting import collect_exits
from ..exits.policy import ExitPolicy, weights_digest
from .common import add_data_arguments, add_json_argument, make_loader, open_data, percent, print_json, print_table
from .models import (
    add_force_argument,
    add_model_arguments,
    data_config,
    known_model,
    match_classes,
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
    parser.add_argument("--int8", metavar="FOLDER", help="also write an int8 export here (needs --data)")
    parser.add_argument(
        "--calibration",
        type=whole(1),
        default=128,
        metavar="N",
        help="images int8 ranges are set on (default: %(default)s)",
    )
    add_data_arguments(parser, splits=("validation",))
    add_force_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy)
    if args.format:
        print("warning: --format goes in the next release; write --runtime.", file=sys.stderr)
    runtime = args.runtime or args.format or "onnx"
    if args.single_file and (runtime != "onnx" or args.int8):
        raise ValueError("--single-file is one float32 ONNX file; leave out --runtime openvino and --int8.")
    if args.int8 and (runtime != "onnx" or not args.data):
        raise ValueError("--int8 quantises an ONNX export on images: give --runtime onnx and --data.")
    known = known_model(args, policy)
    model = open_model(args, known).cpu()
    policy.check_model(model)
    check_weights(policy, weights_digest(model), args.force)
    config = data_config(args, model, known)
    size = config["input_size"]
    if args.single_file:
        export.export_graph(model, policy, args.output, size)
    else:
        export.export_segments(model, policy, args.output, size, runtime)
    report: dict[str, Any] = {"written": _written(Path(args.output)), "input_size": list(size), "verified": True}
    if args.int8:
        report["int8"] = _quantise(args, match_classes(open_data(args)[0], model, known), config)
        report["written"] += _written(Path(args.int8))
    if args.json:
        print_json(report)
        return 0
    print("verified against torch; written:")
    print_table(["file", "MB"], [[entry["file"], f"{entry['bytes'] / 1e6:.2f}"] for entry in report["written"]])
    if args.int8:
        print()
        pairs = zip(report["int8"]["accuracy_float32"], report["int8"]["accuracy_int8"], strict=True)
        rows = [[f"exit {k + 1}", percent(before), percent(after)] for k, (before, after) in enumerate(pairs)]
        print_table([f"accuracy, {report['int8']['samples']} images", "float32", "int8"], rows)
        print("int8 moves confidences: solve thresholds again on its own table.")
    return 0


def _quantise(args: argparse.Namespace, data: Any, config: dict[str, Any]) -> dict[str, Any]:
    batches, count = [], 0
    for images, _ in make_loader(data, args, config):
        batches.append(images[: args.calibration - count])
        count += len(batches[-1])
        if count >= args.calibration:
            break
    change = export.quantize_segments(args.output, args.int8, batches)
    tables = [
        collect_exits(export.ExportedSegments(folder), make_loader(data, args, config))
        for folder in (args.output, args.int8)
    ]
    accuracies = [table.correct.mean(1) for table in tables]
    return {
        "samples": tables[0].num_samples,
        "accuracy_float32": np.round(accuracies[0], 6),
        "accuracy_int8": np.round(accuracies[1], 6),
        **change,
    }


def _written(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [{"file": str(file), "bytes": file.stat().st_size} for file in files]
