"""VTAB-1k, FGVC few-shot, or any data set of one's own: adapt a pretrained vision transformer, with or without exits.

    python examples/vtab.py --root vtab-1k --model vit_base_patch16_224.augreg_in21k --method repadapter
    python examples/vtab.py --root fgvc --datasets food-101 oxford-pets --shots 16 ...
    python examples/vtab.py --datasets torch/cifar100 --data-dir torchvision ...   # any image folder or timm dataset
    python examples/vtab.py --datasets imagenet --shots 16 --shifted imagenet-v2 imagenet-r ...   # other domains
    python examples/vtab.py --root vtab-1k --method linear ...                     # or full: what adapters compete with
    python examples/vtab.py --root vtab-1k --dropout-shallow 0.3 --mask none ...   # the paper's ablations, table 5

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
from pathlib import Path

import numpy as np
import torch
from adapting import (
    METHODS,
    ClassSubset,
    SingleExit,
    Transformed,
    add_model_arguments,
    augmentation,
    data_config,
    finished,
    in_memory,
    make_model,
    measure,
    run_name,
    train,
)
from timm.data import create_transform
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from exit_plugins import ExitTable, exit_costs, solve_thresholds
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.timm.data import class_names, open_dataset
from exit_plugins.timm.images import EXTENSIONS, read_image

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

    @classmethod
    def of(cls, samples: list[tuple[Path, int]]) -> "ListFile":
        """Of pairs (path, label)."""
        made = cls.__new__(cls)
        made.samples, made.transform = samples, None
        return made

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


def open_sets(name: str, args: argparse.Namespace) -> tuple[dict[str, Dataset], int, tuple[str, ...] | None]:
    """The splits train, val and test of a data set, as PIL images, its number of classes, and their names if known."""
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
    return sets, largest if args.shots else max(known.get(name, 0), largest), None


def cut_sets(spec: str, args: argparse.Namespace) -> tuple[dict[str, Dataset], int, tuple[str, ...]]:
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
    parts = {"train": whole.subset(train), "val": whole.subset(val)}
    return {**parts, "test": test}, len(class_names(whole)), class_names(whole)


def shifted_set(folder: Path, classes: tuple[str, ...]) -> tuple[ListFile, list[int]]:
    """Images of another domain, one folder per class as in training, and which of the training's classes they have.

    Labels count through the classes that are there, in the training's order.
    """
    home = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), folder)
    names = sorted(path.name for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
    foreign = [name for name in names if name not in classes]
    if foreign or not names:
        raise ValueError(
            f"{home} holds {len(names)} class folders, of which {len(foreign)} are no class of the training data"
            f"{f', such as {foreign[0]}' if foreign else ''}; expected folders named like {classes[0]}."
        )
    present = [index for index, name in enumerate(classes) if name in names]
    samples = [
        (path, label)
        for label, index in enumerate(present)
        for path in sorted((home / classes[index]).rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    return ListFile.of(samples), present


def budgeted(validation: ExitTable, test: ExitTable, costs: np.ndarray, shares: list[float]) -> list[dict]:
    """For every budget, thresholds solved on validation images and what they make of the test images."""
    points = []
    for share in shares:
        policy = solve_thresholds(validation, costs, budget=max(share * costs[-1], costs[0]))
        result = evaluate_policy(policy, test, costs)
        points.append(
            {
                "budget": share,
                "accuracy": result.accuracy,
                "macs": result.cost,
                "shares": result.shares.tolist(),
                "accuracy_of_leavers": [None if np.isnan(a) else float(a) for a in result.exit_accuracy],
                "thresholds": np.asarray(policy.thresholds).tolist(),
            }
        )
    return points


def run(name: str, args: argparse.Namespace) -> dict:
    """Search, train and test on one data set."""
    sets, num_classes, classes = open_sets(name, args)
    torch.manual_seed(args.seed)
    config = data_config(args)
    size = config["input_size"]
    transform = create_transform(  # resized as a whole: VTAB's objects are not always in the middle
        size, mean=config["mean"], std=config["std"], interpolation="bicubic", crop_pct=1.0, crop_mode="squash"
    )
    val_set = in_memory(sets["val"], transform, args.workers)
    if args.augment:
        augmented = augmentation(size, config["mean"], config["std"])
        train_set, both = (
            Transformed(data, augmented) for data in (sets["train"], ConcatDataset([sets["train"], sets["val"]]))
        )
    else:
        train_set = in_memory(sets["train"], transform, args.workers)
        both = TensorDataset(*map(torch.cat, zip(train_set.tensors, val_set.tensors, strict=True)))
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
    train(model, both, args)
    model = finished(model, args.method)
    model = model if hasattr(model, "num_exits") else SingleExit(model)
    table = measure(model, Transformed(sets["test"], transform), args)
    costs = exit_costs(model, size).macs
    shares = [] if args.plain else args.budgets
    shifted = {}
    for target in args.shifted:
        images, present = shifted_set(Path(target), classes)
        found = measure(ClassSubset(model, present), Transformed(images, transform), args)
        shifted[Path(target).name] = {
            "classes": len(present),
            "images": found.num_samples,
            "exit_accuracy": found.correct.mean(1).tolist(),
            "points": budgeted(val_table, found, costs, shares),
        }
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
        "points": budgeted(val_table, table, costs, shares),
        "shifted": shifted,
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
    parser.add_argument(
        "--shifted",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="domain generalisation: folders of the same classes, or some of them, to test on as well",
    )
    add_model_arguments(parser, "vit_base_patch16_224.augreg_in21k")
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, default=None, help="default: if no --checkpoint"
    )
    parser.add_argument(
        "--checkpoint", help="weights of the backbone, in place of the published ones; MoCo v3's and MAE's are read too"
    )
    parser.add_argument("--method", choices=METHODS, default="repadapter", help="linear and full are without exits")
    parser.add_argument("--plain", action="store_true", help="without exits")
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="NOAH's augmentation of training images; default: with --shots",
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.5, 1, 5, 10])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.7], help="shares of the whole model's MACs")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/vtab")
    args = parser.parse_args(argv)
    if args.pretrained is None:
        args.pretrained = args.checkpoint is None
    if args.augment is None:
        args.augment = bool(args.shots)
    args.plain = args.plain or args.method in ("linear", "full")
    if args.shifted and (args.root or len(args.datasets or []) != 1):
        parser.error("--shifted goes with one --datasets FOLDER, whose class folders name the classes")
    if not args.root and not args.datasets:
        parser.error("say where the data is: --root FOLDER, or --datasets with paths or timm datasets")
    args.datasets = args.datasets or list(FGVC if args.shots else [name for group in VTAB.values() for name in group])
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    kind = run_name(args, args.plain) + (f"-{args.shots}shot" if args.shots else "")
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
        for target, found in result.get("shifted", {}).items():
            points = "".join(
                f"   {100 * p['accuracy']:5.1f} % at {p['macs'] / result['macs'][-1]:.2f}" for p in found["points"]
            )
            print(f"  on {target}: last exit {100 * found['exit_accuracy'][-1]:5.1f} %{points}")
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
