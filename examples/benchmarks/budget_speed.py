"""Accuracy, MACs and images/s of a shipped network at budgets, beside the same network without its exits.

    python examples/benchmarks/budget_speed.py with_exits_tf_efficientnet_lite0.caltech101 --data caltech101 \\
        --threads 1 --batch 1 32 --json speed.json

Thresholds are solved on one half of the test images; accuracy and cost are of the other half, times of images drawn
from both, all budgets and the network that nobody leaves interleaved. Reading and scaling of the images are left out.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import timm
import torch
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import exit_plugins  # noqa: F401  registers the models
from exit_plugins import AdaptiveModel, collect_exits, evaluate_policy, exit_costs, solve_thresholds
from exit_plugins.exits.adaptive import inference_copy
from exit_plugins.timm import shipped_policy
from exit_plugins.timm.data import open_dataset
from exit_plugins.timm.images import input_config


@torch.inference_mode()
def over(model: nn.Module, images: Tensor, batch: int) -> None:
    for part in images.split(batch):
        model(part)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict:
    model = timm.create_model(args.model, pretrained=True).eval().to(memory_format=torch.channels_last)
    config = input_config(model)
    classes = shipped_policy(args.model).model["classes"]  # the order of its answers
    data = open_dataset(args.data, "test").with_transform(create_transform(**config)).with_classes(classes)
    images, labels = (torch.stack([torch.as_tensor(one[k]) for one in data]) for k in (0, 1))
    costs = exit_costs(model, config["input_size"])
    table = collect_exits(model, DataLoader(TensorDataset(images, labels), batch_size=32))
    solved, measured = table.split(0.5, seed=0)
    runs: dict[tuple[str, int], Callable[[], None]] = {}
    rows: dict[str, dict] = {"no exits": {"accuracy": float(measured.correct[-1].mean()), "macs": costs.macs[-1]}}
    # As its users run it: fused, without the exits.
    forms: dict[str, nn.Module] = {"no exits": inference_copy(model)}
    for share in args.budget:
        policy = solve_thresholds(solved, costs.macs, budget=share * costs.macs[-1], model=model)
        found = evaluate_policy(policy, measured, costs.macs)
        name = f"budget {share:g}"
        rows[name] = {"accuracy": found.accuracy, "macs": found.cost, "shares": found.shares.tolist()}
        forms[name] = AdaptiveModel(model, policy)
    chosen = images[np.random.default_rng(0).permutation(len(images))[: args.images]]
    for name, form in forms.items():
        for batch in args.batch:
            runs[name, batch] = partial(over, form, chosen, batch)
    times = interleaved(runs, args.repeats, cpu_time=args.cpu_time)
    for (name, batch), seconds in times.items():
        rows[name][f"batch {batch}"] = {**spread(seconds), "images_per_second": len(chosen) / float(np.median(seconds))}
    return {
        "machine": machine(),
        "model": args.model,
        "images": len(chosen),
        "repeats": args.repeats,
        "clock": "CPU seconds" if args.cpu_time else "wall clock",
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="with the splits train and test")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.7, 0.8, 0.9], help="shares of the whole")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    add_clock_arguments(parser)
    args = parser.parse_args()
    use_clock(args)
    report = measure(args)
    for name, row in report["rows"].items():
        speeds = ", ".join(f"{row[f'batch {b}']['images_per_second']:.1f} images/s at batch {b}" for b in args.batch)
        print(f"{name}: {row['accuracy']:.1%} at {row['macs'] / 1e6:.1f}M MACs, {speeds}")
    write_json(args.json, report)


if __name__ == "__main__":
    main()
