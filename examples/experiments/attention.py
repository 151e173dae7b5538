"""CHASE, fig. 5: what channel attention and global attention bring, on the smallest form. One seed."""

from pathlib import Path

from base import Experiment, Result, Run, Training, budgets, by_variant, draw_budgets, exits_table, percent, verdict
from chase import OPTIONS as WHOLE_SIZE
from chase import upper_half_gains

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
        whole = groups["whole"][0]["budgeted"]
        gains = {name: upper_half_gains(whole, groups[name][0]["budgeted"]) for name in VARIANTS if name != "whole"}
        found = [gain for values in gains.values() for gain in values]
        figures = "; ".join(
            f"{NAMES[name]} {percent(min(values), sign=True)} to {percent(max(values), sign=True)}"
            for name, values in gains.items()
        )
        text.append(
            verdict(
                True if min(found) > 0 else False if max(found) < 0 else None,
                f"From half of the range on, CHASE is above the form {figures} points at the same mean MACs (one seed; "
                "differences below one point are within what another seed changes).",
            )
        )
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="attention",
    title="CHASE: what its two attentions bring",
    claim="Without global and channel attention accuracy falls by more than 1.5 points at the same cost, and each of "
    "them alone leaves less than both (CHASE, fig. 5).",
    runs=[
        Run(name, 0, Training("chase_test", OPTIONS, kwargs, analyses={"budgeted": budgets()}))
        for name, kwargs in VARIANTS.items()
    ],
    section=section,
)
