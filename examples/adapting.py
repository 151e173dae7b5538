"""What the examples of adapters share: a pretrained backbone with a method and exits, training and measuring it."""

import argparse
import json
import math

import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.data import resolve_data_config
from timm.data.transforms_factory import transforms_imagenet_train
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from exit_plugins import BottleneckConfig, DynConfig, MultiExit, RepAdapterConfig, collect_exits, get_dyn_peft_model
from exit_plugins.peft.checkpoints import load_backbone

ADAPTERS = ("repadapter", "lora", "bottleneck")
METHODS = (*ADAPTERS, "linear", "full")  # the last two, without adapters or exits: the classifier alone, all weights


def add_model_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Options of ``make_model`` and ``train``, a field of DynConfig each among them."""
    parser.add_argument("--model", default=model)
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="as JSON, for timm.create_model")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    DynConfig.add_arguments(parser, without=("num_classes", "num_frames"))


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


def run_name(args: argparse.Namespace, plain: bool) -> str:
    """Name of a run's folder: the method, and every setting of the exits that is not the paper's."""
    if plain:
        return args.method
    asked, usual = vars(DynConfig.from_arguments(args)), vars(DynConfig())
    changed = [f"{name}={value}".replace(" ", "") for name, value in asked.items() if value != usual[name]]
    return "-".join((f"dyn-{args.method}", *changed))


def augmentation(size: tuple[int, int, int], mean: tuple, std: tuple):
    """NOAH's for few shots and other domains: colour jitter of 0.4, and RandAugment of magnitude 9 and deviation 0.5.

    They act on a random crop that is flipped half of the time, both in timm's way, which is our reading.
    """
    return transforms_imagenet_train(
        size[1:],
        mean=mean,
        std=std,
        interpolation="bicubic",
        color_jitter=0.4,
        force_color_jitter=True,
        auto_augment="rand-m9-mstd0.5",
    )


def data_config(args: argparse.Namespace) -> dict:
    """Input size, mean and std of the backbone, as timm resolves them."""
    probe = timm.create_model(args.model, num_classes=0, **args.model_kwargs)
    return resolve_data_config({"img_size": args.img_size} if args.img_size else {}, model=probe)


def make_backbone(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The pretrained backbone with a new classifier."""
    kwargs = {"img_size": args.img_size} if args.img_size else {}
    backbone = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        **kwargs,
        **args.model_kwargs,
    )
    return load_backbone(backbone, args.checkpoint) if args.checkpoint else backbone


def make_model(args: argparse.Namespace, num_classes: int, scale: float) -> nn.Module:
    """The pretrained backbone with the method's adapters, and exits unless ``--plain``."""
    backbone = make_backbone(args, num_classes)
    if args.method in ("linear", "full"):
        backbone.requires_grad_(args.method == "full")
        backbone.get_classifier().requires_grad_(True)
        return backbone
    config = {
        "repadapter": lambda: RepAdapterConfig(target_modules=["qkv", "fc1"], r=args.r, scale=scale),
        "lora": lambda: LoraConfig(r=args.r, lora_alpha=args.r, lora_dropout=0.1, target_modules=["qkv"]),
        "bottleneck": lambda: BottleneckConfig(target_modules=["fc2"], r=args.r),
    }[args.method]()
    if args.plain:
        config.modules_to_save = ["head"]
        return get_peft_model(backbone, config)
    return get_dyn_peft_model(backbone, config, DynConfig.from_arguments(args, num_classes=num_classes))


def finished(model: nn.Module, method: str) -> nn.Module:
    """The trained model in evaluation mode, merged where the method can be."""
    return model.merge_and_unload().eval() if method in ("repadapter", "lora") else model.eval()


def train(model: nn.Module, data: Dataset, args: argparse.Namespace) -> None:
    """AdamW on cross-entropy, cosine with warm-up by epochs; a linear probe's frozen part stays as in evaluation."""
    device = torch.device(args.device)
    model.to(device).train(getattr(args, "method", None) != "linear")
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
    workers = 0 if isinstance(data, TensorDataset) else args.workers
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, generator=generator, num_workers=workers)
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


class ClassSubset(MultiExit, nn.Module):
    """A model asked about some of its classes only, ``index`` (C',): those that a test set of another domain has."""

    def __init__(self, model: nn.Module, index: list[int]) -> None:
        super().__init__()
        self.model, self.num_exits = model, model.num_exits
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None)  # policies of the model are for this, too
        self.register_buffer("index", torch.tensor(index))

    def begin_exits(self, x):
        return self.model.begin_exits(x)

    def forward_exit(self, index, state):
        logits, state = self.model.forward_exit(index, state)
        return logits[:, self.index], state


def measure(model: nn.Module, data: Dataset, args: argparse.Namespace):
    """Every exit's answer to every sample."""
    model = model if hasattr(model, "num_exits") else SingleExit(model)
    loader = DataLoader(data, batch_size=args.batch_size, num_workers=args.workers)
    return collect_exits(model, loader, device=args.device, progress=False)
