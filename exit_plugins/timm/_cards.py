"""Model cards that name every exit: what timm's own card and configuration do not have a place for."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models._hub import generate_readme
from torch import nn

from ..exits import exit_costs
from ..exits.clips import sample_size
from ..exits.files import atomic_write
from ..exits.protocol import check_multi_exit

__all__ = ["model_card", "save_for_hf"]

_USAGE = """```python
import timm
import torch
import exit_plugins  # registers {name}

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
logits = model(images)  # of the last exit
all_exits = model.forward_exits(images)  # of every exit, shallow to deep

# Where to stop, image by image:
costs = exit_plugins.exit_costs(model, input_size={input_size})
table = exit_plugins.collect_exits(model, calibration_loader)
policy = exit_plugins.solve_thresholds(table, costs.macs, budget={budget:.3g})
output = exit_plugins.AdaptiveModel(model, policy)(images)
```"""


def model_card(
    model: nn.Module,
    accuracies: Sequence[float] | None = None,
    dataset: str | None = None,
    **entries: Any,
) -> dict[str, Any]:
    """Card of a multi-exit timm model, in the form ``timm.models.push_to_hf_hub(model, repo, model_card=...)`` takes.

    Args:
        model: a model made by ``timm.create_model``.
        accuracies: top-1 accuracy of every exit in percent, shallow to deep.
        dataset: name of the data they were measured on and the model was trained on.
        entries: entries of timm's card of your own: ``description``, ``license``, ``citation``, ``tags``, ...

    Raises:
        TypeError: the model has no exits.
        ValueError: the number of accuracies is not that of the exits.
    """
    stats = _exit_stats(model, accuracies)
    cfg = model.pretrained_cfg
    details: dict[str, Any] = {
        "Model Type": f"Image classification with {model.num_exits} early exits",
        "Model Stats": {
            "Params (M)": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
            "Image size": " x ".join(str(side) for side in stats["input_size"][1:]),
            "Classes": model.num_classes,
        },
        "Exits (cumulative cost of one image)": _exit_lines(stats),
    }
    if dataset is not None:
        details["Dataset"] = dataset
    name = cfg["architecture"]
    budget = sum(stats["macs"]) / len(stats["macs"])
    card = {
        "tags": ["image-classification", "timm", "early-exit", "exit-plugins"],
        "description": f"{name}: an image classifier that can answer at any of {model.num_exits} exits.",
        "details": details,
        "usage": _USAGE.format(name=name, input_size=tuple(stats["input_size"]), budget=budget),
    }
    return card | entries


def save_for_hf(
    model: nn.Module,
    folder: str | os.PathLike[str],
    accuracies: Sequence[float] | None = None,
    dataset: str | None = None,
    card: dict[str, Any] | None = None,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> Path:
    """Save a model as ``timm.models.save_for_hf`` does, with its exits in ``config.json`` and a ``README.md``.

    ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` loads it again, and the folder can be uploaded as it
    is.

    Args:
        model, accuracies, dataset: see ``model_card``.
        folder: where to; made if needed.
        card: a card of your own instead.
        safe_serialization: write safetensors instead of a torch file.
        kwargs: go on to ``timm.models.save_for_hf`` (``model_config``, ``model_args``, ``data_config``).
    """
    stats = _exit_stats(model, accuracies)
    card = card or model_card(model, accuracies, dataset)
    kwargs["model_config"] = {"exits": stats, **(kwargs.get("model_config") or {})}
    folder = Path(folder)
    if any(not tensor.is_contiguous() for tensor in model.state_dict().values()):
        # safetensors refuses channels_last weights; the model itself keeps them.
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(model, str(folder), safe_serialization=safe_serialization, **kwargs)
    with atomic_write(folder / "README.md") as file:
        file.write(generate_readme(card, model.pretrained_cfg["architecture"]))
    return folder


def _exit_stats(model: nn.Module, accuracies: Sequence[float] | None) -> dict[str, Any]:
    """MACs and parameters up to every exit, as plain numbers."""
    check_multi_exit(model)
    if accuracies is not None and len(accuracies) != model.num_exits:
        raise ValueError(f"{len(accuracies)} accuracies for a model of {model.num_exits} exits; give one per exit.")
    input_size = [int(side) for side in resolve_input_data_config(model)["input_size"]]
    costs = exit_costs(model, sample_size(model, input_size))
    stats: dict[str, Any] = {
        "num_exits": int(model.num_exits),
        "input_size": input_size,
        "macs": [int(macs) for macs in costs.macs],
        "params": [int(params) for params in costs.params],
    }
    if accuracies is not None:
        stats["top1"] = [float(accuracy) for accuracy in accuracies]
    return stats


def _exit_lines(stats: dict[str, Any]) -> list[str]:
    top1 = stats.get("top1", [None] * stats["num_exits"])
    lines = []
    for index, (macs, params, accuracy) in enumerate(zip(stats["macs"], stats["params"], top1, strict=True), start=1):
        line = f"exit {index}: {macs / 1e9:.4g} GMACs, {params / 1e6:.2f} M parameters"
        lines.append(line if accuracy is None else f"{line}, {accuracy:.2f} % top-1")
    return lines
