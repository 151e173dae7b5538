"""Train a model with early exits on CIFAR, or any set of small images, held in memory whole and augmented there.

    python examples/train_cifar.py --data torch/cifar100 --data-dir datasets --download --model chase_cifar
    python examples/train_cifar.py --data path/to/folder --model msdnet_cifar_batch --epochs 30 --minutes 8

The defaults are the usual recipe of this family: AdamW, 300 epochs, warm-up 20, cosine, mixup, cutmix, RandAugment,
random erasing, label smoothing, moving average. On a GPU it trains in bfloat16 and compiled. A checkpoint is written
after every epoch: the same command again goes on where the last one stopped, and ``--minutes`` stops it in time.

Writes to --output: checkpoint.pt, history.json (loss and every exit's accuracy by epoch), test.npz (what every exit
said of every test image), curves.json and curves.png (anytime and budgeted accuracy over MACs, thresholds solved on
held-out training images; ``--calibration 0`` trains on all and leaves the budgeted curve out), and model/, which
``timm.create_model("local-dir:OUTPUT/model", pretrained=True)`` loads. ``--against OTHER/curves.json`` draws other runs
into the picture.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm.auto import tqdm

from exit_plugins import MultiExitLoss, anytime_curve, budgeted_curve, collect_exits, exit_costs
from exit_plugins.exits import plots
from exit_plugins.exits.files import atomic_write
from exit_plugins.exits.losses import LOSS_PRESETS, ExitWeights
from exit_plugins.timm import list_models, save_for_hf
from exit_plugins.timm.data import ImageView, open_dataset, open_splits
from exit_plugins.timm.kernels import use_faster_products

Split = tuple[Tensor, Tensor]  # images (N, 3, H, W) uint8, classes (N,) int64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an image folder, or a timm dataset (torch/cifar100)")
    parser.add_argument("--data-dir", help="where a timm dataset lies")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the dataset")
    parser.add_argument("--calibration", type=float, default=0.1, help="share of the training images held out; 0: none")
    parser.add_argument("--samples", type=int, help="train on this many images, drawn at random")
    parser.add_argument("--model", default="chase_cifar", choices=list_models(), metavar="MODEL")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE")
    parser.add_argument("--pretrained-path", type=Path, help="start from the weights in this file, in timm's layout")
    parser.add_argument("--input-size", type=int, help="images are scaled to this many pixels (default: the model's)")
    parser.add_argument("--exit-loss", choices=tuple(LOSS_PRESETS), help="default: the model's own")
    parser.add_argument("--exit-weights", type=float, nargs="+", help="of the exits' cross-entropies; no other loss")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--layer-decay", type=float, help="of the learning rate towards the input, for trained weights")
    parser.add_argument("--warmup-epochs", type=float, default=20)
    parser.add_argument("--clip-grad", type=float, default=5.0)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--mixup", type=float, default=0.8)
    parser.add_argument("--cutmix", type=float, default=1.0)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--randaug", type=int, default=9, help="magnitude of RandAugment, 0 for none")
    parser.add_argument("--reprob", type=float, default=0.25, help="share of the images with a part erased")
    parser.add_argument("--ema-decay", type=float, default=0.9998, help="of the moving average of the weights, 0: none")
    parser.add_argument("--budgets", type=int, default=20, help="points of the budgeted curve")
    parser.add_argument("--against", nargs="*", type=Path, default=[], metavar="JSON", help="other runs' curves.json")
    parser.add_argument("--minutes", type=float, help="stop after the epoch in which these minutes have passed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: runs/MODEL")
    args = parser.parse_args(argv)
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error("--batch-size must be even: mixup mixes the images in pairs.")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1.")
    args.output = args.output or Path("runs") / args.model
    on_gpu = args.device.startswith("cuda")
    args.amp = on_gpu if args.amp is None else args.amp
    args.compile = on_gpu if args.compile is None else args.compile
    return args


def load_split(view: ImageView, size: int, device: torch.device, name: str) -> Split:
    """All images of a split as one uint8 tensor on ``device``, scaled to ``size`` x ``size`` where they differ."""
    images, targets = np.empty((len(view), size, size, 3), dtype=np.uint8), np.empty(len(view), dtype=np.int64)
    for index in tqdm(range(len(view)), desc=f"reading {name}", disable=None):
        image, targets[index] = view[index]
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.BICUBIC)
        images[index] = np.asarray(image)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device), torch.from_numpy(targets).to(device)


class Batches:
    """Batches of a split in memory: normalised, and for training shuffled and augmented where the images are."""

    def __init__(self, split: Split, model: nn.Module, args: argparse.Namespace, training: bool = False) -> None:
        self.images, self.targets = split
        self.batch_size = args.batch_size
        self.training = training
        self.device = self.images.device
        cfg = model.default_cfg
        self.mean, self.std = (torch.tensor(cfg[k], device=self.device).view(3, 1, 1) * 255 for k in ("mean", "std"))
        self.policy = v2.RandAugment(num_ops=2, magnitude=args.randaug) if args.randaug else None
        self.erase = RandomErasing(args.reprob, mode="pixel", device=self.device) if args.reprob else None
        self.mix = None
        if args.mixup or args.cutmix:
            self.mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)

    def __len__(self) -> int:
        count = len(self.images)
        return count // self.batch_size if self.training else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Split]:
        count = len(self.images)
        order = torch.randperm(count).to(self.device) if self.training else torch.arange(count, device=self.device)
        for index in order.split(self.batch_size)[: len(self)]:
            images, target = self.images[index], self.targets[index]
            if self.training:
                images = self._move(images, by=images.shape[-1] // 8)
                if self.policy is not None:
                    # One draw of operations holds for a whole tensor; small pieces make for many draws.
                    images = torch.cat([self.policy(piece) for piece in images.split(32)])
            images = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            if self.training and self.erase is not None:
                images = self.erase(images)
            if self.training and self.mix is not None:
                images, target = self.mix(images, target)
            yield images, target

    @staticmethod
    def _move(images: Tensor, by: int) -> Tensor:
        """Mirror half of the images and shift each by up to ``by`` pixels, black coming in at the edge."""
        count, _, height, width = images.shape
        device = images.device
        mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
        images = nn.functional.pad(torch.where(mirrored, images.flip(-1), images), (by,) * 4)
        top, left = torch.randint(2 * by + 1, (2, count, 1), device=device)
        rows = (top + torch.arange(height, device=device))[:, None, :, None]
        columns = (left + torch.arange(width, device=device))[:, None, None, :]
        samples = torch.arange(count, device=device)[:, None, None, None]
        channels = torch.arange(3, device=device)[None, :, None, None]
        return images[samples, channels, rows, columns]


class Run:
    """Model, optimizer, schedule and moving average of one training run, and what is stored of them."""

    def __init__(self, args: argparse.Namespace, num_classes: int, steps_per_epoch: int, device: torch.device) -> None:
        self.args = args
        self.device = device
        torch.manual_seed(args.seed)
        drop_path = {"drop_path_rate": args.drop_path} if args.drop_path else {}
        weights = {}
        if args.pretrained_path:
            weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(args.pretrained_path)}}
        self.model = timm.create_model(
            args.model, num_classes=num_classes, **weights, **drop_path, **args.model_kwargs
        ).to(device)
        self.model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU too
        use_faster_products(self.model)  # a transformer by half on AMD's
        self.trained = torch.compile(self.model) if args.compile else self.model
        weights = args.exit_weights and ExitWeights(tuple(args.exit_weights), (0.0,) * len(args.exit_weights))
        self.loss = MultiExitLoss.for_model(
            self.model, args.exit_loss, label_smoothing=args.smoothing, weights=weights or None
        )
        self.optimizer = create_optimizer_v2(
            self.model, args.opt, lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay
        )
        self.steps_per_epoch = steps_per_epoch
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=args.epochs * steps_per_epoch,
            lr_min=args.lr * 1e-3,
            warmup_t=round(min(args.warmup_epochs, args.epochs / 2) * steps_per_epoch),
            warmup_lr_init=args.lr * 1e-3,
            t_in_epochs=False,
        )
        self.ema = ModelEmaV3(self.model, args.ema_decay, use_warmup=True) if args.ema_decay else None
        self.history: list[dict[str, Any]] = []

    @property
    def best_weights(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.model

    def follow(self, step: int) -> None:
        """Move what depends on the number of updates done."""
        self.scheduler.step_update(step)
        if getattr(self.model, "needs_progress", False):
            self.model.set_progress(step / (self.args.epochs * self.steps_per_epoch))

    def train_epoch(self, batches: Batches) -> float:
        """One pass; mean loss. What is random in it follows from seed and epoch, so that a resumed run is the same."""
        epoch = len(self.history)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(self.args.seed * 100_003 + epoch)
        step = epoch * self.steps_per_epoch
        self.follow(step)
        self.trained.train()
        total = torch.zeros((), device=self.device)
        for images, target in tqdm(batches, desc=f"epoch {epoch + 1}/{self.args.epochs}", leave=False, disable=None):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                outputs = self.trained(images)
            loss = self.loss(outputs, target)
            self.optimizer.zero_grad()
            loss.backward()
            if self.args.clip_grad:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
            self.optimizer.step()
            step += 1
            self.follow(step)
            if self.ema is not None:
                self.ema.update(self.model, step=step)
            total += loss.detach()
        mean = total.item() / len(batches)
        if not np.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean}; lower --lr or lengthen --warmup-epochs.")
        return mean

    def save(self, options: dict[str, Any]) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, **({"ema": self.ema} if self.ema else {})}
        state = {name: part.state_dict() for name, part in parts.items()}
        with atomic_write(self.args.output / "checkpoint.pt", "wb") as file:
            torch.save({**state, "history": self.history, "options": options}, file)

    def resume(self, options: dict[str, Any]) -> None:
        """Go on from the checkpoint in the output folder, if there is one and it is of this run."""
        path = self.args.output / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        changed = [k for k in options.keys() | state["options"].keys() if options.get(k) != state["options"].get(k)]
        if changed:
            raise ValueError(
                f"{path} is of a run with another --{' --'.join(sorted(k.replace('_', '-') for k in changed))}; give "
                "the same options to go on with it, or another --output."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.history = state["history"]
        print(f"going on after epoch {len(self.history)} of {path}")


def stored_options(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    free = {
        "output",
        "device",
        "minutes",
        "against",
        "budgets",
        "amp",
        "compile",
        "data_dir",
        "download",
        "pretrained_path",
    }
    return {name: value for name, value in vars(args).items() if name not in free}


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)


def write_curves(args: argparse.Namespace, run: Run, calibration: Batches, test: Batches, size: int) -> dict[str, Any]:
    """Anytime and budgeted curve of the trained model, as JSON and picture."""
    model = run.best_weights
    costs = exit_costs(model, (model.in_chans, size, size))
    tested = collect_exits(model, test, keep_logits=True)
    tested.save(args.output / "test.npz")
    anytime = anytime_curve(tested, costs.macs)
    budgeted = []
    if args.calibration:
        budgeted = budgeted_curve(collect_exits(model, calibration), tested, costs.macs, args.budgets)
    result = {
        "name": args.output.name,
        "options": stored_options(args),
        "costs": {"macs": costs.macs.tolist(), "params": costs.params.tolist()},
        "anytime": [point.to_dict() for point in anytime],
        "budgeted": [point.to_dict() for point in budgeted],
        "history": run.history,
    }
    write_json(args.output / "curves.json", result)
    curves = {args.output.name: budgeted} if budgeted else {}
    for path in args.against:
        other = json.loads(path.read_text())
        curves[other["name"]] = [SimpleNamespace(**point) for point in other["budgeted"]]
    plots.save(plots.budget_curve(curves, anytime), args.output / "curves.png")
    return result


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Train, or go on training; the curves once all epochs are done, None if ``--minutes`` were up before."""
    args = parse_args(argv)
    start = time.monotonic()
    missing = [str(path) for path in args.against if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no curves at {', '.join(missing)}; train that run first.")
    device = torch.device(args.device)
    if args.download:
        open_dataset(args.data, "train", args.data_dir, download=True)
    data = open_splits(args.data, args.data_dir, seed=args.seed, calibration=args.calibration)
    size = args.input_size or timm.models.get_pretrained_cfg_value(args.model, "input_size")[-1]
    training = data.train
    if args.samples is not None:
        if not 0 < args.samples <= len(training):
            raise ValueError(f"--samples must lie between 1 and the {len(training)} training images.")
        training, _ = training.split(args.samples / len(training), args.seed)
    if len(training) < args.batch_size:
        raise ValueError(f"{len(training)} training images do not fill a batch; give a smaller --batch-size.")
    splits = {"training": training, "calibration": data.calibration, "test": data.test}
    loaded = [load_split(view, size, device, name) for name, view in splits.items()]

    run = Run(args, len(data.classes), len(training) // args.batch_size, device)
    batches, calibration, test = (
        Batches(split, run.model, args, training=name == "training") for name, split in zip(splits, loaded, strict=True)
    )
    options = stored_options(args)
    args.output.mkdir(parents=True, exist_ok=True)
    run.resume(options)
    while len(run.history) < args.epochs:
        began, cpu_began = time.monotonic(), time.process_time()
        loss = run.train_epoch(batches)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        record = {"epoch": len(run.history) + 1, "loss": loss, "seconds": seconds, "cpu_seconds": cpu_seconds}
        words = f"epoch {record['epoch']}/{args.epochs}: loss {loss:.3f}"
        if args.calibration:
            accuracy = collect_exits(run.best_weights, calibration, progress=False).correct.mean(1)
            record["accuracy"] = accuracy.tolist()
            words += f", held-out accuracy of every exit {' '.join(f'{100 * value:.1f}' for value in accuracy)} %"
        run.history.append(record)
        run.save(options)
        write_json(args.output / "history.json", run.history)
        print(words, flush=True)
        if args.minutes and time.monotonic() - start > 60 * args.minutes and len(run.history) < args.epochs:
            print(f"stopped after {args.minutes:g} minutes; the same command goes on from here")
            return None

    result = write_curves(args, run, calibration, test, size)
    accuracies = [100 * point["accuracy"] for point in result["anytime"]]
    trained = run.best_weights.cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no other
    save_for_hf(trained, args.output / "model", accuracies, Path(args.data).name, classes=data.classes)
    print("exit    MACs (M)  test accuracy (%)")
    for point in result["anytime"]:
        print(f"{point['exit_index'] + 1:4}  {point['cost'] / 1e6:10.2f}  {100 * point['accuracy']:17.2f}")
    print(f"Look at {args.output / 'curves.png'}.")
    return result


if __name__ == "__main__":
    main()
