"""Dyn-Perceiver, table 2: where may early exits stand without costing the last one?"""

from pathlib import Path

from base import CROPS_AND_MIRRORS, Experiment, Result, Run, Training, by_variant, exits_table, verdict
from judging import paired

OPTIONS = {
    **CROPS_AND_MIRRORS,
    "input-size": 48,  # the fourth stage's map is then 2 x 2
    "samples": 20_000,
    "epochs": 20,
    "batch-size": 128,
    "opt": "adamw",
    "lr": 2e-3,
    "weight-decay": 0.05,
    "warmup-epochs": 2,
}
MARGIN = 0.01  # of accuracy, that what "does not cost" may cost
VARIANTS = {
    "classification": {},
    "none": {"early_exits": "none"},
    "feature": {"early_exits": "feature"},
    "cnn": {"latent_branch": False, "early_exits": "none"},
    "cnn_exits": {"latent_branch": False, "early_exits": "feature"},
}
NAMES = {
    "cnn": "plain CNN",
    "cnn_exits": "plain CNN with exits",
    "none": "two branches, no exits",
    "feature": "two branches, exits in the feature branch",
    "classification": "two branches, exits in the classification branch",
}


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results, NAMES)]

    costs = {
        variant: paired(groups[variant], groups[without])
        for variant, without in (("classification", "none"), ("feature", "none"), ("cnn_exits", "cnn"))
        if {variant, without} <= groups.keys()
    }
    lines = [
        f"- {NAMES[variant]}: {gain} points at the last exit against the same without exits"
        for variant, gain in costs.items()
        if gain
    ]
    text.append("\n".join(lines) + "\n")
    if costs.keys() >= {"classification", "feature"}:
        ours, feature = costs["classification"], paired(groups["feature"], groups["classification"])
        free, dear = ours.above(-MARGIN), feature.below()
        sentence = f"With exits in the classification branch the last exit is {ours} points from where it is without, "
        sentence += (
            f"{'not' if free else 'which may be'} more than {100 * MARGIN:.0f} below; with those in the feature "
        )
        sentence += f"branch it is {feature} points from that, {'below' if dear else 'not surely below'}."
        text.append(verdict(True if free and dear else False if ours.below() and feature.above() else None, sentence))
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="branches",
    title="Dyn-Perceiver: where the exits stand",
    claim="Early exits on intermediate features cost the last exit accuracy; in the classification branch they do not "
    "(Dyn-Perceiver, table 2).",
    paper="On ImageNet an exit costs the last one of RegNetY-800MF 1.2 points and of T2T-ViT-7 2.2; with two branches "
    "0.2 points if it stands in the feature branch, while in the classification branch the last exit gains 0.7.",
    setup=f"The smallest Dyn-Perceiver (`dynperceiver_test`) from random weights, {OPTIONS['samples']:,} images of "
    f"CIFAR-100 enlarged to {OPTIONS['input-size']} pixels, {OPTIONS['epochs']} epochs, AdamW, crops and mirrors; "
    "10,000 test images.",
    outlook="Networks and trainings of the paper's size: here they end far from what they could learn, so that another "
    "loss helps the last exit wherever it stands.",
    runs=[
        Run(variant, seed, Training("dynperceiver_test", OPTIONS, kwargs))
        for seed in range(3)
        for variant, kwargs in VARIANTS.items()
    ],
    section=section,
)
