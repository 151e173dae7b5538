"""CHASE against MSDNet on CIFAR-100 (CHASE, fig. 4), and policies certified on each. One seed."""

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
    certificates,
    certified,
    draw_budgets,
    exits_table,
    percent,
    verdict,
)

# One cycle over all 50,000 images with crops and mirrors: the family's usual training at a fifteenth of its length.
OPTIONS = {
    **CROPS_AND_MIRRORS,
    "exit-loss": "chase",
    "epochs": 20,
    "batch-size": 128,
    "opt": "sgd",
    "lr": 0.1,
    "weight-decay": 5e-4,
    "warmup-epochs": 3,
    "compile": True,
}
ANALYSES = {"budgeted": budgets(), "certified": certified()}


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results)]
    draw_budgets(groups, pictures / "budgeted.png")
    text.append("![Accuracy over mean MACs; stars: one exit for all](results/chase/budgeted.png)\n")
    text.append(certificates(groups))
    if {"chase_cifar", "msdnet_cifar_anytime"} <= groups.keys():
        chase, msdnet = (groups[name][0]["budgeted"] for name in ("chase_cifar", "msdnet_cifar_anytime"))
        gains = upper_half_gains(chase, msdnet)
        text.append(
            verdict(
                True if min(gains) > 0 else False if max(gains) < 0 else None,
                f"From half of the range on, CHASE is between {percent(min(gains), sign=True)} and "
                f"{percent(max(gains), sign=True)} points from the MSDNet of nearest MACs.",
            )
        )
    return "\n".join(text)


def upper_half_gains(chase: list[dict], msdnet: list[dict]) -> list[float]:
    """Accuracy of CHASE less that of MSDNet at the same mean MACs, over the upper half of the range both cover."""
    curves = [np.array(sorted((p["cost"], p["accuracy"]) for p in curve)).T for curve in (chase, msdnet)]
    low, high = max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves)
    costs = np.linspace((low + high) / 2, high, 5)
    ours, theirs = (np.interp(costs, *curve) for curve in curves)
    return (ours - theirs).tolist()


EXPERIMENT = Experiment(
    name="chase",
    title="MSDNet and CHASE on CIFAR-100",
    claim="CHASE is above MSDNet at the same MACs (CHASE, fig. 4).",
    runs=[
        Run(name, 0, Training(name, OPTIONS, analyses=ANALYSES))
        for name in ("msdnet_cifar_batch", "chase_cifar", "msdnet_cifar_anytime")
    ],
    section=section,
)
