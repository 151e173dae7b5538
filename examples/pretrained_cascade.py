"""One pretrained network at several sizes of the image: each size alone, and small then large at one threshold.

    python examples/pretrained_cascade.py --train photos/train --test photos/test     # one folder a class

The cascade needs no training but what the network needs anyway, a classifier for each size on the frozen features. The
sizes alone are the static answer that it has to beat at equal cost. Weights are those of ``pretrained_exits.py``.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import timm
import torch
from pretrained_exits import fit_all
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from exit_plugins import ExitTable, budgeted_curve, cascade, collect_exits, exit_costs
from exit_plugins.timm.weights import PACKAGES, packaged_weights


def of_exits(table: ExitTable, chosen: list[int]) -> ExitTable:
    """What some of the exits said: the table of a cascade of those members alone."""
    return ExitTable.from_logits(table.logits[chosen], table.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 160, 224], help="increasing")
    parser.add_argument("--pair", type=int, nargs=2, default=[96, 224], help="two of the sizes: the cascade")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    torch.manual_seed(0)  # of the classifiers' first weights
    weights = packaged_weights(args.model) if args.model in PACKAGES else None
    network = timm.create_model(args.model, num_classes=0, pretrained=True, pretrained_cfg_overlay=weights).eval()
    features = cascade([network], sizes=args.sizes)
    config = resolve_data_config({"img_size": args.sizes[-1], "crop_pct": 1.0}, model=network)
    train, test = (DataLoader(ImageFolder(f, create_transform(**config)), 32) for f in (args.train, args.test))
    members = [copy.deepcopy(network) for _ in args.sizes]
    for member in members:
        member.reset_classifier(len(train.dataset.classes))
    calibration = fit_all(features, [member.get_classifier() for member in members], train)

    every = cascade(members, sizes=args.sizes).eval()
    table = collect_exits(every, test, keep_logits=True)
    macs = np.diff(exit_costs(every, config["input_size"]).macs, prepend=0)
    report = {"model": args.model, "images": [len(train.dataset), len(test.dataset)], "static": [], "cascades": []}
    for size, cost, right in zip(args.sizes, macs, table.correct.mean(1), strict=True):
        report["static"].append({"size": size, "macs": float(cost), "accuracy": float(right)})
        print(f"{size:4} px  {cost / 1e6:7.1f}M MACs  {right:6.1%}")

    chosen = [args.sizes.index(size) for size in args.pair]
    pair = cascade([members[index] for index in chosen], sizes=args.pair).eval()
    costs = exit_costs(pair, config["input_size"]).macs
    solved, measured = of_exits(calibration, chosen), of_exits(table, chosen)
    budgets = [float(costs[0] + share * macs[chosen[1]]) for share in (0.2, 0.35, 0.5, 0.65, 0.8)]
    for point in budgeted_curve(solved, measured, costs, budgets):
        static = float(np.interp(point.cost, macs, table.correct.mean(1)))
        line = {"sizes": args.pair, "budget": point.budget, "macs": point.cost, "accuracy": point.accuracy}
        report["cascades"].append(line | {"static_at_this_cost": static})
        print(f"{args.pair} px  {point.cost / 1e6:7.1f}M MACs  {point.accuracy:6.1%}, static there {static:6.1%}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
