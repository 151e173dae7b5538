"""How alike a model's layers are to the labels, from shallow to deep: Dyn-Adapter beside Dyn-Perceiver (Fig. 4).

    python examples/benchmarks/cka.py --data cifar10 --adapter runs/adapter --model vit_base_patch16_224 \\
        --against dynperceiver_regnety_1_6gf --against-checkpoint model_best.pth.tar --output cka.png

Dyn-Adapter leaves the backbone's features as they were trained and lets adapters gather what the labels need, so that
shallow layers stay unlike the labels; exits trained along with their backbone pull its shallow layers towards them.
Every row is one model: centred kernel alignment (linear, in [0, 1]) of each layer's mean over positions with the labels
of the same test images. Prints the rows, draws them, and writes them as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from timing import write_json
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from exit_plugins import DynPeftModel
from exit_plugins.exits import plots
from exit_plugins.exits.similarity import cka
from exit_plugins.timm.data import class_names, open_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, no package
from adapting import add_model_arguments, make_backbone


def layer_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What stands behind every block or stage of a timm model, (B, width), shallow to deep."""
    layers = model.forward_intermediates(x, intermediates_only=True)
    return [layer.flatten(2).mean(2) for layer in layers]  # (B, C, H, W)


@torch.inference_mode()
def similarities(model: nn.Module, args: argparse.Namespace) -> list[float]:
    """CKA of every layer with the labels."""
    options = {"img_size": args.img_size} if args.img_size else {}
    config = resolve_data_config(options, model=model)
    size, norm = config["input_size"], {"mean": config["mean"], "std": config["std"]}
    transform = create_transform(size, interpolation="bicubic", crop_pct=1.0, crop_mode="squash", **norm)
    view = open_dataset(args.data, args.split, args.data_dir).with_transform(transform)
    order = torch.randperm(len(view), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    loader = DataLoader(torch.utils.data.Subset(view, order.tolist()), batch_size=args.batch_size)
    batches = [(layer_features(model.eval(), images), labels) for images, labels in loader]
    layers = [torch.cat(parts) for parts in zip(*(features for features, _ in batches), strict=True)]
    labels = torch.cat([labels for _, labels in batches])
    return [cka(layer, labels) for layer in layers]


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an image folder or a timm dataset")
    parser.add_argument("--data-dir", help="where a timm dataset lies")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=1000, help="how many of them, drawn at random")
    parser.add_argument("--adapter", required=True, help="folder that DynPeftModel.save_pretrained wrote")
    parser.add_argument("--checkpoint", help="weights of the adapter's backbone, --model")
    parser.add_argument("--pretrained", action="store_true", help="the published weights of --model")
    parser.add_argument("--against", help="a multi-exit model of timm's registry to put beside it")
    parser.add_argument("--against-checkpoint")
    parser.add_argument("--against-kwargs", type=json.loads, default={})
    parser.add_argument("--output", default="runs/cka.png")
    add_model_arguments(parser, "vit_base_patch16_224")
    args = parser.parse_args(argv)
    classes = json.loads(Path(args.adapter, "dyn_config.json").read_text())["num_classes"]
    backbone = make_backbone(args, classes)
    rows = {}
    rows[f"{args.model}, not adapted"] = similarities(backbone, args)
    dyn = DynPeftModel.from_pretrained(backbone, args.adapter)
    rows[f"Dyn-{dyn.active_peft_config.peft_type.value} over {args.model}"] = similarities(dyn.backbone, args)
    if args.against:
        names = class_names(open_dataset(args.data, args.split, args.data_dir))
        other = timm.create_model(args.against, num_classes=len(names), **args.against_kwargs)
        if args.against_checkpoint:
            timm.models.load_checkpoint(other, args.against_checkpoint)
        rows[args.against] = similarities(other, args)
    for name, values in rows.items():
        print(f"{name}: " + " ".join(f"{value:.3f}" for value in values))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    plots.save(plots.cka_with_labels(rows), args.output)
    write_json(str(Path(args.output).with_suffix(".json")), {"data": args.data, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
