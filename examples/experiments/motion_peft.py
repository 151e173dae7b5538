"""Dyn-RepAdapter on clips, against the plain RepAdapter (Dyn-Adapter, table 7), on the generated motion of motion.py.

Two backbones, since the paper does not say how its backbone sees clips: a small VideoMAE, whose tokens hold a patch of
two frames and see the whole clip, and a small timm ViT that sees frames as images and answers with the mean over them.
Nothing is downloaded. The VideoMAE is pretrained here as a masked autoencoder on clips without labels, the ViT as a
classifier of single digits, once for all runs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from adapters import NO_PRIORITY, NO_SPARSITY
from base import Experiment, Place, Result, Run, by_variant, mean_and_error, percent, table, verdict
from judging import Difference, paired
from motion import clips, fit
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from exit_plugins import DynConfig, ExitTable, RepAdapterConfig, collect_exits, exit_costs, get_dyn_peft_model
from exit_plugins.exits.clips import over_clips
from exit_plugins.exits.evaluation import budgeted_curve
from exit_plugins.exits.files import atomic_write
from exit_plugins.timm.data import open_dataset
from exit_plugins.timm.motion import CLASSES

SHARE = 0.7  # of the plain adapter's MACs that the dynamic one may spend
MARGIN = 0.01  # of accuracy, within which both count as equal
RESPLITS = 5
SETTINGS = {
    "train_clips": 2000,
    "test_clips": 1000,
    "num_frames": 8,
    "size": 32,
    "patch_size": 8,
    "width": 96,
    "depth": 4,
    "heads": 4,
    "r": 8,
    "groups": 2,
    "scale": 1.0,
    "exit_interval": 1,
    "epochs": 10,
    "batch_size": 32,
    "opt": "adamw",
    "lr": 2e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 1,
    "clip_grad": 1.0,
}
PRETRAINING = {"samples": 4000, "masked": 0.75, "epochs": 15, "lr": 1e-3, "weight_decay": 0.05}
# What might hold the exits back: too short a training, or the care that the method takes of the deep ones.
TRIES = {
    "long": ("both trained three times as long", {"epochs": 30, "warmup_epochs": 3}, {}),
    "even": ("no priority and no sparsity", {}, NO_PRIORITY | NO_SPARSITY),
}
SMALL = {"train_clips": 64, "test_clips": 64, "epochs": 2, "batch_size": 16}


# ---------------------------------------------------------------------------------------------------------------------
# Backbones, and where their weights come from
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a backbone sees clips.

    Attributes:
        make: the classifier with random weights, from the settings and the number of classes.
        pretrain: the weights to start from, from settings, those of pretraining, and the folder of its checkpoint.
        targets: what RepAdapter stands in front of.
        consensus: frames are images, and their logits are averaged.
    """

    make: Callable[[dict[str, Any], int], nn.Module]
    pretrain: Callable[[dict[str, Any], dict[str, Any], Path], dict[str, Tensor]]
    targets: list[str]
    consensus: bool


def videomae_config(settings: dict[str, Any], num_classes: int) -> VideoMAEConfig:
    return VideoMAEConfig(
        image_size=settings["size"],
        patch_size=settings["patch_size"],
        num_frames=settings["num_frames"],
        tubelet_size=2,
        hidden_size=settings["width"],
        intermediate_size=4 * settings["width"],
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["heads"],
        decoder_hidden_size=64,
        decoder_intermediate_size=256,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        num_labels=num_classes,
    )


def pretrain_videomae(settings: dict[str, Any], pretraining: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Masked autoencoding of clips whose labels are not looked at; the same patches are masked in all frames."""
    model = VideoMAEForPreTraining(videomae_config(settings, len(CLASSES)))
    patches = (settings["size"] // settings["patch_size"]) ** 2
    hidden = round(pretraining["masked"] * patches)

    def loss_of(x: Tensor, target: Tensor, step: int, steps: int) -> Tensor:
        masked = torch.rand(len(x), patches).argsort(1) < hidden
        return model(x, bool_masked_pos=masked.repeat(1, settings["num_frames"] // 2)).loss

    data = clips("pretrain", pretraining["samples"], settings["num_frames"], settings["size"])
    fit(model, loss_of, data, settings | pretraining, folder, seed=0)
    # What the classifier takes over: the encoder. Its norm behind the tokens' mean begins anew.
    return {key: value for key, value in model.state_dict().items() if key.startswith("videomae.")}


def vit(settings: dict[str, Any], num_classes: int) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=num_classes,
        img_size=settings["size"],
        patch_size=settings["patch_size"],
        embed_dim=settings["width"],
        depth=settings["depth"],
        num_heads=settings["heads"],
    )


def pretrain_vit(settings: dict[str, Any], pretraining: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Which digit it is, of single pictures that are shifted, turned and made smaller."""
    digits = open_dataset("digits", "train")
    size = settings["size"]
    prepare = v2.Compose([v2.ToImage(), v2.RGB(), v2.Resize(size), v2.ToDtype(torch.float32, scale=True)])
    digits = [digits[i] for i in range(min(len(digits), pretraining["samples"]))]
    pictures = torch.stack([prepare(image) for image, _ in digits])
    target = torch.tensor([label for _, label in digits])
    move = v2.RandomAffine(45, translate=(0.15, 0.15), scale=(0.4, 0.7))
    normalize = v2.Normalize((0.5,) * 3, (0.5,) * 3)
    model = vit(settings, 10)

    def loss_of(x: Tensor, target: Tensor, step: int, steps: int) -> Tensor:
        x = torch.stack([normalize(move(picture)) for picture in x])
        return nn.functional.cross_entropy(model(x), target)

    fit(model, loss_of, (pictures, target), settings | pretraining, folder, seed=0)
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


FORMS = {
    "tokens": Form(
        make=lambda settings, classes: VideoMAEForVideoClassification(videomae_config(settings, classes)),
        pretrain=pretrain_videomae,
        targets=["query", "key", "value", "intermediate.dense"],
        consensus=False,
    ),
    "frames": Form(make=vit, pretrain=pretrain_vit, targets=["qkv", "fc1"], consensus=True),
}


def pretrained(form: str, settings: dict[str, Any], place: Place) -> dict[str, Tensor]:
    """Weights of a backbone, pretrained if there are none yet."""
    folder = place.state / "motion_peft" / f"pretrain-{form}"
    path = folder / "weights.pt"
    if not path.is_file():
        pretraining = PRETRAINING | ({"samples": 64, "epochs": 2} if place.small else {})
        torch.manual_seed(0)
        weights = FORMS[form].pretrain(settings, pretraining, folder)
        with atomic_write(path, "wb") as file:
            torch.save(weights, file)
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def train(method: str, form: str, place: Place, folder: Path, seed: int, tried: str | None = None) -> Result:
    """Adapt a pretrained backbone, going on from the last epoch that was finished; ``tried``: one of ``TRIES``."""
    _, changed, dynamic = TRIES[tried] if tried else ("", {}, {})
    settings = SETTINGS | changed | (SMALL if place.small else {})
    shape = settings["num_frames"], settings["size"]
    weights = pretrained(form, settings, place)
    torch.manual_seed(seed)
    backbone = FORMS[form].make(settings, len(CLASSES))
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    if unexpected or any(not key.startswith(("classifier.", "fc_norm.", "head.")) for key in missing):
        raise RuntimeError(f"the pretrained weights do not fit: missing {missing}, unexpected {unexpected}.")
    adapter = RepAdapterConfig(
        target_modules=FORMS[form].targets, r=settings["r"], groups=settings["groups"], scale=settings["scale"]
    )
    frames = settings["num_frames"] if FORMS[form].consensus else None
    data = clips("train", settings["train_clips"], *shape)
    if method == "dyn":
        model = get_dyn_peft_model(
            backbone, adapter, DynConfig(settings["exit_interval"], **dynamic), num_frames=frames
        )
        mask = []

        def loss_of(x: Tensor, target: Tensor, step: int, steps: int) -> Tensor:
            model.set_progress(step / steps)
            if mask[0] is not None:
                mask[0].step = step
            return model.loss(model(x), target)

        history = fit(
            model, loss_of, data, settings, folder, seed, on_optimizer=lambda o: mask.append(model.attach_mask(o))
        )
    else:
        adapter.modules_to_save = ["head" if FORMS[form].consensus else "classifier"]
        model = get_peft_model(over_clips(backbone, frames) if frames else backbone, adapter)
        history = fit(
            model,
            lambda x, target, step, steps: nn.functional.cross_entropy(logits_of(model, x), target),
            data,
            settings,
            folder,
            seed,
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = model.eval().merge_and_unload()  # adapters cost nothing any more
    tested = clips("test", settings["test_clips"], *shape)
    measured = measure_exits(model, tested) if method == "dyn" else measure_plain(model, tested)
    return {
        "settings": settings | {"method": method, "form": form, "tried": tried, "pretraining": PRETRAINING},
        "epochs": len(history),
        "seconds": sum(entry["seconds"] for entry in history),
        "cpu_seconds": sum(entry["cpu_seconds"] for entry in history),
        "loss": [entry["loss"] for entry in history],
        "trainable": trainable,
        **measured,
    }


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def measure_plain(model: nn.Module, tested: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Accuracy and MACs of a network without exits."""
    x, target = tested
    answers = torch.cat([logits_of(model, batch).argmax(1) for batch in x.split(100)])
    with FlopCounterMode(display=False) as counter:  # as exit_costs does, on the meta device
        copy.deepcopy(model).to("meta")(torch.empty(1, *x.shape[1:], device="meta"))
    return {"exits": [{"macs": counter.get_total_flops() / 2, "accuracy": float((answers == target).float().mean())}]}


def measure_exits(model: nn.Module, tested: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Accuracy and MACs of every exit, and what policies reach on clips that they were not solved on."""
    loader = DataLoader(TensorDataset(*tested), batch_size=100)
    answers: ExitTable = collect_exits(model, loader, progress=False)
    macs = exit_costs(model, tuple(tested[0].shape[1:])).macs
    heads = sum(p.numel() for p in model.early_heads.parameters() if p.ndim == 2)  # what the plain network has not
    frames = tested[0].shape[1] if getattr(model, "num_frames", None) else 1
    plain = macs[-1] - frames * heads
    shares = (0.6, SHARE, 0.8, 0.9)
    curves = [
        budgeted_curve(*answers.split(0.5, seed), macs, [share * plain for share in shares]) for seed in range(RESPLITS)
    ]
    budgets = [
        {
            "share": share,
            "cost": float(np.mean([point.cost for point in points])) / plain,
            "accuracy": float(np.mean([point.accuracy for point in points])),
        }
        for share, points in zip(shares, zip(*curves, strict=True), strict=True)
    ]
    exits = [{"macs": float(m), "accuracy": float(a)} for m, a in zip(macs, answers.correct.mean(1), strict=True)]
    return {"exits": exits, "plain_macs": float(plain), "budgets": budgets}


# ---------------------------------------------------------------------------------------------------------------------
# What is said of them
# ---------------------------------------------------------------------------------------------------------------------

NAMES = {"tokens": "joint tokens (VideoMAE)", "frames": "frames, mean of logits (ViT)"}


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    rows, differences = [], {}
    for form, name in NAMES.items():
        plain, dyn = groups.get(f"plain-{form}", []), groups.get(f"dyn-{form}", [])
        if plain:
            accuracy = mean_and_error([result["exits"][-1]["accuracy"] for result in plain])
            macs = plain[0]["exits"][-1]["macs"] / 1e6
            rows.append([name, "RepAdapter", f"{macs:.1f}", percent(*accuracy), len(plain)])
        if dyn:
            accuracy = mean_and_error([result["exits"][-1]["accuracy"] for result in dyn])
            macs = dyn[0]["exits"][-1]["macs"] / 1e6
            rows.append([name, "Dyn-RepAdapter, last exit", f"{macs:.1f}", percent(*accuracy), len(dyn)])
            points = [at_budget(result) for result in dyn]
            macs = np.mean([r["cost"] * result["plain_macs"] for r, result in zip(points, dyn, strict=True)]) / 1e6
            accuracy = mean_and_error([r["accuracy"] for r in points])
            label = f"Dyn-RepAdapter, budget {SHARE:.0%} of the MACs".replace("%", " %")
            rows.append([name, label, f"{macs:.1f}", percent(*accuracy), len(dyn)])
        differences[form] = at_share(dyn, plain)
    tried = {
        said: at_share(groups.get(f"dyn-tokens-{name}", []), groups.get(plain_of(name), []))
        for name, (said, _, _) in TRIES.items()
    }
    text = [table(["backbone", "adapter", "mean MACs (M)", "accuracy", "seeds"], rows)]
    text.append(
        "Thresholds are solved on one half of the test clips and scored on the other, over five random halvings; MACs "
        "are those of the merged networks. By the mean over frames a pair of opposite motions cannot be told apart, so "
        "that 50 % is all that the second backbone can reach.\n"
    )
    state, said = None, []
    for form, found in ((f, d) for f, d in differences.items() if d):
        said.append(f"{NAMES[form]} {found}")
    if tokens := differences.get("tokens"):
        open_ = [found for found in tried.values() if found and not found.below(-MARGIN)]
        kept = [found for found in (tokens, *tried.values()) if found and found.above(-MARGIN)]
        state = True if kept else False if tokens.below(-MARGIN) and not open_ else None
    sentence = (
        f"At no more than {100 * SHARE:.0f} % of the MACs Dyn-RepAdapter is within a point of RepAdapter or above it; "
        f"points of difference, paired by seed: {'; '.join(said) or 'none yet'}."
    )
    further = [f"{name} {found}" for name, found in tried.items() if found]
    if further:
        sentence += f" Further tries on joint tokens, of which one is enough: {'; '.join(further)}."
    text.append(verdict(state, sentence))
    return "\n".join(text)


def at_share(dyn: list[Result], plain: list[Result]) -> Difference | None:
    """The dynamic form at ``SHARE`` of the MACs, less the plain one."""
    return paired([result | {"exits": [at_budget(result)]} for result in dyn], plain)


def plain_of(tried: str) -> str:
    """The plain adapter that a try is held against: of the same length."""
    return "plain-tokens-long" if tried == "long" else "plain-tokens"


def at_budget(result: Result) -> dict[str, float]:
    return next(point for point in result["budgets"] if point["share"] == SHARE)


EXPERIMENT = Experiment(
    name="motion_peft",
    title="Dyn-RepAdapter on generated motion",
    claim="Dyn-RepAdapter keeps RepAdapter's accuracy on clips at 73 % of its FLOPs (Dyn-Adapter, table 7).",
    paper="On Something-Something V2, over a ViT-B: 55.43 % at 40.05G against RepAdapter's 55.26 % at 54.92G.",
    setup="A VideoMAE of four blocks, pretrained here without labels, and a ViT of four blocks that averages the "
    f"logits of frames, pretrained here on single digits; both frozen, adapted on {SETTINGS['train_clips']:,} clips of "
    f"the section before, {SETTINGS['epochs']} epochs, an exit behind every block. Of the longer training two more "
    "seeds ran after three had left it open.",
    outlook="A deeper backbone: with four blocks the first exits stand behind a quarter and a half of it.",
    runs=[
        Run(f"{method}-{form}", seed, partial(train, method, form))
        for form in FORMS
        for seed in range(3)
        for method in ("plain", "dyn")
    ]
    + [
        Run(variant, seed, partial(train, variant.split("-")[0], "tokens", tried=tried))
        for seed in range(5)  # two more than the rest: three left it open by little
        for tried in TRIES
        if seed < 3 or tried == "long"
        for variant in dict.fromkeys((f"dyn-tokens-{tried}", plain_of(tried)))
        if variant.endswith(tried)
    ],
    section=section,
)
