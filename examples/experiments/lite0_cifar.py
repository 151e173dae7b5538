"""The same field as ``lite0`` on CIFAR-100 whole, its images of 32 pixels enlarged to at most 96. One seed."""

from lite0 import Field

FIELD = Field(
    "lite0_cifar",
    data="cifar100",
    about="CIFAR-100 (50,000 images to train on, 10,000 to test, of 32 x 32 pixels: all sizes enlarge them)",
    options={"epochs": 8, "warmup-epochs": 1, "batch-size": 64, "lr": 1e-3},
    size=96,
    sizes=(64, 48, 80, 32),
    exit_sizes=(64, 48),
    cascades=((48, 96), (64, 96), (48, 64, 96)),
    cuts=("blocks.4", "blocks.3"),
)
EXPERIMENT = FIELD.experiment("A pretrained network with exits, against every static one: CIFAR-100")
