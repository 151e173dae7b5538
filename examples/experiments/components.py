"""Dyn-Perceiver, table 3: what each part of the network brings, added one after the other. One seed."""

from pathlib import Path

from base import Experiment, Result, Run, Training, by_variant, exits_table, table, verdict
from branches import OPTIONS
from judging import Difference, paired

ADDED = ("x2z", "grid_conv", "z2x", "fkt")
PLAIN_SUM = {**OPTIONS, "exit-loss": "chase"}  # of the exits' cross-entropies: no distillation
NAMES = {
    "vanilla": "vanilla",
    "x2z": "+ X2Z",
    "grid_conv": "+ depthwise convolution",
    "z2x": "+ Z2X",
    "fkt": "+ forward knowledge transfer",
    "distillation": "+ self-distillation (the paper's network)",
    "no_token_mixer": "- token mixers",
}


PARTS = {name: words.removeprefix("+ ").removeprefix("- ").split(" (")[0] for name, words in NAMES.items()}
# Each part by the row without it.
STEPS = dict(zip([*ADDED, "distillation", "no_token_mixer"], ["vanilla", *ADDED, "distillation"], strict=True))


def trainings() -> dict[str, Training]:
    """Each row adds its part to the row before; the last takes the token mixers out of the whole."""
    rows = {}
    for count, name in enumerate(["vanilla", *ADDED]):
        missing = {part: False for part in ADDED[count:]}
        rows[name] = Training("dynperceiver_test", PLAIN_SUM, missing)
    rows["distillation"] = Training("dynperceiver_test", OPTIONS)
    rows["no_token_mixer"] = Training("dynperceiver_test", OPTIONS, {"token_mixer": False})
    return rows


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results, NAMES)]
    rows, raising, lowering = [], [], []
    for name, before in STEPS.items():
        if not {name, before} <= groups.keys():
            continue
        steps = [paired(groups[name], groups[before], index) for index in range(4)]
        if name == "no_token_mixer":  # the one that is taken away
            steps = [Difference([-value for value in step.values], step.chance) for step in steps]
        rows.append([PARTS[name], *map(str, steps)])
        raising += [PARTS[name]] * any(step.above() for step in steps)
        lowering += [PARTS[name]] * any(step.below() for step in steps)
    if rows:
        text.append("What each part brings to every exit, in points:\n")
        text.append(table(["part", *(f"exit {i + 1}" for i in range(4))], rows))
        shown = [name for name in raising if name not in lowering]
        open_ = [row[0] for row in rows if row[0] not in shown]
        sentence = "That it raises some exit by more than the draw of the test images explains, and lowers none, is "
        sentence += f"shown of {', '.join(shown) or 'no part'}; not of {', '.join(open_) or 'none'} (one seed)."
        complete = len(rows) == len(STEPS)
        text.append(verdict(True if complete and not open_ else False if complete and not shown else None, sentence))
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="components",
    title="Dyn-Perceiver: what each part brings",
    claim="Each part raises the exits it serves; without token mixers all fall (Dyn-Perceiver, table 3).",
    paper="On ImageNet, at exits 1 to 4: X2Z +14.3, -0.2, +24.7, +2.2 points; depthwise convolution +0.7, +0.2, +0.2, "
    "+0.2; Z2X -1.7, +1.5, +0.9, +1.1; forward knowledge transfer +1.0, +0.3, +0.3, +0.1; self-distillation +4.5, "
    "+0.2, +0.6, -0.1; without token mixers -19.5, -0.7, -17.7, -2.6.",
    setup=f"As in the section before: `dynperceiver_test`, {OPTIONS['samples']:,} images of CIFAR-100, "
    f"{OPTIONS['epochs']} epochs, one seed. Parts add MACs too (last but one column), as they do in the paper.",
    outlook="More seeds and longer training: the paper's own steps of the smaller parts are a few tenths of a point, "
    "which one seed on 10,000 test images cannot show.",
    runs=[Run(name, 0, training) for name, training in trainings().items()],
    section=section,
)
