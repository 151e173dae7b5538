"""Exits on an ImageNet-pretrained EfficientNet-Lite0, against the plain network at other sizes of input: photographs.

A photograph of Caltech-101 is wanted fast. The strongest static answer is the same network on a smaller image; the
dynamic ones are exits by ``add_exits`` and the latents of Dyn-Perceiver over the same weights. All start from the same
ImageNet weights and train by one recipe.
"""

from pathlib import Path

import numpy as np
from base import (
    CROPS_AND_MIRRORS,
    Experiment,
    Result,
    Run,
    Training,
    budgets,
    by_variant,
    draw_budgets,
    exits_table,
    percent,
    verdict,
)

NETWORK = "tf_efficientnet_lite0"
OPTIONS = {
    **CROPS_AND_MIRRORS,
    "epochs": 30,
    "batch-size": 32,
    "opt": "adamw",
    "lr": 1e-3,
    "layer-decay": 0.8,  # the nearer to the image, the less there is to learn anew
    "weight-decay": 0.05,
    "warmup-epochs": 3,
    "smoothing": 0.1,
}
SIZES = (160, 96, 64, 128, 224)


def training(model: str, size: int, kwargs: dict) -> Training:
    return Training(
        model,
        {**OPTIONS, "input-size": size},
        {"backbone": NETWORK, **kwargs},
        data="caltech101",
        pretrained=NETWORK,
        analyses={"budgeted": budgets()} if kwargs.get("exits") != 1 else {},
    )


VARIANTS = {
    "exits": training("with_exits", 160, {"exits": 4}),
    **{f"plain_{size}": training("with_exits", size, {"exits": 1}) for size in SIZES},
}


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results)]
    dynamic = {name: group for name, group in groups.items() if "budgeted" in group[0]}
    static = sorted(
        (group[0]["exits"][-1]["macs"], group[0]["exits"][-1]["accuracy"])
        for name, group in groups.items()
        if name not in dynamic
    )
    if dynamic:
        draw_budgets(dynamic, pictures / "budgeted.png", static=static)
        text.append("![Accuracy over mean MACs; squares: the plain network](results/lite0/budgeted.png)\n")
    if dynamic and len(static) > 2:
        low, high = static[0][0], static[-1][0]
        middle = np.linspace(low + (high - low) / 4, high - (high - low) / 4, 5)
        rival = np.interp(middle, *np.array(static).T)
        best = {}
        for name, group in dynamic.items():
            curve = np.array(sorted((point["cost"], point["accuracy"]) for point in group[0]["budgeted"])).T
            best[name] = np.interp(middle, *curve) - rival
        name, gains = max(best.items(), key=lambda item: item[1].min())
        text.append(
            verdict(
                True if gains.min() > 0 else False if gains.max() < 0 else None,
                f"In the middle half of the range of MACs `{name}` is between {percent(gains.min(), sign=True)} and "
                f"{percent(gains.max(), sign=True)} points from the plain network at other sizes.",
            )
        )
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="lite0",
    title="A pretrained network with exits, against itself on smaller images",
    claim="Early exits give more accuracy at the same cost than one network run on smaller images.",
    runs=[Run(variant, seed, run) for seed in range(3) for variant, run in VARIANTS.items()],
    section=section,
)
