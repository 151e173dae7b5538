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
    percent,
    table,
    verdict,
)
from judging import Comparison, Difference, budget_curve, compare, of_seeds, paired

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
    pairs = [("features", "none"), ("relations", "none"), ("both", "none")]
    pairs += [(f"both_{name}", f"none_{name}") for name in TRIES]
    pairs = [(variant, without) for variant, without in pairs if {variant, without} <= groups.keys()]
    if pairs:
        rows = [[NAMES[v], *(paired(groups[v], groups[without], i) for i in range(3))] for v, without in pairs]
        text.append("Against the same without reuse, paired by seed, in points:\n")
        text.append(table(["", "exit 1", "exit 2", "exit 3"], rows))
        found = {variant: whole_range(groups[variant], groups[without]) for variant, without in pairs}
        rows = [[NAMES[variant], *one.cells(digits=1)] for variant, one in found.items()]
        text.append("And at the same mean MACs, thresholds for budgets:\n")
        text.append(table(["", "MACs (M)", "least", "mean", "most"], rows))
        if "both" in found:
            sentence = f"At the same mean MACs both kinds of reuse are {found['both'].mean} points from no reuse."
            text.append(verdict(True if found["both"].above() else False if found["both"].below() else None, sentence))
    if "both" in groups:
        text += criterion(groups["both"])
    if {"both", "depth"} <= groups.keys():
        text += in_depth(groups["both"], groups["depth"])
    drawn = {name: group for name, group in groups.items() if name.split("_")[-1] not in TRIES}
    draw_budgets(drawn, pictures / "budgeted.png", NAMES)
    text.append("![Accuracy over mean MACs of the variants, each the mean over its seeds](results/dvt/budgeted.png)\n")
    return "\n".join(text)


def whole_range(
    first: list[Result], second: list[Result], keys: tuple[str, str] = ("budgeted", "budgeted")
) -> Comparison:
    """One network against another at the same mean MACs, over all of the range both cover."""
    pairs = of_seeds(first, second)
    curves = [[budget_curve(pair[i], keys[i]) for pair in pairs] for i in (0, 1)]
    return compare(*curves, points=5, images=first[0]["test_images"])


CRITERIA = {"max softmax": "budgeted", "entropy": "budgeted_entropy", "margin": "budgeted_margin"}


def criterion(group: list[Result]) -> list[str]:
    """Table 9: which measure of confidence decides."""
    asked = [2, 4, 6]  # of nine budgets: a quarter, half and three quarters of the range
    rows = [
        [name, *(percent(*mean_and_error([result[key][i]["accuracy"] for result in group])) for i in asked)]
        for name, key in CRITERIA.items()
    ]
    chance = percent(*mean_and_error([result["random"][0]["accuracy"] for result in group]))
    cost = group[0]["random"][0]["cost"] / 1e6
    header = ["leave by (table 9)", *(f"{group[0]['budgeted'][i]['budget'] / 1e6:.1f}M" for i in asked)]
    text = [table(header, rows), f"At random, as many at every exit: {chance} % at {cost:.1f}M.\n"]
    others = {name: whole_range(group, group, ("budgeted", key)) for name, key in CRITERIA.items() if key != "budgeted"}
    at_random = Difference(
        [np.interp(r["random"][0]["cost"], *budget_curve(r)) - r["random"][0]["accuracy"] for r in group]
    )
    figures = ", ".join(f"{one.mean} from {name}" for name, one in others.items())
    shown = others["entropy"].above() and at_random.above()
    sentence = f"Table 9: leaving by the largest softmax is, in the mean over the budgets, {figures} and {at_random} "
    return [*text, verdict(True if shown else None, sentence + "points from chance.")]


def in_depth(tokens: list[Result], depth: list[Result]) -> list[str]:
    """Table 10: both at the same mean MACs."""
    found = whole_range(tokens, depth)
    rows = [["DVT", *found.cells(digits=1)]]
    sentence = (
        f"Table 10: at the same mean MACs DVT is {found.mean} points from one transformer with exits in its depth."
    )
    return [
        table(["above exits in the depth (table 10)", "MACs (M)", "least", "mean", "most"], rows),
        verdict(True if found.above() else False if found.below() else None, sentence),
    ]


EXPERIMENT = Experiment(
    name="dvt",
    title="DVT: reusing features and relations",
    claim="A later transformer that reuses the features and the attention logits of the one before is more accurate "
    "than one that starts anew (DVT, table 6); confidence decides better than entropy and chance (table 9).",
    paper="On ImageNet (T2T-ViT-12) both kinds of reuse bring -1.3, +2.1 and +3.3 points at the three exits, for up to "
    "11 % more MACs (table 6); at 0.75G to 1.5G confidence decides 0.3 to 1 point better than entropy and 3.5 to 5.3 "
    "better than chance (table 9); exits in the depth of T2T-ViT-14 are 1.7 to 3.2 points below (table 10).",
    setup="Three transformers of 3 x 3, 4 x 4 and 6 x 6 plain patches (`dvt_test`), all 50,000 images of CIFAR-100 "
    f"enlarged to 64 pixels, {OPTIONS['epochs']} epochs, AdamW, crops and mirrors; 10,000 test images. Further tries, "
    "one seed each: three times as long, and transformers of seven blocks.",
    outlook="Transformers that are trained far enough to have features worth handing on: the paper trains 300 epochs "
    "on 25 times as many images, and its exits reach 70 to 80 %.",
    runs=[
        Run(variant, seed, training)
        for seed in range(3)
        for variant, training in trainings().items()
        if not seed or variant in (*VARIANTS, "depth")  # the tries: one seed each
    ],
    section=section,
)
