"""The small vision transformer that ``adapters`` adapts: twelve blocks, trained on CIFAR-100 from nothing.

Once: a seed of ``adapters`` draws the images, the adapters and the heads, over one and the same frozen backbone.
"""

from pathlib import Path

from base import Experiment, Result, Run, Training, exits_table

OPTIONS = {
    "epochs": 20,
    "batch-size": 128,
    "opt": "adamw",
    "lr": 1e-3,
    "weight-decay": 0.05,
    "warmup-epochs": 2,
    "mixup": 0.2,
    "cutmix": 0.5,
    "smoothing": 0.1,
    "randaug": 0,
    "reprob": 0,
    "ema-decay": 0,
    "clip-grad": 1.0,
    "input-size": 32,
}
NETWORK = {"backbone": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "embed_dim": 96, "exits": 1}


def section(results: list[Result], pictures: Path) -> str:
    return exits_table(results) + "\nA backbone for the next section; its accuracy on CIFAR-100 is no claim.\n"


EXPERIMENT = Experiment(
    name="vit",
    title="A small vision transformer to adapt",
    claim="None: it is trained here since no pretrained transformer installs with a package.",
    paper="Adapts ViT-B/16 from ImageNet-21k.",
    setup=f"Twelve blocks of width {NETWORK['embed_dim']} on patches of {NETWORK['patch_size']} pixels, from random "
    f"weights, all 50,000 images of CIFAR-100, {OPTIONS['epochs']} epochs, AdamW, mixup and cutmix.",
    outlook="Nothing: it is a backbone.",
    runs=[Run("plain", 0, Training("with_exits", OPTIONS, NETWORK))],
    section=section,
)
