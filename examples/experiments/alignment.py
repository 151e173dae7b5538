"""Dyn-Adapter, fig. 4: how soon a network's layers resemble the labels, with exits trained in different ways.

Nothing is trained here: EfficientNet-Lite0 as it came from ImageNet, with Dyn-LoRA over it (``adapters``), and trained
whole (``lite0``) plain, with exits and with the latents of Dyn-Perceiver. Of every stage, shallow to deep: linear
centred kernel alignment of its mean over positions with the labels, on test images of Caltech-101.
"""

from collections.abc import Callable
from pathlib import Path

import lite0
import numpy as np
import torch
from adapters import TASKS, load_adapted
from base import Experiment, Place, Result, Run, table, test_batches, verdict
from cka import layer_features
from torch import nn

from exit_plugins.exits import plots
from exit_plugins.exits.similarity import cka
from exit_plugins.timm.data import open_splits

TASK = TASKS["caltech101"]
ALONE = "from ImageNet, not adapted"
ADAPTED = {  # method of ``adapters`` -> its row
    "lora": "Dyn-LoRA, backbone frozen",
    "repadapter": "Dyn-RepAdapter, backbone frozen",
    "bottleneck": "Dyn-Adapter (bottleneck), backbone frozen",
}
TRAINED = {  # networks of lite0 that see images of the same size
    f"plain_{TASK.size}": "trained whole, no exits",
    f"exits_{TASK.size}": "trained whole with exits",
    f"dynperceiver_{TASK.size}": "trained whole with latents",
}


def networks(place: Place, seed: int) -> dict[str, Callable[[], nn.Module]]:
    """What builds each timm network, without the exits over it."""
    classes = len(open_splits(str(place.data / TASK.data), None, seed=0, calibration=0).classes)
    return {
        ALONE: lambda: TASK.network(place, classes),
        **{
            name: lambda method=method: load_adapted("caltech101", method, {}, place, seed, classes).backbone
            for method, name in ADAPTED.items()
        },
        **{
            name: lambda variant=variant: lite0.FIELD.trained(place, variant, seed).backbone
            for variant, name in TRAINED.items()
        },
    }


@torch.inference_mode()
def measure(place: Place, folder: Path, seed: int) -> Result:
    rows = {}
    for name, build in networks(place, seed).items():
        net = build().eval()
        features, labels = [], []
        for images, target in test_batches(place, TASK.data, net, TASK.size):
            features.append(layer_features(net, images))
            labels.append(target)
            if place.small:
                break
        layers = [torch.cat(parts) for parts in zip(*features, strict=True)]
        rows[name] = [cka(layer, torch.cat(labels)) for layer in layers]
    return {
        "settings": {"data": TASK.data, "size": TASK.size, "methods": list(ADAPTED)},
        "test_images": len(torch.cat(labels)),
        "rows": rows,
    }


def section(results: list[Result], pictures: Path) -> str:
    rows = {name: np.mean([result["rows"][name] for result in results], axis=0).tolist() for name in results[0]["rows"]}
    pictures.mkdir(parents=True, exist_ok=True)
    plots.save(plots.cka_with_labels(rows), pictures / "cka.png")
    stages = len(rows[ALONE])
    text = [
        table(
            ["CKA with the labels", *(f"stage {i + 1}" for i in range(stages))],
            [[name, *(f"{value:.3f}" for value in values)] for name, values in rows.items()],
        ),
        "![CKA of every stage with the labels](results/alignment/cka.png)\n",
    ]
    # The stage in the middle: the deepest that early exits of all networks stand behind.
    middle = stages // 2
    frozen = {name.split(",")[0]: rows[name][middle] for name in ADAPTED.values()}
    others = {name: rows[name][middle] for variant, name in TRAINED.items() if not variant.startswith("plain")}
    apart, together = max(frozen.values()) < min(others.values()), min(frozen.values()) > max(others.values())
    found = ", ".join(f"{value:.3f} {name}" for name, value in (frozen | others).items())
    text.append(
        verdict(
            True if apart else False if together else None,
            f"Behind stage {middle + 1} of {stages}, not adapted: {rows[ALONE][middle]:.3f}; {found}.",
        )
    )
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="alignment",
    title="Dyn-Adapter: how soon layers resemble the labels",
    claim="Over a frozen backbone shallow layers stay unlike the labels; exits trained along with their backbone pull "
    "them there (Dyn-Adapter, fig. 4).",
    paper="Over ViT-B/16 (values scaled to [0, 1], no figures printed) Dyn-Adapter's shallow layers stay unlike the "
    "labels and Dyn-Perceiver's do not.",
    setup=f"Linear CKA with the labels of every stage's mean over positions, on the test images of Caltech-101 at "
    f"{TASK.size} pixels: EfficientNet-Lite0 from ImageNet, with each adapter's dynamic form over it, and trained "
    "whole plain, with exits and with latents; nothing is trained for it, one seed.",
    outlook="A transformer, where adapters change tokens and not maps; more seeds.",
    runs=[Run("caltech101", 0, measure)],
    section=section,
    version=3,  # all adapters, each from the network as it is
)
