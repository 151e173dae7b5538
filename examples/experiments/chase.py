"""CHASE against MSDNet on CIFAR-100 (CHASE, fig. 4), and policies certified on each. One seed."""

from pathlib import Path

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
from judging import Comparison, budget_curve, compare, of_seeds

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
        found = upper_half(groups["chase_cifar"], groups["msdnet_cifar_anytime"], "budgeted")
        sentence = f"From half of the range on, CHASE is {found.mean} points from the MSDNet of nearest MACs, between "
        sentence += f"{percent(found.least, sign=True)} and {percent(found.most, sign=True)} (one seed)."
        text.append(verdict(True if found.above() else False if found.below() else None, sentence))
    return "\n".join(text)


def upper_half(first: list[Result], second: list[Result], key: str) -> Comparison:
    """One network against another at the same mean MACs, over the upper half of the range both cover."""
    pairs = of_seeds(first, second)
    curves = [[budget_curve(pair[i], key) for pair in pairs] for i in (0, 1)]
    return compare(*curves, part=(0.5, 1.0), points=5, images=first[0]["test_images"])


EXPERIMENT = Experiment(
    name="chase",
    title="MSDNet and CHASE on CIFAR-100",
    claim="CHASE is above MSDNet at the same MACs (CHASE, fig. 4).",
    paper="On CIFAR-100 CHASE is above L2W-MSDNet from 30M on, reaches 79 % at 55M, and what MSDNet reaches at most at "
    "36M; on ImageNet it needs 57 % fewer MACs than MSDNet.",
    setup="`chase_cifar`, the MSDNet of nearest MACs (`msdnet_cifar_anytime`) and a smaller one "
    f"(`msdnet_cifar_batch`), all 50,000 images of CIFAR-100, {OPTIONS['epochs']} epochs of one recipe: SGD, one "
    "cosine cycle, crops and mirrors; one seed, 10,000 test images.",
    outlook="The usual 300 epochs, and more seeds.",
    runs=[
        Run(name, 0, Training(name, OPTIONS, analyses=ANALYSES))
        for name in ("msdnet_cifar_batch", "chase_cifar", "msdnet_cifar_anytime")
    ],
    section=section,
)
