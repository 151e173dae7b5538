"""Dyn-Adapter: what early exits over adapters keep of the adapters' accuracy, at half and at 0.7 of the MACs.

Adapters over a frozen EfficientNet-Lite0 from ImageNet (on its 1 x 1 convolutions), trained on few photographs of
Caltech-101 and on 1,000 images of CIFAR-10, and over a small vision transformer trained on CIFAR-100 here (experiment
``vit``). Each method plain and dynamic, by one recipe; thresholds are solved on a fifth of the training images, which
no run trains on. The paper's ablations (table 5) are over the transformer.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from adapting import SingleExit, finished
from base import (
    Experiment,
    Place,
    Result,
    Run,
    by_variant,
    mean_and_error,
    percent,
    table,
    verdict,
    write_packaged_weights,
)
from judging import Difference, paired
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from torch import nn
from train_cifar import Batches, load_split

from exit_plugins import BottleneckConfig, DynConfig, RepAdapterConfig, collect_exits, exit_costs, get_dyn_peft_model
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.files import atomic_write
from exit_plugins.exits.thresholds import solve_thresholds
from exit_plugins.timm.data import open_splits

METHODS = ("lora", "repadapter", "bottleneck")
SHARES = (0.5, 0.7)
CALIBRATION = 0.2
MARGIN = 0.01  # of accuracy, within which both count as equal
CHECKPOINT = "last.pt"  # in the folder of a run
SETTINGS = {"epochs": 40, "batch_size": 32, "lr": 3e-3, "weight_decay": 0.01, "warmup_epochs": 4, "smoothing": 0.1}


@dataclass(frozen=True)
class Task:
    """A frozen backbone and the images it is adapted to."""

    backbone: str
    data: str
    size: int
    samples: int | None
    targets: Mapping[str, list[str]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def network(self, place: Place, num_classes: int) -> nn.Module:
        if self.backbone == "vit":
            weights = place.state / "vit" / "plain-s0" / "model" / "model.safetensors"
            if not weights.is_file():
                raise SystemExit("this adapts a trained network: run vit/plain-s0 first.")
            state = {k.removeprefix("backbone."): v for k, v in load_file(weights).items()}
            net = timm.create_model(**self.kwargs, num_classes=num_classes)
            own = {k: v for k, v in state.items() if not k.startswith("head.")}
            missing = net.load_state_dict(own, strict=False)
            assert set(missing.missing_keys) == {"head.weight", "head.bias"} and not missing.unexpected_keys
            return net
        file = place.state / "weights" / f"{self.backbone}.pth"
        write_packaged_weights(self.backbone, file)
        overlay = {"file": str(file)}
        return timm.create_model(
            self.backbone, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        )


POINTWISE = ["conv_pw", "conv_pwl"]
VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "embed_dim": 96}
TASKS = {
    "caltech101": Task("tf_efficientnet_lite0", "caltech101", 128, None, dict.fromkeys(METHODS, POINTWISE)),
    "cifar10": Task("tf_efficientnet_lite0", "cifar10", 96, 1000, dict.fromkeys(METHODS, POINTWISE)),
    "vit_cifar10": Task(
        "vit",
        "cifar10",
        32,
        1000,
        {"lora": ["qkv"], "repadapter": ["qkv", "fc1"], "bottleneck": ["fc2"]},
        kwargs=VIT,
    ),
}
# Table 5 of the paper, over the transformer with RepAdapter; what a row leaves out is the method's own.
NO_SPARSITY = {"dropout_shallow": None, "dropout_deep": None, "mask": None}
NO_PRIORITY = {"lambda_shallow": (1.0, 1.0), "lambda_deep": (1.0, 1.0)}
ABLATIONS = {
    "5a": {
        "baseline": {"head_widths": (), **NO_SPARSITY, **NO_PRIORITY},
        "head balance": {**NO_SPARSITY, **NO_PRIORITY},
        "sparsity": {**NO_PRIORITY},
        "priority": {},
    },
    "5b": {
        "light heads": {"head_widths": ()},
        "heavy deep": {"head_widths": (0, 0, 48), "last_head_width": 96},
        "heavy everywhere": {"head_widths": (96, 48, 48), "last_head_width": 96},
    },
    "5d": {
        "shallow first": {"lambda_shallow": (1.0, 0.5), "lambda_deep": (0.1, 0.5)},
        "both": {"lambda_shallow": (1.0, 0.5), "lambda_deep": (1.0, 0.5)},
    },
    "5e": {f"dropout {rate}": {"dropout_shallow": rate} for rate in (0.0, 0.3, 0.7)},
}
# What might hold the early exits over a convolutional network back: heads too narrow for what stages early in it
# know, or the method's care for the deep exits: shallow ones start at a tenth of their weight, under dropout and masks.
TRIES = {
    "wide heads": {"head_widths": (256, 256, 256, 256)},
    "no priority and no sparsity": {**NO_SPARSITY, **NO_PRIORITY},
    "all of it": {"head_widths": (256, 256, 256, 256), **NO_SPARSITY, **NO_PRIORITY},
}
TRIED = "caltech101_dyn_lora"


def adapter(method: str, targets: list[str]) -> PeftConfig:
    return {
        "lora": lambda: LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=targets),
        "repadapter": lambda: RepAdapterConfig(target_modules=targets, r=8, scale=1.0),
        # As published they add to every layer's output from the start, which on this network took most of the accuracy.
        "bottleneck": lambda: BottleneckConfig(target_modules=targets, r=8, init="identity"),
    }[method]()


def adapted(task: Task, net: nn.Module, method: str, dynamic: Mapping[str, Any] | None, classes: int) -> nn.Module:
    """The network with adapters; with exits where ``dynamic``, fields of ``DynConfig``, is given."""
    config = adapter(method, task.targets[method])
    if dynamic is not None:
        return get_dyn_peft_model(net, config, DynConfig(num_classes=classes, label_smoothing=0.1, **dynamic))
    config.modules_to_save = [net.pretrained_cfg["classifier"]]
    return get_peft_model(net, config)


def train(
    task_name: str, method: str, dynamic: Mapping[str, Any] | None, place: Place, folder: Path, seed: int
) -> Result:
    """Adapt, going on from the last epoch that was kept; then test at every exit and at the budgets."""
    task = TASKS[task_name]
    settings = {**SETTINGS, **task.settings} | ({"epochs": 1, "warmup_epochs": 0} if place.small else {})
    data = open_splits(str(place.data / task.data), None, seed=0, calibration=0)
    training, samples = data.train, 128 if place.small else task.samples
    if samples:
        training, _ = training.split(samples / len(training), seed)
    calibration, training = training.split(CALIBRATION, seed)
    torch.manual_seed(seed)
    net = task.network(place, len(data.classes))
    model = adapted(task, net, method, dynamic, len(data.classes))
    options = SimpleNamespace(batch_size=settings["batch_size"], randaug=0, reprob=0, mixup=0, cutmix=0)
    cpu = torch.device("cpu")

    def batches(view: Any, name: str, **kwargs: Any) -> Batches:
        return Batches(load_split(view, task.size, cpu, name), net, options, **kwargs)

    seen = batches(training, "training", training=True)
    history = fit(model, seen, settings, folder, seed)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = finished(model, method)
    model = model if dynamic is not None else SingleExit(model)
    test = data.test.split(0.02, seed)[0] if place.small else data.test
    solved, tested = (collect_exits(model, batches(v, n)) for v, n in ((calibration, "calibration"), (test, "test")))
    costs = exit_costs(model, (3, task.size, task.size))
    points = []
    for share in SHARES if dynamic is not None else ():
        policy = solve_thresholds(solved, costs.macs, budget=max(share * costs.macs[-1], costs.macs[0]))
        result = evaluate_policy(policy, tested, costs.macs)
        points.append({"share": share, "accuracy": result.accuracy, "macs": result.cost})
    return {
        "settings": {
            **settings,
            "task": task_name,
            "method": method,
            "dynamic": dynamic if dynamic is None else dict(dynamic),
            "images": len(training),
        },
        "epochs": len(history),
        "seconds": sum(entry["seconds"] for entry in history),
        "cpu_seconds": sum(entry["cpu_seconds"] for entry in history),
        "loss": [entry["loss"] for entry in history],
        "test_images": len(tested),
        "trained_parameters": trained,
        "exits": [
            {"macs": float(m), "params": int(p), "accuracy": float(a)}
            for m, p, a in zip(costs.macs, costs.params, tested.correct.mean(1), strict=True)
        ],
        "budgets": points,
    }


def restore(model: nn.Module, checkpoint: Path) -> dict[str, Any]:
    """Put what was learnt back into the adapted model; what else the checkpoint holds."""
    kept: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(kept["model"][name])
    return kept


def load_adapted(
    task_name: str, method: str, dynamic: Mapping[str, Any] | None, place: Place, seed: int, classes: int
) -> nn.Module:
    """The network of a run whose training has ended, merged where its method can be."""
    variant = f"{task_name}_{method}" if dynamic is None else f"{task_name}_dyn_{method}"
    checkpoint = place.state / "adapters" / f"{variant}-s{seed}" / CHECKPOINT
    if not checkpoint.is_file():
        raise SystemExit(f"this needs a trained network: run adapters/{variant}-s{seed} first.")
    task = TASKS[task_name]
    model = adapted(task, task.network(place, classes), method, dynamic, classes)
    restore(model, checkpoint)
    return finished(model, method)


def fit(model: nn.Module, batches: Batches, settings: Mapping[str, Any], folder: Path, seed: int) -> list[dict]:
    """AdamW on the adapters and heads, cosine by epochs; a checkpoint after every epoch."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    scheduler = CosineLRScheduler(
        optimizer,
        settings["epochs"],
        lr_min=1e-5,
        warmup_t=settings["warmup_epochs"],
        warmup_lr_init=1e-5,
    )
    dynamic = hasattr(model, "set_progress")
    mask = model.attach_mask(optimizer) if dynamic else None
    history: list[dict] = []
    checkpoint = folder / CHECKPOINT
    if checkpoint.is_file():
        kept = restore(model, checkpoint)
        optimizer.load_state_dict(kept["optimizer"])
        history = kept["history"]
    for epoch in range(len(history), settings["epochs"]):
        scheduler.step(epoch)
        torch.manual_seed(seed * 100_003 + epoch)
        began, cpu_began, losses = time.perf_counter(), time.process_time(), []
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # the frozen network's statistics are part of its weights
        for step, (images, target) in enumerate(batches):
            outputs = model(images)
            if dynamic:
                if mask is not None:  # a run that goes on draws the masks it would have drawn
                    mask.step = epoch * len(batches) + step
                model.set_progress((epoch + step / len(batches)) / settings["epochs"])
                loss = model.loss(outputs, target)
            else:
                loss = nn.functional.cross_entropy(outputs, target, label_smoothing=settings["smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(
            {
                "loss": float(np.mean(losses)),
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu_began,
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(checkpoint, "wb") as file:
            kept = {"model": {name: p.detach() for name, p in learning.items()}, "optimizer": optimizer.state_dict()}
            torch.save({**kept, "history": history}, file)
        print(f"epoch {epoch + 1}/{settings['epochs']}: loss {history[-1]['loss']:.3f}", flush=True)
    return history


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = []
    gaps: dict[str, Difference] = {}
    rows = []
    for task in TASKS:
        for method in METHODS:
            plain, dyn = groups.get(f"{task}_{method}", []), groups.get(f"{task}_dyn_{method}", [])
            if not plain and not dyn:
                continue
            row = [task, method, *(last_exit(group) for group in (plain, dyn))]
            for index, share in enumerate(SHARES):
                row.append(percent(*mean_and_error([r["budgets"][index]["accuracy"] for r in dyn])) if dyn else "")
                at_share = [r | {"exits": [r["budgets"][index]]} for r in dyn]
                if share == SHARES[0] and (gap := paired(at_share, plain)):
                    gaps[f"{task} {method}"] = gap
            shares = [r["budgets"][0]["macs"] / r["exits"][-1]["macs"] for r in dyn]
            rows.append([*row, f"{100 * np.mean(shares):.0f}" if shares else "", len(plain or dyn)])
    header = ["", "method", "plain", "Dyn, last exit", *(f"Dyn, {100 * s:.0f} % of MACs" for s in SHARES)]
    text.append(table([*header, "MACs spent at the first (%)", "seeds"], rows))
    tables = {f"Table {name}": (name, labels, "vit_cifar10_dyn_repadapter") for name, labels in ABLATIONS.items()}
    tables["Further tries, caltech101 with LoRA"] = ("tried", TRIES, TRIED)
    for title, (name, variants, reference) in tables.items():
        found = {label: groups.get(ablation_name(name, label)) for label in variants}
        if not any(found.values()):
            continue
        found = {**found, "the method's own": groups.get(reference)}
        rows = [
            [
                label,
                *(percent(*mean_and_error(column)) for column in zip(*(accuracies(r) for r in group), strict=True)),
                *(percent(*mean_and_error([r["budgets"][i]["accuracy"] for r in group])) for i in range(len(SHARES))),
                len(group),
            ]
            for label, group in found.items()
            if group
        ]
        count = len(rows[0]) - 2 - len(SHARES)
        budgets = [f"at {100 * share:.0f} % of MACs" for share in SHARES]
        text.append(f"{title}:\n\n" + table(["", *(f"exit {i + 1}" for i in range(count)), *budgets, "seeds"], rows))
    if gaps:
        within = [gap for gap in gaps.values() if gap.above(-MARGIN)]
        beyond = [gap for gap in gaps.values() if gap.below(-MARGIN)]
        listed = "; ".join(f"{name} {gap}" for name, gap in gaps.items())
        state = True if len(within) == len(gaps) else False if len(beyond) == len(gaps) else None
        text.append(
            verdict(
                state if len(gaps) > 1 else None,
                f"At half of the MACs the dynamic form is within a point of the plain one in {len(within)} of the "
                f"{len(gaps)} pairs that have run, and further below in {len(beyond)} ({listed}).",
            )
        )
    return "\n".join(text)


def last_exit(group: list[Result]) -> str:
    return percent(*mean_and_error([result["exits"][-1]["accuracy"] for result in group])) if group else ""


def accuracies(result: Result) -> list[float]:
    return [e["accuracy"] for e in result["exits"]]


def ablation_name(name: str, label: str) -> str:
    return f"{name}_{label.replace(' ', '_')}"


def variants() -> dict[str, Callable[[Place, Path, int], Result]]:
    found: dict[str, Callable[[Place, Path, int], Result]] = {}
    for task in TASKS:
        for method in METHODS:
            found[f"{task}_dyn_{method}"] = partial(train, task, method, {})
            found[f"{task}_{method}"] = partial(train, task, method, None)
    for name, rows in ABLATIONS.items():
        for label, changed in rows.items():
            if changed:
                found[ablation_name(name, label)] = partial(train, "vit_cifar10", "repadapter", changed)
    for label, changed in TRIES.items():
        found[ablation_name("tried", label)] = partial(train, "caltech101", "lora", changed)
    return found


EXPERIMENT = Experiment(
    name="adapters",
    title="Dyn-Adapter: adapters with exits",
    claim="Dyn-Adapter keeps its adapters' accuracy at 50 to 70 % of the MACs (Dyn-Adapter, tables 1 to 3 and 5).",
    paper="On VTAB-1k over ViT-B/16 from ImageNet-21k Dyn-Adapter, Dyn-LoRA and Dyn-RepAdapter keep their adapters' "
    "73.9, 74.5 and 76.1 % at half of the MACs, and are 0.3 to 0.5 points above them at 70 %.",
    setup="EfficientNet-Lite0 from ImageNet, frozen, adapters on its 1 x 1 convolutions, on Caltech-101 (as in the "
    "first section, 128 pixels) and on 1,000 images of CIFAR-10 (96 pixels); and the small transformer of the section "
    f"before on these. A fifth of the training images solves thresholds. {SETTINGS['epochs']} epochs, AdamW. Table 5 "
    "is over the transformer with RepAdapter; further tries over Caltech-101 with LoRA, one seed.",
    outlook="A deep transformer from large data: its middle blocks know the classes, which a convolutional network's "
    "stages at half of the MACs do not, trained whole or not (first section, exits 2 and 3).",
    runs=[
        Run(variant, seed, run)
        for seed in range(3)
        for variant, run in variants().items()
        if not seed or not variant.startswith("tried_")
    ],
    section=section,
)
