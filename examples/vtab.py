"""VTAB-1k, FGVC few-shot, or any data set of one's own: adapt a pretrained vision transformer, with or without exits.

    python examples/vtab.py --root vtab-1k --model vit_base_patch16_224.augreg_in21k --method repadapter
    python examples/vtab.py --root fgvc --datasets food-101 oxford-pets --shots 16 ...
    python examples/vtab.py --datasets torch/cifar100 --data-dir torchvision ...   # any image folder or timm dataset

A folder in the published layout holds ``NAME/{train800,val200,train800val200,test}.txt`` with lines
``images/train800val200/000000.jpg 5`` (``image_lists.py`` writes it for an image folder); the few-shot layout holds
``NAME/annotations/{train_meta.list.num_shot_16.seed_0,val_meta.list,test_meta.list}``. Other data is cut likewise, from
its training split: 800 images and 200, or ``--shots`` per class and as many again at most for validation.

For every data set: RepAdapter's scale is searched on the validation images; thresholds for every budget are solved on
them, too, by the model trained on the training images alone; then the model is trained on both and tested once. Nothing
is chosen on the test images. Results go to ``--output``, one JSON a data set; those that are there are not run again.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.data import create_transform, resolve_data_config
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from exit_plugins import (
    BottleneckConfig,
    DynConfig,
    MultiExit,
    RepAdapterConfig,
    collect_exits,
    exit_costs,
    get_dyn_peft_model,
    solve_thresholds,
)
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.timm.data import class_names, open_dataset
from exit_plugins.timm.images import read_image

# The 19 sets, their groups and numbers of classes.
VTAB = {
    "natural": {
        "cifar": 100,
        "caltech101": 102,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "svhn": 10,
        "sun397": 397,
    },
    "specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    "structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "kitti": 4,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}
FGVC = ("food-101", "stanford_cars", "oxford_flowers102", "fgvc-aircraft", "oxford_pets")
LISTS = {"train": "train800", "val": "val200", "test": "test"}
SHOT_LISTS = {
    "train": "train_meta.list.num_shot_{shots}.seed_{seed}",
    "val": "val_meta.list",
    "test": "test_meta.list",
}


class ListFile(Dataset):
    """Images named by the lines ``path label`` of a list; paths are relative to ``folder``."""

    def __init__(self, folder: Path, file: Path, transform=None) -> None:
        self.samples = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.strip():
                path, _, label = line.strip().rpartition(" ")
                if not path or not label.isdigit():
                    raise ValueError(f"{file}, line {number}: expected 'path label', got {line!r}.")
                self.samples.append((folder / path, int(label)))
        if not self.samples:
            raise ValueError(f"{file} names no images.")
        missing = next((path for path, _ in self.samples if not path.is_file()), None)
        if missing:
            raise FileNotFoundError(f"{file} names {missing}, which is not there.")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        image = read_image(path).convert("RGB")
        return (self.transform(image) if self.transform else image), label


def open_sets(name: str, args: argparse.Namespace) -> tuple[dict[str, Dataset], int]:
    """The splits train, val and test of a data set, as PIL images, and its number of classes."""
    folder = Path(args.root or "", name)
    known = {key: count for group in VTAB.values() for key, count in group.items()}
    if args.root and (args.shots and (folder / "annotations").is_dir()):
        lists = {
            split: folder / "annotations" / f.format(shots=args.shots, seed=args.seed)
            for split, f in SHOT_LISTS.items()
        }
        images = folder / "images" if (folder / "images").is_dir() else folder
    elif args.root and (folder / "test.txt").is_file():
        lists, images = {split: folder / f"{file}.txt" for split, file in LISTS.items()}, folder
    elif args.root and not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there. Expected {folder}/{{train800,val200,test}}.txt and the images they name, for "
            f"few-shot {folder}/annotations/{SHOT_LISTS['train'].format(shots=args.shots or 16, seed=args.seed)} "
            "and so on, or an image folder with train/ and test/. Nothing is downloaded."
        )
    else:
        return cut_sets(str(folder) if args.root else name, args)
    absent = [str(path) for path in lists.values() if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{name}: these lists are missing: {', '.join(absent)}.")
    sets = {split: ListFile(images, path) for split, path in lists.items()}
    largest = 1 + max(label for data in sets.values() for _, label in data.samples)
    return sets, largest if args.shots else max(known.get(name, 0), largest)


def cut_sets(spec: str, args: argparse.Namespace) -> tuple[dict[str, Dataset], int]:
    """As ``open_sets``, from any data set with a training and a test split."""
    whole, test = open_dataset(spec, "train", args.data_dir), open_dataset(spec, "test", args.data_dir)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(whole))
    if not args.shots:
        train, val = order[:800], order[800:1000]
    else:
        labels = np.array([int(whole.base[int(i)][1]) for i in whole.index])[order]
        train = np.concatenate([order[labels == c][: args.shots] for c in np.unique(labels)])
        val = np.concatenate([order[labels == c][args.shots : 2 * args.shots] for c in np.unique(labels)])
    if len(train) == 0 or len(val) == 0:
        raise ValueError(f"{spec} has {len(whole)} training images, too few for a training and a validation part.")
    return {"train": whole.subset(train), "val": whole.subset(val), "test": test}, len(class_names(whole))


class Transformed(Dataset):
    """A data set of PIL images under a transform."""

    def __init__(self, data: Dataset, transform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        image, label = self.data[index]
        return self.transform(image), int(label)


def in_memory(data: Dataset, transform, workers: int) -> TensorDataset:
    """The whole data set as two tensors: without augmentation every image is the same in every epoch."""
    loader = DataLoader(Transformed(data, transform), batch_size=64, num_workers=workers)
    images, labels = zip(*loader, strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def make_model(args: argparse.Namespace, num_classes: int, scale: float) -> nn.Module:
    """The pretrained backbone with the method's adapters, and exits unless ``--plain``."""
    kwargs = {"img_size": args.img_size} if args.img_size else {}
    backbone = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        **kwargs,
        **args.model_kwargs,
    )
    if args.checkpoint:
        load_backbone(backbone, args.checkpoint)
    config = {
        "repadapter": lambda: RepAdapterConfig(target_modules=["qkv", "fc1"], r=args.r, scale=scale),
        "lora": lambda: LoraConfig(r=args.r, lora_alpha=args.r, lora_dropout=0.1, target_modules=["qkv"]),
        "bottleneck": lambda: BottleneckConfig(target_modules=["fc2"], r=args.r),
    }[args.method]()
    if args.plain:
        config.modules_to_save = ["head"]
        return get_peft_model(backbone, config)
    return get_dyn_peft_model(backbone, config, DynConfig(exit_interval=args.exit_interval, num_classes=num_classes))


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load weights into all of ``backbone`` but its classifier, which is the new task's."""
    state = timm.models.load_state_dict(path, use_ema=True)
    own = backbone.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    rest = {key: value for key, value in own.items() if key.startswith("head.")}
    backbone.load_state_dict({**state, **rest})


def train(model: nn.Module, data: Dataset, args: argparse.Namespace) -> None:
    """AdamW on cross-entropy, cosine with warm-up by epochs, no augmentation."""
    device = torch.device(args.device)
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=args.epochs,
        warmup_t=min(args.warmup_epochs, args.epochs // 2),
        warmup_lr_init=1e-7,
        lr_min=1e-5,
    )
    generator = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, generator=generator)
    dynamic = hasattr(model, "num_exits")
    if dynamic:
        model.attach_mask(optimizer)
    total, step = args.epochs * len(loader), 0
    for epoch in range(args.epochs):
        schedule.step(epoch)
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                outputs = model(images)
            if dynamic:
                model.set_progress(step / total)
                loss = model.loss(outputs, labels)
            else:
                loss = nn.functional.cross_entropy(outputs.float(), labels)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower --lr or the scale.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()


class SingleExit(MultiExit, nn.Module):
    """A plain classifier as a model of one exit, so that everything is measured in the same way."""

    num_exits = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def begin_exits(self, x):
        return x

    def forward_exit(self, index, state):
        return self.model(state), state


def measure(model: nn.Module, data: Dataset, args: argparse.Namespace):
    """Every exit's answer to every sample, merged where the method can be."""
    model = model if hasattr(model, "num_exits") else SingleExit(model)
    loader = DataLoader(data, batch_size=args.batch_size, num_workers=args.workers)
    return collect_exits(model, loader, device=args.device, progress=False)


def run(name: str, args: argparse.Namespace) -> dict:
    """Search, train and test on one data set."""
    sets, num_classes = open_sets(name, args)
    torch.manual_seed(args.seed)
    probe = timm.create_model(args.model, num_classes=0, **args.model_kwargs)
    config = resolve_data_config({"img_size": args.img_size} if args.img_size else {}, model=probe)
    size = config["input_size"]
    transform = create_transform(  # resized as a whole: VTAB's objects are not always in the middle
        size, mean=config["mean"], std=config["std"], interpolation="bicubic", crop_pct=1.0, crop_mode="squash"
    )
    train_set, val_set = (in_memory(sets[split], transform, args.workers) for split in ("train", "val"))
    best = None
    for scale in args.scales if args.method == "repadapter" else [1.0]:
        torch.manual_seed(args.seed)
        model = make_model(args, num_classes, scale)
        train(model, train_set, args)
        table = measure(model, val_set, args)
        accuracy = float(table.correct[-1].mean())
        print(
            f"{name}: scale {scale:g}: last exit {100 * accuracy:.1f} % on {len(val_set)} validation images", flush=True
        )
        if best is None or accuracy > best[0]:
            best = (accuracy, scale, table)
    accuracy, scale, val_table = best
    torch.manual_seed(args.seed)
    model = make_model(args, num_classes, scale)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(model, torch.utils.data.ConcatDataset([train_set, val_set]), args)
    if args.method != "bottleneck":
        model = model.merge_and_unload()
    table = measure(model, Transformed(sets["test"], transform), args)
    costs = exit_costs(model if hasattr(model, "num_exits") else SingleExit(model), size).macs
    points = []
    for share in [] if args.plain else args.budgets:
        policy = solve_thresholds(val_table, costs, budget=max(share * costs[-1], costs[0]))
        result = evaluate_policy(policy, table, costs)
        points.append(
            {
                "budget": share,
                "accuracy": result.accuracy,
                "macs": result.cost,
                "shares": result.shares.tolist(),
                "accuracy_of_leavers": [None if np.isnan(a) else float(a) for a in result.exit_accuracy],
                "thresholds": policy.thresholds.tolist()
                if hasattr(policy.thresholds, "tolist")
                else list(policy.thresholds),
            }
        )
    return {
        "dataset": name,
        "method": args.method,
        "plain": args.plain,
        "scale": scale,
        "classes": num_classes,
        "validation_accuracy": accuracy,
        "test_images": table.num_samples,
        "exit_accuracy": table.correct.mean(1).tolist(),
        "macs": costs.tolist(),
        "trained_parameters": trained,
        "points": points,
    }


def averages(results: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Accuracy over data sets, for the last exit and for every budget: by group, mean of the groups, plain mean."""
    kinds = {"last exit": lambda r: r["exit_accuracy"][-1]}
    for share in sorted({p["budget"] for r in results.values() for p in r["points"]}):
        kinds[f"budget {share:g}"] = lambda r, share=share: next(
            p["accuracy"] for p in r["points"] if p["budget"] == share
        )
    rows = {}
    for kind, value in kinds.items():
        scores = {name: value(result) for name, result in results.items()}
        row = {}
        for group, members in VTAB.items():
            inside = [scores[name] for name in members if name in scores]
            if inside:
                row[group] = float(np.mean(inside))
        if len(row) == len(VTAB):
            row["mean of groups"] = float(np.mean([row[group] for group in VTAB]))
        row["mean of sets"] = float(np.mean(list(scores.values())))
        rows[kind] = row
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with one folder per data set; without it --datasets are paths or names")
    parser.add_argument("--datasets", nargs="+", help="default: the 19 of VTAB-1k, with --shots the five of FGVC")
    parser.add_argument("--data-dir", help="where timm datasets lie")
    parser.add_argument("--shots", type=int, help="few-shot: training images per class")
    parser.add_argument("--model", default="vit_base_patch16_224.augreg_in21k")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="as JSON, for timm.create_model")
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, default=None, help="default: if no --checkpoint"
    )
    parser.add_argument("--checkpoint", help="weights of the backbone, in place of the published ones")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--method", choices=("repadapter", "lora", "bottleneck"), default="repadapter")
    parser.add_argument("--plain", action="store_true", help="without exits")
    parser.add_argument("--exit-interval", type=int)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.5, 1, 5, 10])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.7], help="shares of the whole model's MACs")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/vtab")
    args = parser.parse_args(argv)
    if args.pretrained is None:
        args.pretrained = args.checkpoint is None
    if not args.root and not args.datasets:
        parser.error("say where the data is: --root FOLDER, or --datasets with paths or timm datasets")
    args.datasets = args.datasets or list(FGVC if args.shots else [name for group in VTAB.values() for name in group])
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    kind = f"{'' if args.plain else 'dyn-'}{args.method}{f'-{args.shots}shot' if args.shots else ''}"
    output = Path(args.output, kind)
    output.mkdir(parents=True, exist_ok=True)
    results, absent = {}, []
    for name in args.datasets:
        file = output / f"{Path(name).name}.json"
        if file.is_file():
            results[name] = json.loads(file.read_text())
            continue
        try:
            results[name] = run(name, copy.copy(args))
        except FileNotFoundError as error:
            absent.append(f"{name}: {error}")
            continue
        file.write_text(json.dumps(results[name], indent=2) + "\n")
    for message in absent:
        print(f"left out, {message}")
    if not results:
        raise SystemExit("no data set was found; see above for what is missing.")
    for name, result in results.items():
        points = "".join(
            f"   {100 * p['accuracy']:5.1f} % at {p['macs'] / result['macs'][-1]:.2f} of the MACs"
            for p in result["points"]
        )
        print(f"{name:24s} s={result['scale']:<4g} last exit {100 * result['exit_accuracy'][-1]:5.1f} %{points}")
    rows = averages(results)
    for kind_of, row in rows.items():
        print(f"{kind_of}: " + ", ".join(f"{key} {100 * value:.2f}" for key, value in row.items()))
    if absent or len(results) < 19:
        print(
            f"averages over {len(results)} data sets; published VTAB-1k figures are the mean of the three groups of 19."
        )
    (output / "averages.json").write_text(json.dumps({"averages": rows, "datasets": sorted(results)}, indent=2) + "\n")
    return {"results": results, "averages": rows}


if __name__ == "__main__":
    main()
