"""From a pretrained timm network to a solved, measured early-exit classifier of your photographs, on a CPU.

    pip install -e ".[examples]"
    python examples/pretrained_exits.py --train photos/train --test photos/test

Folders hold one folder a class. The network stays as it is; only linear heads are trained, on features taken once.
``--model`` takes any timm network; those of ``exit_plugins.timm.weights`` need no model hub.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from exit_plugins import AdaptiveModel, ExitTable, budgeted_curve, collect_exits, exit_costs, solve_thresholds
from exit_plugins.timm.weights import PACKAGES, packaged_weights


@torch.no_grad()
def head_inputs(model: nn.Module, loader: DataLoader) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every exit's classifier reads of every image, and the labels."""
    readers = [head.norm for head in model.heads] + [model.backbone.get_classifier()]
    seen: list[list[torch.Tensor]] = [[] for _ in readers]
    taps = [r.register_forward_pre_hook(lambda _, args, s=s: s.append(args[0])) for r, s in zip(readers, seen)]  # noqa: B905
    labels = [target for images, target in loader if model.forward_exits(images)]
    for tap in taps:
        tap.remove()
    return [torch.cat(s) for s in seen], torch.cat(labels)


def fit(head: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 200) -> nn.Module:
    """Train one head on all samples at once."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    head.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="folder of training images, one folder a class")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--exits", default="5", help="how many exits, or modules with commas: blocks.4,blocks.5")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--time", action="store_true", help="measure images per second; on a quiet machine")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    torch.manual_seed(0)  # of the heads' first weights
    classes = ImageFolder(args.train).classes
    model = timm.create_model(
        "with_exits",
        backbone=args.model,
        exits=int(args.exits) if args.exits.isdigit() else args.exits,
        num_classes=len(classes),
        train="heads",
        pretrained=True,
        pretrained_cfg_overlay=packaged_weights(args.model) if args.model in PACKAGES else None,
    ).eval()
    config = resolve_data_config({"img_size": args.image_size, "crop_pct": 1.0}, model=model)
    transform = create_transform(**config)
    train, test = (DataLoader(ImageFolder(folder, transform), 32) for folder in (args.train, args.test))
    if test.dataset.classes != classes:
        raise SystemExit(f"{args.train} and {args.test} hold different classes.")

    features, labels = head_inputs(model, train)
    heads = [nn.Sequential(head.norm, head.mlp, head.drop, head.fc) for head in model.heads]
    heads.append(model.backbone.get_classifier())
    # Thresholds are solved on what heads say of images they were not trained on: of each fifth, those of the others.
    logits = [torch.zeros(len(labels), len(classes)) for _ in heads]
    for fold in range(5):
        out = torch.arange(len(labels)) % 5 == fold
        for head, x, answers in zip(heads, features, logits, strict=True):
            answers[out] = fit(copy.deepcopy(head), x[~out], labels[~out])(x[out]).detach()
    calibration = ExitTable.from_logits(logits, labels)
    for head, x in zip(heads, features, strict=True):
        fit(head, x, labels)

    costs = exit_costs(model, config["input_size"])
    table = collect_exits(model.eval(), test)
    report = {"model": args.model, "image_size": args.image_size, "images": [len(labels), table.num_samples]}
    report["exits"] = []
    for name, macs, right in zip((*model.exit_names, "the network"), costs.macs, table.correct, strict=True):
        print(f"exit at {name:16} {macs / 1e6:7.1f}M MACs  {right.mean():6.1%}")
        report["exits"].append({"at": name, "macs": macs, "accuracy": float(right.mean())})
    budgets = [share * costs.macs[-1] for share in (0.7, 0.8, 0.9)]
    report["adaptive"] = []
    for point in budgeted_curve(calibration, table, costs.macs, budgets):
        policy = solve_thresholds(calibration, costs.macs, budget=point.budget, model=model)
        line = {"budget": point.budget, "macs": point.cost, "accuracy": point.accuracy}
        if args.time:
            for name, run in (("images_per_second", AdaptiveModel(model, policy)), ("of_the_network", model)):
                with torch.inference_mode():
                    batches = [images for images, _ in test]
                    start = time.perf_counter()
                    for images in batches:
                        run(images)
                    line[name] = table.num_samples / (time.perf_counter() - start)
        print("adaptive", "  ".join(f"{key} {value:.4g}" for key, value in line.items()))
        report["adaptive"].append(line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
