"""Print the tables of docs/models.md: what every model costs at its own image size, and what shipped weights do."""

import timm
import torch

from exit_plugins import exit_costs
from exit_plugins.timm import list_models, list_shipped, shipped_card

# Around networks that are given: docs/any_model.md.
WITHOUT_SIZE = {"cascade", "dynperceiver", "with_exits"}


def row(name: str) -> str:
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    costs = exit_costs(model, size)
    unit, letter = (1e9, "G") if costs.macs[-1] >= 2e8 else (1e6, "M")
    macs = " ".join(f"{m / unit:.3f}" if unit == 1e9 else f"{m / unit:.1f}" for m in costs.macs)
    params = sum(p.numel() for p in model.parameters())
    return f"| `{name}` | {size[-1]} | {params / 1e6:.2f}M | {macs} {letter} |"


def shipped_row(name: str) -> str:
    """From its card: classes, test images, how many percent each exit has right, what its policy does."""
    card = shipped_card(name)
    right = " ".join(f"{100 * count / card['test_images']:.1f}" for count in card["right"])
    policy, macs = card["policy"], card["macs"][-1]
    chosen = f"{100 * policy['accuracy']:.1f} at {policy['cost'] / macs:.0%} of the MACs"
    last = f"{100 * policy['last_exit_accuracy']:.1f}"
    return f"| `{name}` | {len(card['classes'])} | {card['test_images']} | {right} | {chosen} ({last} at all of them) |"


if __name__ == "__main__":
    print("| timm name | pixels | parameters | MACs to each exit |\n|---|---|---|---|")
    for name in list_models(clips=False):
        if not name.endswith("_test") and name not in WITHOUT_SIZE:
            print(row(name), flush=True)
    print(
        "\n| timm name | classes | test images | right at each exit (%) | under its policy (%) |\n|---|---|---|---|---|"
    )
    for name in list_shipped():
        print(shipped_row(name))
