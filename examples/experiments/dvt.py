"""DVT, table 6: does a later transformer gain from the features and the relations of the one before?

And table 9, what decides who leaves; and table 10, exits in the depth of one transformer instead.
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
    mean_and_error,
    paired,
    percent,
    table,
    verdict,
)

from exit_plugins import ExitTable

# The paper's DVT at the size of CIFAR: three transformers of 9, 16 and 36 tokens, images enlarged to 64 px. The first
# layers are plain patches: T2T's unfolding costs more than the rest at this size.
MODEL = {"tokens": "patch", "token_grids": "(3,4,6)"}
OPTIONS = {
    **CROPS_AND_MIRRORS,
    "exit-loss": "dvt",
    "epochs": 8,
    "batch-size": 128,
    "opt": "adamw",
    "lr": 1e-3,
    "weight-decay": 0.05,
    "warmup-epochs": 1,
}
VARIANTS = {
    "both": {},
    "none": {"relation_reuse": False, "feature_reuse": False},
    "features": {"relation_reuse": False},
    "relations": {"feature_reuse": False},
}
# What might hold reuse back: too short a training, or transformers too shallow to find what is worth handing on.
TRIES = {
    "long": ("trained three times as long", {"epochs": 24, "warmup-epochs": 3}, {}),
    "deep": ("transformers of seven blocks", {}, {"depth": 7}),
}
# Table 10: the last of the transformers alone, of 36 patches, with an exit behind each of its layers.
DEPTH = {
    "backbone": "vit_tiny_patch16_224",
    "img_size": 60,
    "patch_size": 10,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "exits": "blocks.0,blocks.1",
}
WAYS = {"both": "both (DVT)", "none": "no reuse"}
NAMES = {
    **WAYS,
    "features": "features",
    "relations": "relations",
    "depth": "one transformer, exits in its depth",
    **{f"{way}_{name}": f"{words}, {said}" for name, (said, _, _) in TRIES.items() for way, words in WAYS.items()},
}


def random_shares(tested: ExitTable, macs: np.ndarray) -> list[dict[str, float]]:
    """Table 9's baseline: images leave at random, as many at every exit; at three exits one point."""
    return [{"cost": float(macs.mean()), "accuracy": float(tested.correct.mean())}]


ANALYSES = {
    "budgeted": budgets(),
    "budgeted_entropy": budgets("entropy"),
    "budgeted_margin": budgets("margin"),
    "random": random_shares,
}


def trainings() -> dict[str, Training]:
    """Of every variant."""
    found = {
        name: Training("dvt_test", OPTIONS, {**MODEL, **kwargs}, analyses=ANALYSES) for name, kwargs in VARIANTS.items()
    }
    found["depth"] = Training("with_exits", {**OPTIONS, "input-size": 60}, DEPTH, analyses=ANALYSES)
    for name, (_, options, kwargs) in TRIES.items():
        for way in WAYS:
            found[f"{way}_{name}"] = Training(
                "dvt_test", {**OPTIONS, **options}, {**MODEL, **kwargs, **VARIANTS[way]}, analyses=ANALYSES
            )
    return found


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results, NAMES)]
    gains = {}
    pairs = [("features", "none"), ("relations", "none"), ("both", "none")]
    pairs += [(f"both_{name}", f"none_{name}") for name in TRIES]
    for variant, without in pairs:
        if variant in groups and without in groups:
            gains[variant] = [paired(groups[variant], groups[without], i) for i in range(3)]
    if gains:
        rows = [[NAMES[v], *(percent(*g, sign=True) for g in per_exit)] for v, per_exit in gains.items()]
        text.append(
            "Against the same without reuse, paired by seed, in points:\n\n"
            + table(["", "exit 1", "exit 2", "exit 3"], rows)
        )
    if "both" in groups:
        text.append(criterion(groups["both"]))
    if {"both", "depth"} <= groups.keys():
        text.append(in_depth(groups["both"], groups["depth"]))
    if "both" in gains:
        costs, both, none = at_equal_macs(groups["both"], groups["none"])
        gain = [mean_and_error(column) for column in (both - none).T.tolist()]
        rows = [[f"{cost / 1e6:.1f}M", percent(*one, sign=True)] for cost, one in zip(costs, gain, strict=True)]
        text.append("Both kinds of reuse against none at the same mean MACs:\n\n" + table(["MACs", "points"], rows))
        shown = all(mean > 2 * (error or 0) and mean > 0 for mean, error in gain)
        against = all(mean < 0 and -mean > 2 * (error or 0) for mean, error in gain)
        least, most = (percent(pick(mean for mean, _ in gain), sign=True) for pick in (min, max))
        later = " and ".join(percent(*one, sign=True) for one in gains["both"][1:])
        sentence = f"At the same mean MACs both kinds of reuse are {least} to {most} points from no reuse; at exits 2 "
        sentence += f"and 3, where reuse costs MACs, {later}."
        text.append(verdict(True if shown else False if against else None, sentence))
    drawn = {name: group for name, group in groups.items() if name.split("_")[-1] not in TRIES}
    draw_budgets(drawn, pictures / "budgeted.png", NAMES)
    text.append("![Accuracy over mean MACs of the variants, each the mean over its seeds](results/dvt/budgeted.png)\n")
    return "\n".join(text)


def criterion(group: list[Result]) -> str:
    """Table 9: which measure of confidence decides."""
    asked = [2, 4, 6]  # of nine budgets: a quarter, half and three quarters of the range
    rows = []
    for name, key in (("max softmax", "budgeted"), ("entropy", "budgeted_entropy"), ("margin", "budgeted_margin")):
        rows.append(
            [name, *(percent(*mean_and_error([result[key][i]["accuracy"] for result in group])) for i in asked)]
        )
    chance = percent(*mean_and_error([result["random"][0]["accuracy"] for result in group]))
    cost = group[0]["random"][0]["cost"] / 1e6
    header = ["leave by (table 9)", *(f"{group[0]['budgeted'][i]['budget'] / 1e6:.1f}M" for i in asked)]
    return table(header, rows) + f"\nAt random with equal shares: {chance} % at {cost:.1f}M.\n"


def at_equal_macs(first: list[Result], second: list[Result]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean MACs (5,) over the range that both cover, and the accuracies (seeds, 5) there, of the seeds both have."""
    seeds = sorted({result["seed"] for result in first} & {result["seed"] for result in second})
    groups = [[result for result in group if result["seed"] in seeds] for group in (first, second)]
    low = max(group[0]["budgeted"][0]["cost"] for group in groups)
    high = min(group[0]["budgeted"][-1]["cost"] for group in groups)
    costs = np.linspace(low, high, 5)

    def accuracies(group: list[Result]) -> np.ndarray:
        curves = [np.array(sorted((p["cost"], p["accuracy"]) for p in result["budgeted"])).T for result in group]
        return np.array([np.interp(costs, *curve) for curve in curves])

    return costs, accuracies(groups[0]), accuracies(groups[1])


def in_depth(tokens: list[Result], depth: list[Result]) -> str:
    """Table 10: both at the same mean MACs."""
    costs, in_tokens, in_layers = at_equal_macs(tokens, depth)
    rows = [
        [NAMES[name], *(percent(*mean_and_error(of_budget)) for of_budget in found.T.tolist())]
        for name, found in (("depth", in_layers), ("both", in_tokens))
    ]
    return table(["where exits stand (table 10)", *(f"{cost / 1e6:.1f}M" for cost in costs)], rows)


EXPERIMENT = Experiment(
    name="dvt",
    title="DVT: reusing features and relations",
    claim="A later transformer that reuses the features and the attention logits of the one before is more accurate "
    "than one that starts anew (DVT, table 6); confidence decides better than entropy and chance (table 9).",
    runs=[
        Run(variant, seed, training)
        for seed in range(3)
        for variant, training in trainings().items()
        if not seed or variant in (*VARIANTS, "depth")  # the tries: one seed each
    ],
    section=section,
)
