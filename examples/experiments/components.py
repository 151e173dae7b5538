"""Dyn-Perceiver, table 3: what each part of the network brings, added one after the other. One seed."""

from pathlib import Path

from base import Experiment, Result, Run, Training, by_variant, exits_table, percent, verdict
from branches import OPTIONS

PARTS = ("x2z", "grid_conv", "z2x", "fkt")
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


def trainings() -> dict[str, Training]:
    """Each row adds its part to the row before; the last takes the token mixers out of the whole."""
    rows = {}
    for count, name in enumerate(["vanilla", *PARTS]):
        missing = {part: False for part in PARTS[count:]}
        rows[name] = Training("dynperceiver_test", PLAIN_SUM, missing)
    rows["distillation"] = Training("dynperceiver_test", OPTIONS)
    rows["no_token_mixer"] = Training("dynperceiver_test", OPTIONS, {"token_mixer": False})
    return rows


def section(results: list[Result], pictures: Path) -> str:
    groups = by_variant(results)
    text = [exits_table(results, NAMES)]
    if {"vanilla", "distillation"} <= groups.keys():
        first, whole = ([e["accuracy"] for e in groups[name][0]["exits"]] for name in ("vanilla", "distillation"))
        gains = [b - a for a, b in zip(first, whole, strict=True)]
        figures = ", ".join(percent(gain, sign=True) for gain in gains)
        text.append(
            verdict(
                True if min(gains) > 0 else False if max(gains) < 0 else None,
                f"All parts together against vanilla: {figures} points at the four exits (one seed; differences below "
                "one point are within what another seed changes).",
            )
        )
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="components",
    title="Dyn-Perceiver: what each part brings",
    claim="Each part raises the exits it serves; without token mixers all fall (Dyn-Perceiver, table 3).",
    runs=[Run(name, 0, training) for name, training in trainings().items()],
    section=section,
)
