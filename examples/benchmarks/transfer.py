"""Adapt one pretrained vision transformer by six methods, with exits and without, and put them side by side.

    python examples/benchmarks/transfer.py --data cifar10 --checkpoint vit.pth.tar --img-size 32 \\
        --model vit_tiny_patch16_224 --model-kwargs '{"patch_size": 4, "embed_dim": 64, "num_heads": 4}'

The training split of ``--data`` is cut at random into training, calibration and test images that do not overlap.
Thresholds are solved on the calibration images. Every figure is of the test images; images per second are measured on
them too, merged where the method can be merged, all models taking turns. Adapters are kept in ``--output``, and what is
there is not trained again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from timing import interleaved, machine, write_json
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from exit_plugins import AdaptiveModel, DynPeftModel, collect_exits, exit_costs, solve_thresholds
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.similarity import cka
from exit_plugins.timm.data import class_names, open_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, no package
from adapting import ADAPTERS, SingleExit, add_model_arguments, finished, make_backbone, make_model, run_name, train


def open_tensors(args: argparse.Namespace) -> tuple[dict[str, TensorDataset], int]:
    whole = open_dataset(args.data, "train", args.data_dir)
    size = (3, args.img_size, args.img_size)
    transform = create_transform(size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0)
    order, sets, start = np.random.default_rng(args.seed).permutation(len(whole)), {}, 0
    for name, count in (("train", args.train), ("calibration", args.calibration), ("test", args.test)):
        view = whole.subset(order[start : start + count]).with_transform(transform)
        images, labels = zip(*DataLoader(view, batch_size=256), strict=True)
        sets[name], start = TensorDataset(torch.cat(images), torch.cat(labels)), start + count
    return sets, len(class_names(whole))


def trained(method: str, plain: bool, num_classes: int, data: TensorDataset, args) -> tuple[nn.Module, dict]:
    """The adapted model, merged where it can be, and what training it took."""
    args.method, args.plain = method, plain
    name = run_name(args, plain)
    folder = Path(args.output, name)
    torch.manual_seed(args.seed)
    if not (folder / "training.json").is_file():
        model = make_model(args, num_classes, args.scale)
        start = time.perf_counter()
        train(model, data, args)
        record = {
            "name": name,
            "seconds": time.perf_counter() - start,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        model.save_pretrained(str(folder))
        (folder / "training.json").write_text(json.dumps(record))
    model = (PeftModel if plain else DynPeftModel).from_pretrained(make_backbone(args, num_classes), folder)
    return finished(model, method), json.loads((folder / "training.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an image folder or a timm dataset with a training split")
    parser.add_argument("--data-dir")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--calibration", type=int, default=1000)
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--scale", type=float, default=1.0)
    add_model_arguments(parser, model="vit_tiny_patch16_224")
    parser.set_defaults(**{"img_size": 224, "epochs": 15, "warmup_epochs": 2, "lr": 3e-3, "drop_path": 0.0})
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="runs/transfer")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.device, args.bf16, args.pretrained, args.workers = "cpu", False, False, 0
    sets, num_classes = open_tensors(args)
    loaders = {name: DataLoader(data, batch_size=args.batch_size) for name, data in sets.items()}
    batches = [images for images, _ in DataLoader(sets["test"], batch_size=args.batch_size)][:10]
    count = sum(len(batch) for batch in batches)
    rows, runs = [], {}
    for method in ADAPTERS:
        for plain in (True, False):
            model, record = trained(method, plain, num_classes, sets["train"], args)
            multi = SingleExit(model) if plain else model
            costs = exit_costs(multi, (3, args.img_size, args.img_size)).macs
            test = collect_exits(multi, loaders["test"], progress=False)
            row = record | {"exit_accuracy": test.correct.mean(1).tolist(), "macs": costs.tolist(), "points": []}
            rows.append(row)
            if plain:
                row["points"].append({"budget": None, "accuracy": row["exit_accuracy"][0], "macs": float(costs[-1])})
                runs[record["name"]] = lambda model=model: [model(batch) for batch in batches]
                continue
            calibration = collect_exits(model, loaders["calibration"], progress=False)
            for share in [*args.budgets, 1.0]:
                policy = solve_thresholds(calibration, costs, budget=max(share * costs[-1], costs[0]))
                result = evaluate_policy(policy, test, costs)
                row["points"].append(
                    {
                        "budget": share,
                        "accuracy": result.accuracy,
                        "interval": list(result.interval),
                        "macs": result.cost,
                        "shares": result.shares.tolist(),
                        "accuracy_of_leavers": [None if np.isnan(a) else float(a) for a in result.exit_accuracy],
                    }
                )
                adaptive = AdaptiveModel(model, policy)
                runs[f"{record['name']} {share:g}"] = lambda a=adaptive: [a(batch) for batch in batches]
            images, labels = sets["test"][:1000]
            with torch.inference_mode():
                row["cka_with_labels"] = [cka(f.numpy(), labels.numpy()) for f in model.exit_features(images)]
    with torch.inference_mode():
        times = interleaved(runs, args.repeats)
    print(f"{'method':18s} {'budget':>7s} {'accuracy':>9s} {'MACs (M)':>9s} {'trained':>8s} {'img/s':>7s}")
    for row in rows:
        for point in row["points"]:
            key = row["name"] if point["budget"] is None else f"{row['name']} {point['budget']:g}"
            point["img_per_s"] = count / float(np.median(times[key]))
            budget = "" if point["budget"] is None else f"{point['budget']:g}"
            print(
                f"{row['name']:18s} {budget:>7s} {100 * point['accuracy']:8.2f}% {point['macs'] / 1e6:9.2f} "
                f"{row['trained_parameters']:8d} {point['img_per_s']:7.1f}"
            )
    for row in rows:
        if len(row["exit_accuracy"]) > 1:
            exits = " ".join(f"{100 * a:.1f}" for a in row["exit_accuracy"])
            similar = " ".join(f"{value:.3f}" for value in row["cka_with_labels"])
            print(f"{row['name']}: accuracy of every exit {exits}; CKA of its features with the labels {similar}")
            for point in row["points"]:
                pairs = zip(point["shares"], point["accuracy_of_leavers"], strict=True)
                leavers = ", ".join("nobody" if a is None else f"{100 * s:.0f} % ({100 * a:.1f})" for s, a in pairs)
                print(f"  budget {point['budget']:g}: share leaving at each exit (and their accuracy) {leavers}")
    write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
