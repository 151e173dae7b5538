"""CHASE, fig. 5: what channel attention and global attention bring, on the smallest form. One seed."""

from pathlib import Path

from base import Experiment, Result, Run, Training, budgets, by_variant, draw_budgets, exits_table, table, verdict
from chase import OPTIONS as WHOLE_SIZE
from chase import upper_half

OPTIONS = {**WHOLE_SIZE, "samples": 20_000, "warmup-epochs": 2, "compile": False}
VARIANTS = {
    "whole": {},
    "no_global": {"gal": False},
    "no_channel": {"cam": False},
    "neither": {"gal": False, "cam": False},
}
NAMES = {
    "whole": "CHASE",
    "no_global": "without global attention",
    "no_channel": "without channel attention",
    "neither": "without both",
}


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    draw_budgets(groups, pictures / "budgeted.png", NAMES)
    text = [exits_table(results, NAMES), "![Accuracy over mean MACs](results/attention/budgeted.png)\n"]
    if VARIANTS.keys() <= groups.keys():
        found = {name: upper_half(groups["whole"], groups[name], "budgeted") for name in VARIANTS if name != "whole"}
        text.append("CHASE in points above each form at the same mean MACs, from half of the range on:\n")
        rows = [[NAMES[name], *one.cells(digits=1)] for name, one in found.items()]
        text.append(table(["above", "MACs (M)", "least", "mean", "most"], rows))
        alone = upper_half(groups["no_global"], groups["neither"], "budgeted")
        sentence = "Both attentions together bring accuracy by more than the draw of the test images explains (one "
        sentence += f"seed); channel attention alone is {alone.mean} points from none."
        shown = all(one.above() for one in found.values())
        text.append(verdict(True if shown else False if found["neither"].below() else None, sentence))
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="attention",
    title="CHASE: what its two attentions bring",
    claim="Without global and channel attention accuracy falls at the same cost, and each of them alone leaves less "
    "than both (CHASE, fig. 5).",
    paper="On ImageNet CHASE loses more than 1.5 points without both (81.2 to 79.7 % at about 2G), more than 0.75 with "
    "channel attention alone, and 1 to 2 with global attention alone, which is the worst below 1.3G.",
    setup=f"The smallest CHASE (`chase_test`), {OPTIONS['samples']:,} images of CIFAR-100, {OPTIONS['epochs']} epochs, "
    "SGD, crops and mirrors, one seed; 10,000 test images.",
    outlook="More seeds, and a larger form, on which one attention alone may come to stand between none and both.",
    runs=[
        Run(name, 0, Training("chase_test", OPTIONS, kwargs, analyses={"budgeted": budgets()}))
        for name, kwargs in VARIANTS.items()
    ],
    section=section,
)
