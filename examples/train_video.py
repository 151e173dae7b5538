"""Train a network on clips, with timm's own parts: Dyn-Perceiver with temporal shift, or any timm CNN as its rival.

    python examples/train_video.py --data motion --img-size 32 --no-crop --epochs 10 --batch-size 32
    python examples/train_video.py -c examples/recipes/video/tsm_something_v1.yaml --data LISTS --data-dir FRAMES
    python examples/train_video.py --data path/to/videos --model resnet50 --pretrained          # TSM-ResNet50

Clips come from videos in class subfolders, from Something-Something's lists or are generated (``motion``). timm's
optimizer, scheduler, moving average and checkpoints stand around this package's MultiExitTask. Writes to --output:
checkpoints, summary.csv with every exit's accuracy, args.yaml, and the trained model in model/ where timm can build it
again. A run that was stopped goes on with --resume.
"""

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import yaml
from timm.loss import create_classification_loss
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, NativeScaler, random_seed, update_summary
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from train_timm import train_epoch, validate

from exit_plugins.exits.losses import LOSS_PRESETS
from exit_plugins.timm import list_models, save_for_hf
from exit_plugins.timm.clips import ClipTransform
from exit_plugins.timm.data import ImageView, open_dataset
from exit_plugins.timm.images import input_config
from exit_plugins.timm.train import ExitLossOptions, MultiExitTask
from exit_plugins.timm.video import temporal_shift

_logger = logging.getLogger("train_video")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, help="YAML file of options, which those given here replace")
    parser.add_argument("--data", default="motion", help="videos, a folder of lists, or motion")
    parser.add_argument("--data-dir", help="where the paths of the lists start from")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--val-split", default="validation")
    parser.add_argument("--model", default="tsm_dynperceiver_test", help="a model of clips, or any timm CNN to shift")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--features", action=argparse.BooleanOptionalAction, default=True, help="shift feature maps")
    parser.add_argument("--latent", action=argparse.BooleanOptionalAction, default=True, help="shift latents")
    parser.add_argument("--online", action="store_true", help="shift from the frame before only, for streams")
    parser.add_argument("--pretrained", action="store_true", help="start from the published weights of images")
    parser.add_argument("--initial-checkpoint", type=Path, help="start from this checkpoint of the image network")
    parser.add_argument("--drop", type=float, help="dropout before the classifiers (default: the model's)")
    parser.add_argument("--exit-loss", choices=tuple(LOSS_PRESETS), help="default: the model's own")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32, help="clips")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--head-lr", type=float, default=1.0, help="times --lr for every exit's classifier")
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--decay-milestones", type=int, nargs="+", default=[20, 40], help="epochs, of multistep")
    parser.add_argument("--decay-rate", type=float, default=0.1)
    parser.add_argument("--warmup-epochs", type=float, default=1.0)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--crop", action=argparse.BooleanOptionalAction, default=True, help="TSM's random crops")
    parser.add_argument("--hflip", type=float, default=0.0, help="mirror clips; never where direction is the label")
    parser.add_argument("--model-ema-decay", type=float, help="keep and evaluate a moving average of the weights")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where the device has it, else float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--output", type=Path, default=Path("runs/train_video"))
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    config = parser.parse_known_args(argv)[0].config
    if config is not None:
        options = yaml.safe_load(config.read_text())
        unknown = sorted(options.keys() - vars(parser.parse_args([])).keys())
        if unknown:
            parser.error(f"{config} has unknown options: {', '.join(unknown)}.")
        parser.set_defaults(**options)
    return parser.parse_args(argv)


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model of clips: a registered one, or a timm network under temporal shift."""
    shift = dict(num_frames=args.num_frames, latent=args.latent, features=args.features, online=args.online)
    kwargs = dict(num_classes=num_classes, pretrained=args.pretrained)
    if args.drop is not None:
        kwargs["drop_rate"] = args.drop
    if args.model in list_models(clips=True):
        model = timm.create_model(args.model, **shift, **kwargs)
    else:
        model = temporal_shift(timm.create_model(args.model, **kwargs), **shift)
    if args.initial_checkpoint is not None:
        load_checkpoint(model, str(args.initial_checkpoint))
    return model


def parameter_groups(model: nn.Module, weight_decay: float, head_lr: float) -> list[dict]:
    """timm's groups, with weight decay and without, and in each the classifiers apart at ``head_lr`` times the rate."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    heads = {id(p) for p in model.get_classifier().parameters()}
    groups = []
    for group in param_groups_weight_decay(model, weight_decay, exempt):
        for of_heads in (False, True):
            chosen = [p for p in group["params"] if (id(p) in heads) == of_heads]
            if chosen:
                groups.append({**group, "params": chosen, **({"lr_scale": head_lr} if of_heads else {})})
    return groups


def make_loaders(args: argparse.Namespace, model: nn.Module, views: list[ImageView]) -> list[DataLoader]:
    """Training and validation loader of clips."""
    config = input_config(model, args.img_size and (args.img_size, args.img_size))
    transforms = [
        ClipTransform.of_config(config, True, crop=args.crop, hflip=args.hflip),
        ClipTransform.of_config(config),
    ]
    shared = dict(batch_size=args.batch_size, num_workers=args.workers, pin_memory=args.device.startswith("cuda"))
    return [
        DataLoader(view.with_transform(transform), shuffle=training, drop_last=training, **shared)
        for view, transform, training in zip(views, transforms, (True, False), strict=True)
    ]


class OnDevice:
    """A loader's batches on the device, behind a progress bar."""

    def __init__(self, loader: DataLoader, device: torch.device, name: str) -> None:
        self.loader, self.device, self.name = loader, device, name

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for clips, target in tqdm(self.loader, self.name, leave=False, disable=None):
            yield clips.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    timm.utils.setup_default_logging()
    random_seed(args.seed)
    device = torch.device(args.device)
    views = [open_dataset(args.data, split, args.data_dir) for split in (args.train_split, args.val_split)]
    if not all(view.holds_clips for view in views):
        raise ValueError(f"{args.data} holds images; this trains on clips (see examples/train_timm.py for images).")
    if views[0].classes != views[1].classes:
        raise ValueError(f"the splits of {args.data} differ in their classes.")
    model = make_model(args, len(views[0].classes)).to(device)
    loaders = [OnDevice(loader, device, "") for loader in make_loaders(args, model, views)]
    if len(loaders[0]) == 0:
        raise ValueError(f"{len(views[0])} clips make no batch of {args.batch_size}; lower --batch-size.")

    task = MultiExitTask(
        model,
        create_classification_loss(smoothing=args.smoothing),
        device=device,
        exit_loss=ExitLossOptions(args.exit_loss),
    )
    ema = args.model_ema_decay is not None
    if ema:
        task.setup_ema(decay=args.model_ema_decay)
    groups = parameter_groups(model, args.weight_decay, args.head_lr)
    optimizer = create_optimizer_v2(groups, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_milestones=args.decay_milestones,
        decay_rate=args.decay_rate,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loaders[0]),
    )
    task.follow(scheduler, epochs, len(loaders[0]))
    bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    dtype = torch.bfloat16 if bf16 else torch.float16
    autocast = (lambda: torch.autocast(device.type, dtype)) if args.amp else nullcontext
    scaler = NativeScaler(device.type) if args.amp and not bf16 else None

    args.output.mkdir(parents=True, exist_ok=True)
    summary, last = args.output / "summary.csv", args.output / "last.pth.tar"
    start = 0
    if args.resume and last.is_file():
        start = resume_checkpoint(model, str(last), optimizer, scaler)
        if ema:
            load_checkpoint(task.get_trainable_module(ema=True).module, str(last), use_ema=True)
        scheduler.step_update(start * len(loaders[0]))
    else:
        summary.unlink(missing_ok=True)
    # Plain values only, so that the checkpoints load with weights_only=True.
    stored = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    (args.output / "args.yaml").write_text(yaml.safe_dump(stored))
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(**stored),
        checkpoint_dir=str(args.output),
        amp_scaler=scaler,
        max_history=1,
        task=task,
    )
    if start:
        saver.load_state_dict_from_checkpoint(str(last))
    metrics: dict[str, float] = {}
    for epoch in range(start, epochs):
        loaders[0].name, loaders[1].name = f"epoch {epoch}", "validation"
        loss = train_epoch(task, loaders[0], optimizer, scheduler, scaler, autocast, args, epoch * len(loaders[0]))
        metrics = validate(task, loaders[1], autocast, ema)
        _logger.info(f"epoch {epoch}: training loss {loss:.4f}, validation top-1 {metrics['top1']:.2f} %")
        update_summary(epoch, {"loss": loss}, metrics, summary, optimizer.param_groups[0]["lr"])
        saver.save_checkpoint(epoch, metric=metrics["top1"])

    if not metrics:  # a run that had ended: perhaps it was stopped before the model was written
        loaders[1].name = "validation"
        metrics = validate(task, loaders[1], autocast, ema)
    if args.model in list_models(clips=True):
        trained = task.get_trainable_module(ema=True).module if ema else model
        accuracies = [metrics[f"top1_exit{k + 1}"] for k in range(model.num_exits)]
        used = {} if args.img_size is None else {"data_config": {"img_size": args.img_size}}
        save_for_hf(
            trained.cpu(), args.output / "model", accuracies, Path(args.data).name, classes=views[0].classes, **used
        )
    return metrics


if __name__ == "__main__":
    main()
