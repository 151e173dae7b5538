"""Put a trained run into the package, and check what is there against its card, to the image.

    python examples/experiments/ship.py chase/msdnet_cifar_batch-s0 --as msdnet_cifar_batch.cifar100 --data datasets
    python examples/experiments/ship.py FOLDER --trained-on caltech101 \\
        --as with_exits_tf_efficientnet_lite0.caltech101 --data datasets
    python examples/experiments/ship.py --check msdnet_cifar_batch.cifar100 --data datasets

What is shipped is a run of an experiment, or any folder that ``exit_plugins.timm.save_for_hf`` wrote (second line: what
``examples/pretrained_exits.py --save`` left). The weights are stored in half precision, without those of a frozen
network that come with a package of their own; every figure of the card is of what was stored. The policy is solved on a
random half of the test images, since the run trained on all others, for the cost at which it keeps the last exit's
accuracy there; its figures are of the other half.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from base import ROOT, git_commit
from safetensors.torch import save_file
from timing import machine
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from exit_plugins import ExitTable, collect_exits, exit_costs, solve_thresholds
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.files import atomic_write
from exit_plugins.timm._shipped import WEIGHTS, shipped_card, shipped_policy
from exit_plugins.timm.data import class_names, open_dataset
from exit_plugins.timm.weights import PACKAGES, packaged_weights

SEED = 0  # of the halves


def collected(model: nn.Module, folder: Path, classes: Sequence[str] | None) -> tuple[ExitTable, tuple[str, ...]]:
    """What every exit says of the test images, read as any user would read them, and the names of the model's classes.

    ``classes``: where the model was trained on labels in another order than that of the data, its own.
    """
    view = open_dataset(str(folder), "test")
    config = resolve_data_config({}, model=model)
    view = view.with_transform(create_transform(**config, is_training=False)).with_classes(classes or view.classes)
    names = class_names(view)
    return collect_exits(
        model, DataLoader(view, batch_size=250), about={"data": folder.name, "split": "test", "classes": list(names)}
    ), names


def figures(model: nn.Module, table: ExitTable, policy) -> dict:
    """Counts and shares that ``--check`` must find again exactly."""
    rest = table.split(0.5, SEED)[1]
    half = evaluate_policy(policy, rest)
    return {
        "test_images": len(table),
        "right": table.correct.sum(1).tolist(),
        "policy": {
            "test_images": len(rest),
            "accuracy": half.accuracy,
            "last_exit_accuracy": float(rest.correct[-1].mean()),
            "cost": half.cost,
        },
    }


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model but those of a frozen network that are, to the bit, what its package holds."""
    weights = model.state_dict()
    backbone = model.backbone.pretrained_cfg["architecture"] if getattr(model, "train_mode", "") == "heads" else None
    packaged = packaged_weights(backbone)["state_dict"] if backbone in PACKAGES else {}
    found = {key for key, value in packaged.items() if torch.equal(value, weights[f"backbone.{key}"])}
    return {key: value for key, value in weights.items() if key.removeprefix("backbone.") not in found}


def known(run: str, state: Path, trained_on: str | None) -> tuple[Path, str, dict]:
    """Where the trained model lies, its data set, and what the card is to say of the training."""
    if trained_on is None:
        result = json.loads((ROOT / "docs" / "results" / f"{run}.json").read_text())
        about = {"run": run, "commit": result["commit"], "settings": result["settings"]}
        return state / run / "model", result["settings"]["data"], about
    return Path(run), trained_on, {"commit": git_commit(), "machine": machine()}


def ship(run: str, name: str, state: Path, data: Path, trained_on: str | None = None) -> None:
    source, trained_on, about = known(run, state, trained_on)
    trained = timm.create_model(f"local-dir:{source}", pretrained=True)
    folder = WEIGHTS / name
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in own_weights(trained).items()}
    save_file({k: v.contiguous() for k, v in half.items()}, folder / "model.safetensors")
    model = timm.create_model(name, pretrained=True).eval()

    table, names = collected(model, data / trained_on, trained.pretrained_cfg.get("label_names"))
    costs = exit_costs(model, model.pretrained_cfg["input_size"]).macs
    fitted, _ = table.split(0.5, SEED)
    policy = solve_thresholds(fitted, costs, accuracy=float(fitted.correct[-1].mean()), model=model)
    policy.save(folder / "policy.json")
    card = {
        "name": name,
        "trained_on": trained_on,
        **about,
        "macs": costs.tolist(),
        **figures(model, table, policy),
        "classes": list(names),
    }
    with atomic_write(folder / "card.json") as file:
        json.dump(card, file, indent=1)
        file.write("\n")
    size = sum(os.path.getsize(path) for path in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.2f} MB; right {[100 * n / len(table) for n in card['right']]} %, policy {card['policy']}")


def check(name: str, data: Path) -> bool:
    card = shipped_card(name)
    model = timm.create_model(name, pretrained=True).eval()
    table, names = collected(model, data / card["trained_on"], card["classes"])
    found = figures(model, table, shipped_policy(name)) | {"classes": list(names)}
    wrong = {key: (card[key], value) for key, value in found.items() if card[key] != value}
    for key, (said, value) in wrong.items():
        print(f"{key}: the card says {said}, found {value}")
    if not wrong:
        print(f"{name}: {card['right']} of {card['test_images']} right at its exits, as its card says")
    return not wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="EXPERIMENT/RUN, finished; with --trained-on a saved folder")
    parser.add_argument("--trained-on", metavar="NAME", help="the data set, in --data, of a saved folder")
    parser.add_argument("--as", dest="name", help="MODEL.TAG, as timm will know it")
    parser.add_argument("--check", metavar="MODEL.TAG", help="measure a shipped model again")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("EXPERIMENTS_DATA", "datasets")))
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "experiments")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.check:
        return int(not check(args.check, args.data))
    if not args.run or not args.name:
        parser.error("give a run and --as MODEL.TAG, or --check MODEL.TAG.")
    ship(args.run, args.name, args.state, args.data, args.trained_on)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
