"""Print the table of docs/models.md: parameters and cumulative MACs per exit at each model's own image size."""

import timm
import torch

from exit_plugins import exit_costs
from exit_plugins.timm import list_models


def row(name: str) -> str:
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    costs = exit_costs(model, size)
    unit, letter = (1e9, "G") if costs.macs[-1] >= 2e8 else (1e6, "M")
    macs = " ".join(f"{m / unit:.3f}" if unit == 1e9 else f"{m / unit:.1f}" for m in costs.macs)
    params = sum(p.numel() for p in model.parameters())
    return f"| `{name}` | {size[-1]} | {params / 1e6:.2f}M | {macs} {letter} |"


if __name__ == "__main__":
    print("| timm name | pixels | parameters | MACs to each exit |\n|---|---|---|---|")
    for name in list_models(clips=False):
        if not name.endswith("_test"):
            print(row(name), flush=True)
