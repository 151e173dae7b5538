"""Dyn-Perceiver, table 2: where may early exits stand without costing the last one?"""

from pathlib import Path

from base import CROPS_AND_MIRRORS, Experiment, Result, Run, Training, by_variant, exits_table, paired, percent, verdict

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

    def cost(variant: str, without: str) -> tuple[float, float | None] | None:
        return paired(groups[variant], groups[without]) if {variant, without} <= groups.keys() else None

    found = {
        "classification": cost("classification", "none"),
        "feature": cost("feature", "none"),
        "cnn_exits": cost("cnn_exits", "cnn"),
    }
    lines = [
        f"- {NAMES[variant]}: {percent(*gain, sign=True)} points at the last exit against the same without exits"
        for variant, gain in found.items()
        if gain
    ]
    text.append("\n".join(lines) + "\n")
    if found["classification"] and found["feature"] and found["classification"][1] is not None:
        (ours, error), (feature, _) = found["classification"], found["feature"]
        free, dear = ours >= -error, feature < ours
        text.append(
            verdict(
                True if free and dear else False if ours < -2 * error and feature >= ours else None,
                f"Exits in the classification branch {'do not cost' if free else 'cost'} the last exit more than one "
                f"standard error, and those in the feature branch leave it {'below' if dear else 'not below'} that.",
            )
        )
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="branches",
    title="Dyn-Perceiver: where the exits stand",
    claim="Early exits on intermediate features cost the last exit accuracy; in the classification branch they do not "
    "(Dyn-Perceiver, table 2).",
    runs=[
        Run(variant, seed, Training("dynperceiver_test", OPTIONS, kwargs))
        for seed in range(3)
        for variant, kwargs in VARIANTS.items()
    ],
    section=section,
)
