"""Dyn-Perceiver's latent branch over a frozen pretrained network, beside linear heads on the same maps.

    python examples/pretrained_latents.py --train photos/train --test photos/test --json latents.json

Latents that read maps and do not write into them (``z2x=False``) leave the network's maps as they are, so that these
are taken once and the branch alone is trained, over ``--epochs``, without augmentation. Compare the exits with those of
``pretrained_exits.py`` at the same cost.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from exit_plugins import MultiExitLoss, exit_costs
from exit_plugins.timm.weights import PACKAGES, packaged_weights


@torch.no_grad()
def take_maps(model: nn.Module, folder: Path, transform, cache: Path | None) -> tuple[list[Tensor], Tensor]:
    """The map before each stage and behind the last, in half precision, and the labels."""
    if cache and cache.is_file():
        return torch.load(cache, weights_only=True)
    maps: list[list[Tensor]] = [[] for _ in range(5)]
    labels = []
    for images, target in DataLoader(ImageFolder(folder, transform), 32):
        x = model.stem(images)
        maps[0].append(x.half())
        for stage, seen in zip(model.stages, maps[1:], strict=True):
            x = stage.convolve(x)
            seen.append(x.half())
        labels.append(target)
    taken = [torch.cat(m) for m in maps], torch.cat(labels)
    if cache:
        torch.save(taken, cache)
    return taken


def exits(model: nn.Module, maps: list[Tensor], chosen: Tensor) -> tuple[Tensor, ...]:
    """Logits of every exit from maps that are there: the model's own run, less the network."""
    taken = [m[chosen].float() for m in maps]
    z, logits = model._first_latents(taken[0]), []
    for index, stage in enumerate(model.stages):
        z = stage.read(taken[index], z)
        for step in range(3):  # behind reading, behind the convolutions, behind what leads to the next stage
            if step == 2:
                z = stage.expand(z)
            for site in (site for site in model.sites if site.step == 3 * index + step + 1):
                heard = None if site.hears is None else logits[site.hears]
                logits.append(model._exit(len(logits), taken[index + (step > 0)], z, heard))
    return tuple(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="folder of training images, one folder a class")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs=4, default=[1, 1, 2, 2])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--cache", type=Path, help="folder to keep the maps in")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    torch.manual_seed(0)
    classes = ImageFolder(args.train).classes
    model = timm.create_model(
        "dynperceiver",
        backbone=args.model,
        num_latents=args.latents,
        latent_depths=tuple(args.depths),
        num_classes=len(classes),
        z2x=False,
        freeze_backbone=True,
        pretrained_backbone=True,
        pretrained_cfg_overlay=packaged_weights(args.model) if args.model in PACKAGES else None,
    ).eval()
    config = resolve_data_config({"img_size": args.image_size, "crop_pct": 1.0}, model=model)
    transform = create_transform(**config)
    files = [args.cache / f"{part}.pt" if args.cache else None for part in ("train", "test")]
    train, labels = take_maps(model, args.train, transform, files[0])
    test, truth = take_maps(model, args.test, transform, files[1])

    costs, loss = exit_costs(model, config["input_size"]), MultiExitLoss.for_model(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.05)
    steps = len(labels) // 34
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.epochs * steps)
    for epoch in range(args.epochs):
        model.train()
        for chosen in torch.randperm(len(labels))[: 34 * steps].split(34):
            value = loss(exits(model, train, chosen), labels[chosen])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {value.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        parts = [exits(model, test, chosen) for chosen in torch.arange(len(truth)).split(96)]
    right = [(torch.cat(part).argmax(1) == truth).float().mean().item() for part in zip(*parts, strict=True)]
    for index, (macs, accuracy) in enumerate(zip(costs.macs, right, strict=True), start=1):
        print(f"exit {index}: {macs / 1e6:7.1f}M MACs  {accuracy:6.1%}")
    if args.json:
        report = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        report = {key: value for key, value in report.items() if key not in ("train", "test", "cache", "json")}
        report["images"] = [len(labels), len(truth)]
        report["exits"] = [{"macs": m, "accuracy": a} for m, a in zip(costs.macs.tolist(), right, strict=True)]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
