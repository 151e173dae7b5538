"""Exits on a network whose weights stay as they are: the heads for Caltech-101 that ship with the package.

At three budgets: accuracy, MACs, and images/s beside the same network without exits, in the form its users run. Run it
on a machine that does nothing else: ``make experiments ONLY=frozen JOBS=1``.
"""

from pathlib import Path
from types import SimpleNamespace

import budget_speed
from base import Experiment, Place, Result, Run, percent, table, verdict

MODEL = "with_exits_tf_efficientnet_lite0.caltech101"
BATCHES = (1, 32)


def measure(place: Place, folder: Path, seed: int) -> Result:
    options = SimpleNamespace(
        model=MODEL,
        data=str(place.data / "caltech101"),
        budget=[0.7, 0.8, 0.9],
        batch=list(BATCHES),
        images=32 if place.small else 96,
        repeats=1 if place.small else 7,
        cpu_time=False,
    )
    report = budget_speed.measure(options)
    return {"settings": {**vars(options), "data": "caltech101"}, "rows": report["rows"]}


def section(results: list[Result], pictures: Path) -> str:
    rows = results[0]["rows"]
    cells = [
        [
            name,
            percent(row["accuracy"]),
            f"{row['macs'] / 1e6:.1f}",
            *(f"{row[f'batch {batch}']['images_per_second']:.1f}" for batch in BATCHES),
        ]
        for name, row in rows.items()
    ]
    whole, highest = rows["no exits"], rows["budget 0.9"]
    timed = [(highest[f"batch {batch}"], whole[f"batch {batch}"]) for batch in BATCHES]
    gains = [ours["images_per_second"] / theirs["images_per_second"] for ours, theirs in timed]
    # Faster by more than the times are apart from round to round.
    faster = [theirs["median_ms"] - ours["median_ms"] > max(ours["iqr_ms"], theirs["iqr_ms"]) for ours, theirs in timed]
    kept = highest["accuracy"] - whole["accuracy"]
    shown = kept >= -0.01 and all(faster)
    header = ["", "accuracy (%)", "MACs (M)", *(f"images/s, batch {batch}" for batch in BATCHES)]
    return (
        table(header, cells)
        + "\n"
        + verdict(
            True if shown else False if max(gains) < 1 else None,
            f"At nine tenths of the MACs the network is {percent(kept, sign=True)} points from itself without exits, "
            f"at {gains[0]:.2f}x its images/s one at a time and {gains[1]:.2f}x in batches of {BATCHES[1]}"
            f"{'' if all(faster) else ', which is not more than rounds differ'}.",
        )
    )


EXPERIMENT = Experiment(
    name="frozen",
    title="Exits on a frozen network",
    claim="Heads on a frozen network answer the easy images sooner at no loss.",
    paper='None: the papers train backbone and exits together. It is what `add_exits(train="heads")` is for.',
    setup=f"`{MODEL}`, the heads that ship with the package over EfficientNet-Lite0 from ImageNet, at 160 pixels; "
    "thresholds solved on one half of Caltech-101's test images, scored on the other; one thread, fused PyTorch.",
    outlook="Training the backbone along (first section), or a network whose early stages are of use to a classifier: "
    "the shares of images that a frozen one lets go early are small.",
    runs=[Run("lite0_heads", 0, measure)],
    section=section,
)
