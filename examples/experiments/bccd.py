"""Dyn-Perceiver, section 4.4: its feature branch as a detector's backbone, against the plain network it is built on."""

import os
import statistics
import time
from pathlib import Path
from typing import Any

from base import ROOT, Experiment, Place, Result, Run, by_variant, mean_and_error, percent, table, verdict
from judging import Difference, of_seeds

CONFIGS = {
    "plain": "retinanet_tf_efficientnet_lite0_fpn_bccd.py",
    "dynperceiver": "retinanet_dynperceiver_tf_efficientnet_lite0_fpn_bccd.py",
}
NAMES = {"plain": "EfficientNet-Lite0", "dynperceiver": "Dyn-Perceiver over EfficientNet-Lite0"}
CLASSES = ("RBC", "WBC", "Platelets")
METRICS = {"mean": "bbox_mAP", "mean_50": "bbox_mAP_50", **{name: f"{name}_precision" for name in CLASSES}}
SMALL = 8  # pictures


def settings(variant: str, place: Place, output: Path, seed: int) -> Any:
    """The config of ``variant`` as this run trains it: the last weights count, every epoch can be resumed from."""
    from mmengine.config import Config

    os.environ["BCCD_ROOT"] = str(place.data / "bccd")
    config = Config.fromfile(ROOT / "mm_configs" / "bccd" / CONFIGS[variant])
    config.merge_from_dict(
        {
            "work_dir": str(output),
            "resume": True,
            "randomness": dict(seed=seed),
            "train_cfg.val_interval": 1000,
            "default_hooks.checkpoint.interval": 1,
            "default_hooks.checkpoint.max_keep_ckpts": 1,
            "default_hooks.checkpoint.save_best": None,
            "test_evaluator.classwise": True,
            "visualizer.vis_backends": [dict(type="LocalVisBackend")],
        }
    )
    if place.small:
        config.train_cfg.max_epochs = 1
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            loader.dataset.indices = SMALL
    return config


def train(variant: str, place: Place, output: Path, seed: int) -> Result:
    """Train and test one detector by MMDetection's runner."""
    import torch
    from mmdet.utils import register_all_modules
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from torch.utils.flop_counter import FlopCounterMode

    class Account(Hook):
        """Seconds, processor seconds and mean loss of every epoch, kept in the checkpoint."""

        def before_train_epoch(self, runner: Runner) -> None:
            self.start, self.losses = (time.perf_counter(), time.process_time()), []

        def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            self.losses.append(outputs["loss"].item())

        def after_train_epoch(self, runner: Runner) -> None:
            spent = [time.perf_counter() - self.start[0], time.process_time() - self.start[1]]
            history = runner.message_hub.runtime_info.get("account", [])
            runner.message_hub.update_info("account", [*history, [*spent, statistics.fmean(self.losses)]])

    register_all_modules(init_default_scope=True)
    config = settings(variant, place, output, seed)
    runner = Runner.from_cfg(config)
    runner.register_hook(Account(), priority="NORMAL")
    model = runner.train()
    metrics = runner.test()
    seconds, cpu_seconds, loss = zip(*runner.message_hub.get_info("account"), strict=True)

    width, height = config.image_scale
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.backbone.eval().requires_grad_(False)(torch.zeros(1, 3, height, width))
    return {
        "settings": {"config": CONFIGS[variant], "epochs": config.train_cfg.max_epochs, "image_scale": [width, height]},
        "epochs": len(loss),
        "seconds": sum(seconds),
        "cpu_seconds": sum(cpu_seconds),
        "loss": list(loss),
        "test_images": len(runner.test_dataloader.dataset),
        "backbone_macs": counter.get_total_flops() / 2,
        "backbone_params": sum(p.numel() for p in model.backbone.parameters()),
        # A detector that finds nothing at all gets no metrics.
        "ap": {name: float(metrics.get(f"coco/{key}", 0.0)) for name, key in METRICS.items()},
    }


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    rows = [
        [
            NAMES[variant],
            *(percent(*mean_and_error([result["ap"][column] for result in group])) for column in METRICS),
            f"{group[0]['backbone_macs'] / 1e9:.2f}",
            len(group),
        ]
        for variant, group in groups.items()
    ]
    text = table(["backbone", "AP", "AP at IoU 0.5", *CLASSES, "MACs of the backbone (G)", "seeds"], rows)
    pairs = of_seeds(groups.get("dynperceiver", []), groups.get("plain", []))
    if not pairs:
        return text
    gain = Difference([ours["ap"]["mean"] - plain["ap"]["mean"] for ours, plain in pairs])
    sentence = f"Dyn-Perceiver gains {gain} points of AP over the network it is built on."
    return text + "\n" + verdict(True if gain.above() else False if gain.below() else None, sentence)


EXPERIMENT = Experiment(
    name="bccd",
    title="Dyn-Perceiver: a backbone for detection",
    claim="Informed by the latents, the feature branch is a better backbone for detection than the plain network "
    "(Dyn-Perceiver, table 4).",
    paper="RetinaNet on COCO: 40.2 mAP over RegNetY-1.6GF with latents, 38.5 without, both from ImageNet weights.",
    setup="RetinaNet with an FPN on BCCD (205 microscope pictures to train on, 72 to test; red and white cells, "
    "platelets) over EfficientNet-Lite0 from ImageNet weights, 24 epochs of one schedule; the latents' part, 64 of "
    "them, starts from random weights, where the paper's comes from ImageNet too.",
    outlook="Latents that are trained on ImageNet beforehand, and a data set that is large enough to train them on.",
    runs=[
        Run(variant, seed, lambda place, output, seed, variant=variant: train(variant, place, output, seed))
        for seed in range(3)
        for variant in CONFIGS
    ],
    section=section,
)
