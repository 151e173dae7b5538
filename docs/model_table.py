"""Write the tables of docs/models.md: what every model costs at its own image size, and what shipped weights do.

python docs/model_table.py
"""

from pathlib import Path

import timm
import torch
from page_tables import fill, table

from exit_plugins import exit_costs
from exit_plugins.exits.files import atomic_write
from exit_plugins.timm import list_models, list_shipped, shipped_card

# Around networks that are given: docs/any_model.md.
WITHOUT_SIZE = {"cascade", "dynperceiver", "with_exits"}


PAGE = Path(__file__).with_name("models.md")


def row(name: str) -> list[str]:
    """Its name, pixels, parameters, and the MACs to each exit."""
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    costs = exit_costs(model, size)
    unit, letter = (1e9, "G") if costs.macs[-1] >= 2e8 else (1e6, "M")
    macs = " ".join(f"{m / unit:.3f}" if unit == 1e9 else f"{m / unit:.1f}" for m in costs.macs)
    params = sum(p.numel() for p in model.parameters())
    return [f"`{name}`", str(size[-1]), f"{params / 1e6:.2f}M", f"{macs} {letter}"]


def shipped_row(name: str) -> list[str]:
    """From its card: classes, test images, how many percent each exit has right, what its policy does."""
    card = shipped_card(name)
    right = " ".join(f"{100 * count / card['test_images']:.1f}" for count in card["right"])
    policy, macs = card["policy"], card["macs"][-1]
    chosen = f"{100 * policy['accuracy']:.1f} at {policy['cost'] / macs:.0%} of the MACs"
    last = f"{100 * policy['last_exit_accuracy']:.1f}"
    return [
        f"`{name}`",
        str(len(card["classes"])),
        str(card["test_images"]),
        right,
        f"{chosen} ({last} at all of them)",
    ]


def models_table() -> str:
    names = [n for n in list_models(clips=False) if not n.endswith("_test") and n not in WITHOUT_SIZE]
    return table(["timm name", "pixels", "parameters", "MACs to each exit"], map(row, names))


def shipped_table() -> str:
    header = ["timm name", "classes", "test images", "right at each exit (%)", "under its policy (%)"]
    return table(header, map(shipped_row, list_shipped()))


TABLES = {"models": models_table, "shipped": shipped_table}


if __name__ == "__main__":
    page = fill(PAGE.read_text(encoding="utf-8"), lambda name: TABLES[name]())
    with atomic_write(PAGE) as file:
        file.write(page)
