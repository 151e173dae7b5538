"""CHASE against MSDNet on CIFAR-100, and a policy certified on each (CHASE, fig. 4 and fig. 5)."""

from pathlib import Path

from base import (
    Experiment,
    Result,
    Run,
    Training,
    budgets,
    by_variant,
    certified,
    draw_budgets,
    exits_table,
)

# One cycle over all 50,000 images with crops and mirrors: the family's usual training at a fifteenth of its length.
OPTIONS = {
    "exit-loss": "chase",
    "epochs": 20,
    "batch-size": 128,
    "opt": "sgd",
    "lr": 0.1,
    "weight-decay": 5e-4,
    "warmup-epochs": 3,
    "mixup": 0,
    "cutmix": 0,
    "smoothing": 0,
    "randaug": 0,
    "reprob": 0,
    "ema-decay": 0,
    "compile": True,
}
ANALYSES = {"budgeted": budgets(), "certified": certified()}


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results)]
    draw_budgets(groups, pictures / "budgeted.png")
    text.append("![Accuracy over mean MACs](results/multiscale/budgeted.png)\n")
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="multiscale",
    title="MSDNet and CHASE on CIFAR-100",
    claim="CHASE is above MSDNet at the same MACs (CHASE, fig. 4).",
    runs=[Run("msdnet_cifar_batch", 0, Training("msdnet_cifar_batch", OPTIONS, analyses=ANALYSES))],
    section=section,
)
