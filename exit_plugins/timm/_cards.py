"""Model cards that name every exit: what timm's own card and configuration do not have a place for."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from ..exits import exit_costs
from ..exits.files import atomic_folder
from ..exits.policy import ExitPolicy, check_same_weights
from ..exits.protocol import check_multi_exit
from ._host import TimmModel, generate_readme, hf_split, model_config
from ._networks import check_not_fused
from ._shipped import list_shipped, shipped_policy
from .images import input_config

__all__ = ["load_from_hf", "model_card", "save_for_hf"]

_POLICY = "policy.json"

_USAGE = """```python
import timm
import torch
import exit_plugins  # registers {name}

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
logits = model(images)  # of the last exit
all_exits = model.forward_exits(images)  # of every exit, shallow to deep

# Where to stop, image by image; where policy.json lies beside the weights, it is one solved already:
# model, policy = exit_plugins.timm.load_from_hf("local-dir:FOLDER")
costs = exit_plugins.exit_costs(model, input_size={input_size})
table = exit_plugins.collect_exits(model, calibration_loader)
policy = exit_plugins.solve_thresholds(table, costs.macs, budget={budget:.3g})
output = exit_plugins.AdaptiveModel(model, policy)(images)
```"""


def model_card(
    model: TimmModel,
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
    details: dict[str, Any] = {
        "Model Type": f"Image classification with {model.num_exits} early exits",
        "Model Stats": {
            "Params (M)": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
            "Image size": " x ".join(str(side) for side in stats["input_size"][-2:]),
            "Classes": model.num_classes,
        },
        "Exits (cumulative cost of one image)": _exit_lines(stats),
    }
    if dataset is not None:
        details["Dataset"] = dataset
    name = model_config(model)["architecture"]
    budget = sum(stats["macs"]) / len(stats["macs"])
    card = {
        "tags": ["image-classification", "timm", "early-exit", "exit-plugins"],
        "description": f"{name}: an image classifier that can answer at any of {model.num_exits} exits.",
        "details": details,
        "usage": _USAGE.format(name=name, input_size=tuple(stats["input_size"]), budget=budget),
    }
    return card | entries


def save_for_hf(
    model: TimmModel,
    folder: str | os.PathLike[str],
    accuracies: Sequence[float] | None = None,
    dataset: str | None = None,
    card: dict[str, Any] | None = None,
    safe_serialization: bool | Literal["both"] = True,
    classes: Sequence[str] | None = None,
    policy: ExitPolicy | None = None,
    **kwargs: Any,
) -> Path:
    """Save a model as ``timm.models.save_for_hf`` does, with its exits in ``config.json`` and a ``README.md``.

    ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` loads it again, ``load_from_hf`` with its policy, and
    the folder can be uploaded as it is.

    Args:
        model, accuracies, dataset: see ``model_card``.
        folder: where to; made if needed. It becomes the new model at once, or stays as it was; other files in it stay.
        card: a card of your own instead.
        safe_serialization: write safetensors instead of a torch file ("both" writes both).
        classes: names of the classes by index; they become timm's ``label_names``.
        policy: written beside the weights as ``policy.json``.
        kwargs: go on to ``timm.models.save_for_hf`` (``model_config``, ``model_args``, ``data_config``).

    Raises:
        ValueError: the policy is for another model or was solved with other weights, or there are not as many names as
            classes, or the model is in its form for inference; nothing is written.
    """
    check_not_fused(model)
    stats = _exit_stats(model, accuracies)
    card = card or model_card(model, accuracies, dataset)
    kwargs["model_config"] = {"exits": stats, **(kwargs.get("model_config") or {})}
    if classes is not None:
        if len(classes) != model.num_classes:
            raise ValueError(f"{len(classes)} names for a model of {model.num_classes} classes; give one per class.")
        kwargs["model_config"]["label_names"] = [str(name) for name in classes]
    folder = Path(folder)
    if policy is not None:
        _check_policy(policy, model)
    if any(not tensor.is_contiguous() for tensor in model.state_dict().values()):
        # safetensors refuses channels_last weights; the model itself keeps them.
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    # Weights in the format not asked for are those of before, and timm may prefer them.
    formats = {
        "model.safetensors": safe_serialization is not False,
        "pytorch_model.bin": safe_serialization is not True,
    }
    obsolete = [name for name, written in formats.items() if not written]
    with atomic_folder(folder, without=obsolete) as new:
        timm.models.save_for_hf(model, str(new), safe_serialization=safe_serialization, **kwargs)
        (new / "README.md").write_text(generate_readme(card, model_config(model)["architecture"]), encoding="utf-8")
        if policy is not None:
            policy.save(new / _POLICY)
    return folder


def load_from_hf(name: str, **kwargs: Any) -> tuple[nn.Module, ExitPolicy | None]:
    """A model that ``save_for_hf`` saved and the policy beside it, None where there is none.

    Args:
        name: ``local-dir:FOLDER``, or ``hf-hub:OWNER/NAME`` (with ``@REVISION``) for an uploaded folder.
        kwargs: go on to ``timm.create_model``.

    Returns:
        The model in evaluation mode with its weights, and its policy.

    Raises:
        ValueError: ``name`` is neither, or the policy is not for these weights.
    """
    kind, _, where = name.partition(":")
    if kind not in ("local-dir", "hf-hub"):
        raise ValueError(f"expected local-dir:FOLDER or hf-hub:OWNER/NAME, got {name!r}.")
    model = timm.create_model(name, pretrained=True, **kwargs).eval()
    policy = own_policy(name, kwargs.get("cache_dir"))
    if policy is not None:
        _check_policy(policy, model)
    return model, policy


def own_policy(name: str, cache_dir: str | None = None) -> ExitPolicy | None:
    """The policy that comes with the weights of a model: beside its card, or with the package; None where none does.

    Args:
        name: ``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``, or a name of timm's registry.
        cache_dir: of the hub's files.
    """
    if name in list_shipped():
        return shipped_policy(name)
    kind, _, where = name.partition(":")
    if kind == "local-dir":
        path = Path(where) / _POLICY
        return ExitPolicy.load(path) if path.is_file() else None
    if kind != "hf-hub":
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, revision = hf_split(where)
    try:
        return ExitPolicy.load(hf_hub_download(repository, _POLICY, revision=revision, cache_dir=cache_dir))
    except EntryNotFoundError:
        return None


def _check_policy(policy: ExitPolicy, model: nn.Module) -> None:
    """ValueError unless the policy is for this model with these weights."""
    policy.check_model(model)
    check_same_weights(policy, model)


def _exit_stats(model: nn.Module, accuracies: Sequence[float] | None) -> dict[str, Any]:
    """MACs and parameters up to every exit, as plain numbers."""
    num_exits = int(check_multi_exit(model).num_exits)
    if accuracies is not None and len(accuracies) != num_exits:
        raise ValueError(f"{len(accuracies)} accuracies for a model of {num_exits} exits; give one per exit.")
    input_size = [int(side) for side in input_config(model)["input_size"]]
    costs = exit_costs(model, input_size)
    stats: dict[str, Any] = {
        "num_exits": num_exits,
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
