"""Train any registered multi-exit model with timm's own parts, for those who have no train.py at hand.

    python examples/train_timm.py --model dynperceiver_test --data path/to/folder          # train/ and val/ or test/
    python examples/train_timm.py --model msdnet_cifar_batch --data torch/cifar100 --data-dir datasets --download
    python examples/train_timm.py --data hfds/uoft-cs/cifar100 --exit-loss released --epochs 100 --amp

timm's data loader, augmentation, mixup, optimizer, scheduler, moving average and checkpoints around this package's
MultiExitTask. Writes to --output: checkpoints, summary.csv with every exit's accuracy, args.yaml, and model/, the
trained model with its card, which ``timm.create_model("local-dir:OUTPUT/model", pretrained=True)`` loads.
"""

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import yaml
from timm.data import FastCollateMixup, create_loader, resolve_input_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, NativeScaler, dispatch_clip_grad, random_seed, update_summary

from exit_plugins.exits.losses import LOSS_PRESETS
from exit_plugins.timm import list_models, save_for_hf
from exit_plugins.timm.data import ImageView, class_names, open_dataset
from exit_plugins.timm.train import ExitLossOptions, MultiExitTask

_logger = logging.getLogger("train_timm")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an image folder, or a timm dataset (torch/..., hfds/...)")
    parser.add_argument("--data-dir", help="where a timm dataset lies")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the dataset")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--val-split", help="default: validation, or test where there is none")
    parser.add_argument("--holdout", type=float, metavar="SHARE", help="cut the splits that are missing from the data")
    parser.add_argument("--model", default="dynperceiver_test", choices=list_models(clips=False), metavar="MODEL")
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--exit-loss", choices=tuple(LOSS_PRESETS), help="default: the model's own")
    parser.add_argument("--exit-loss-alpha", type=float, help="of the preset paper (default: 0.5)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--warmup-epochs", type=float, default=0.5)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--aa", help="timm's AutoAugment policy, such as rand-m9-mstd0.5-inc1")
    parser.add_argument("--reprob", type=float, default=0.0, help="random erasing")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.6, 1.0), help="area of the random crop")
    parser.add_argument("--hflip", type=float, default=0.5)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--model-ema-decay", type=float, help="keep and evaluate a moving average of the weights")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where the device has it, else float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/train_timm"))
    return parser.parse_args(argv)


def open_views(args: argparse.Namespace) -> tuple[list[ImageView], int]:
    """Training and validation split and the number of classes."""
    download = {"download": True} if args.download else {}
    splits = (args.train_split, args.val_split or ("validation", "test"))
    views = [open_dataset(args.data, split, args.data_dir, args.holdout, args.seed, **download) for split in splits]
    return [views[0], views[1].with_classes(class_names(views[0]))], len(class_names(views[0]))


def make_loaders(args: argparse.Namespace, model: torch.nn.Module, views: list[ImageView]) -> tuple:
    """Training and validation loader with timm's transforms."""
    config = resolve_input_data_config(model, {"img_size": args.img_size})
    shared = {key: config[key] for key in ("input_size", "mean", "std")}
    shared |= dict(batch_size=args.batch_size, num_workers=args.workers, device=torch.device(args.device))
    shared |= dict(persistent_workers=args.workers > 0, pin_memory=args.device.startswith("cuda"))
    mixing = None
    if args.mixup or args.cutmix:
        mixing = FastCollateMixup(
            args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes
        )
    training = create_loader(
        views[0],
        is_training=True,
        auto_augment=args.aa,
        re_prob=args.reprob,
        scale=tuple(args.scale),
        hflip=args.hflip,
        collate_fn=mixing,
        interpolation="random",
        **shared,
    )
    rest = {key: config[key] for key in ("interpolation", "crop_pct")}
    return training, create_loader(views[1], is_training=False, **rest, **shared)


def train_epoch(task: MultiExitTask, loader, optimizer, scheduler, scaler, autocast, args, first_update: int) -> float:
    """One pass over the training split; mean loss."""
    task.get_trainable_module().train()
    losses = AverageMeter()
    for step, (images, target) in enumerate(loader, start=first_update):
        optimizer.zero_grad()
        with autocast():
            loss = task(images, target)["loss"]
        if not loss.isfinite():
            raise FloatingPointError(f"the loss became {loss.item()}; lower --lr or raise --warmup-epochs.")
        parameters = task.get_clip_parameters()
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=parameters)
        else:
            loss.backward()
            if args.clip_grad:
                dispatch_clip_grad(parameters, args.clip_grad)
            optimizer.step()
        task.update_ema(step=step + 1)
        losses.update(loss.item(), len(images))
        if scheduler is not None:
            scheduler.step_update(step + 1)
    return losses.avg


@torch.inference_mode()
def validate(task: MultiExitTask, loader, autocast, ema: bool) -> dict[str, float]:
    """Loss and top-1, top-5 of the last exit, top-1 of every exit."""
    model, evaluator = task.get_eval_model(ema=ema).eval(), task.create_evaluator()
    for images, target in loader:
        with autocast():
            output = model(images)
        evaluator.update(output, target)
    return evaluator.compute()


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    timm.utils.setup_default_logging()
    random_seed(args.seed)
    device = torch.device(args.device)
    views, num_classes = open_views(args)
    fixed = timm.models.get_pretrained_cfg_value(args.model, "fixed_input_size")
    sizes = {"img_size": args.img_size} if args.img_size and fixed else {}
    model = timm.create_model(args.model, num_classes=num_classes, **sizes).to(device)
    train_loader, val_loader = make_loaders(args, model, views)

    mixing = bool(args.mixup or args.cutmix)
    task = MultiExitTask(
        model,
        create_classification_loss(smoothing=args.smoothing, soft_targets=mixing),
        device=device,
        exit_loss=ExitLossOptions(args.exit_loss, args.exit_loss_alpha),
    )
    ema = args.model_ema_decay is not None
    if ema:
        task.setup_ema(decay=args.model_ema_decay)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    task.follow(scheduler, epochs, len(train_loader))
    bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    dtype = torch.bfloat16 if bf16 else torch.float16
    autocast = (lambda: torch.autocast(device.type, dtype)) if args.amp else nullcontext
    scaler = NativeScaler(device.type) if args.amp and not bf16 else None

    args.output.mkdir(parents=True, exist_ok=True)
    stored = vars(args) | {"output": str(args.output), "scale": list(args.scale)}
    (args.output / "args.yaml").write_text(yaml.safe_dump(stored))
    (args.output / "summary.csv").unlink(missing_ok=True)
    # Plain values only, so that the checkpoints load with weights_only=True.
    plain = argparse.Namespace(**stored)
    saver = CheckpointSaver(
        model, optimizer, args=plain, checkpoint_dir=str(args.output), amp_scaler=scaler, max_history=1, task=task
    )
    metrics: dict[str, float] = {}
    for epoch in range(epochs):
        first = epoch * len(train_loader)
        loss = train_epoch(task, train_loader, optimizer, scheduler, scaler, autocast, args, first)
        metrics = validate(task, val_loader, autocast, ema)
        _logger.info(f"epoch {epoch}: training loss {loss:.4f}, validation top-1 {metrics['top1']:.2f} %")
        update_summary(epoch, {"loss": loss}, metrics, args.output / "summary.csv", optimizer.param_groups[0]["lr"])
        saver.save_checkpoint(epoch, metric=metrics["top1"])

    trained = task.get_trainable_module(ema=True).module if ema else model
    accuracies = [metrics[f"top1_exit{k + 1}"] for k in range(model.num_exits)]
    used = {"classes": class_names(views[0])}
    if args.img_size is not None:
        used["data_config"] = {"img_size": args.img_size}
    save_for_hf(trained.cpu(), args.output / "model", accuracies, Path(args.data).name, **used)
    return metrics


if __name__ == "__main__":
    main()
