"""The model card of an adapter or a merged model: what it is, what each exit costs and reaches, how to load it."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard, ModelCardData
from torch import nn

from ..exits import exit_costs
from .exit_model import ExitModel
from .folders import name_of
from .timm_family import input_size as timm_input_size
from .timm_family import is_timm

__all__ = ["card_tags", "input_size", "update_card"]

CARD = "README.md"
_BEGIN, _END = "<!-- exits: written anew at every save -->", "<!-- end of exits -->"
_TEMPLATE = "[More Information Needed]"  # of PEFT's card, which says nothing

_LOAD_ADAPTER = """```python
from exit_plugins import AdaptiveModel, DynPeftModel, collect_exits, exit_costs, solve_thresholds

backbone = ...  # a {base} with the weights the adapter was trained over and {num_classes} classes
model = DynPeftModel.from_pretrained(backbone, "FOLDER")
logits = model(images)  # of the last exit; model.forward_exits(images): of all
model = model.merge_and_unload()  # no adapter left, where the method can be merged

costs = exit_costs(model, input_size={input_size})
policy = solve_thresholds(collect_exits(model, calibration_loader), costs.macs, budget=0.5 * costs.macs[-1])
output = AdaptiveModel(model, policy)(images)  # every image leaves where it is sure enough
```

{plain}"""

_PLAIN = """\
`peft.PeftModel.from_pretrained(backbone, "FOLDER")` reads the adapter and the trained classifier, without the early
exits: it gives the last exit's logits."""

_LOAD_MERGED = """```python
from exit_plugins import AdaptiveModel, collect_exits, exit_costs, solve_thresholds
from exit_plugins.peft import MultiExitBackbone

model = MultiExitBackbone.from_pretrained("FOLDER")
logits = model(images)  # of the last exit; model.forward_exits(images): of all

costs = exit_costs(model, input_size={input_size})
policy = solve_thresholds(collect_exits(model, calibration_loader), costs.macs, budget=0.5 * costs.macs[-1])
output = AdaptiveModel(model, policy)(images)  # every image leaves where it is sure enough
```

{plain} reads the backbone and its classifier, without the early exits."""


def card_tags(method: str | None) -> list[str]:
    """Tags by which such models are found."""
    return ["early-exit", "dynamic-inference", "image-classification", *([method.lower()] if method else [])]


def input_size(backbone: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) that the backbone is made for; None if it does not say."""
    config: Any = getattr(backbone, "config", None)
    if hasattr(config, "image_size"):
        size = config.image_size
        return (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    return timm_input_size(backbone) if is_timm(backbone) else None


def update_card(
    folder: Path,
    model: ExitModel,
    method: str | None = None,
    accuracies: Sequence[float] | None = None,
    dataset: str | None = None,
) -> None:
    """Write the exits into the card in ``folder``, or a new one; what else a user wrote there stays.

    Args:
        folder: where ``README.md`` stands or will stand.
        model: the model with exits, adapted or merged.
        method: PEFT method, if there is an adapter.
        accuracies: top-1 accuracy of every exit in percent, shallow to deep.
        dataset: what they were measured on.
    """
    path = Path(folder, CARD)
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    section = "\n".join((_BEGIN, *_section(model, method, accuracies, dataset), _END))
    text = card.text
    if _TEMPLATE in text or not text.strip():
        versions = text.partition("### Framework versions")
        text = "\n\n".join(filter(None, (section, "".join(versions[1:]).strip())))
    elif _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        text = before + section + rest.partition(_END)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    _describe(card.data, model, method)
    card.text = text
    card.save(path)


def _describe(data: CardData, model: ExitModel, method: str | None) -> None:
    """The card's metadata: tags, task, and a base model that others can find."""
    base = _hub_name(model.backbone)
    given = data.to_dict().get("tags") or []
    kept = {tag for tag in given if not tag.startswith("base_model:") or _findable(tag.rpartition(":")[2])}
    relation = "adapter" if method else "finetune"
    data["tags"] = sorted({*kept, *card_tags(method), *([f"base_model:{relation}:{base}"] if base else [])})
    data["pipeline_tag"] = "image-classification"
    if base:
        data["base_model"] = base
    elif not _findable(data.to_dict().get("base_model") or ""):
        data.__dict__.pop("base_model", None)
    if not data.to_dict().get("library_name"):
        data["library_name"] = "timm" if hasattr(model.backbone, "pretrained_cfg") else "transformers"


def _hub_name(backbone: nn.Module) -> str | None:
    """Name on the hub that the backbone's weights come from, as its host says."""
    config = getattr(backbone, "pretrained_cfg", None)
    if config:
        tag = config.get("tag")
        name = config.get("hf_hub_id")
        return (name + f"{config['architecture']}.{tag}" if name.endswith("/") else name) if name and tag else None
    name = name_of(backbone) or ""
    return name if _findable(name) else None


def _findable(name: str) -> bool:
    """Whether this can be the name of a repository on the hub, and is no folder of somebody's machine."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not os.path.exists(name)


def _macs(model: ExitModel) -> list[float] | None:
    """Cumulative MACs of the exits, reckoned once for each set of exits; None where they cannot be."""
    kept = model.__dict__.setdefault("_macs_of_exits", {})
    key = (model.exit_after, tuple(head.hidden for head in model.early_heads), input_size(model.backbone))
    if key not in kept:
        try:
            kept[key] = exit_costs(model, key[-1]).macs.tolist() if key[-1] else None
        except (
            Exception
        ) as error:  # a card is no reason to lose an adapter: quantised or sharded layers may not be copied
            warnings.warn(f"the model card is written without MACs, which could not be reckoned: {error}", stacklevel=2)
            kept[key] = None
    return kept[key]


def _plain(model: ExitModel, method: str) -> str:
    """What plain PEFT makes of the folder, and what it needs for that."""
    if model.last_head_width:
        return (
            "`peft.PeftModel` cannot read the adapter: the last exit's head is wider than the classifier of a new "
            f"{type(model.backbone).__name__}."
        )
    lines = [_PLAIN]
    if method in ("REPADAPTER", "BOTTLENECK"):
        lines.append("`import exit_plugins.peft` first, or PEFT does not know the method.")
    if any(getattr(module, "qkv_bias_separate", None) is True for module in model.backbone.modules()):
        lines.append(
            "Before that set `qkv_bias_separate = True` on every module of the backbone that has it: timm otherwise\n"
            "reads the weights of `qkv` and never calls it, and an adapter around it has no effect."
        )
    return "\n".join(lines)


def _section(
    model: ExitModel,
    method: str | None,
    accuracies: Sequence[float] | None,
    dataset: str | None,
) -> list[str]:
    backbone, count, macs = model.backbone, model.num_exits, _macs(model)
    if accuracies is not None and len(accuracies) != count:
        raise ValueError(f"{len(accuracies)} accuracies were given for {count} exits.")
    name = name_of(backbone) or ""
    base = f"{type(backbone).__name__} `{name}`" if _findable(name) else type(backbone).__name__
    size = input_size(backbone)
    classes = model.early_heads[0].fc.out_features
    what = f"{method} over a {base}" if method else f"a {base} with its adapters merged"
    library = "timm" if hasattr(backbone, "pretrained_cfg") else type(backbone).__module__.partition(".")[0]
    unit = model.family.unit
    head = [f"Exit | Behind {unit}", *(["MACs | Share of MACs"] if macs is not None else [])]
    head += [f"Top-1 accuracy (%){f' on {dataset}' if dataset else ''}"] if accuracies is not None else []
    columns = 2 + 2 * (macs is not None) + (accuracies is not None)
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * columns]
    for index, after in enumerate(model.exit_after):
        row = [str(index + 1), str(after)]
        row += [f"{macs[index] / 1e9:.3g} G", f"{macs[index] / macs[-1]:.2f}"] if macs is not None else []
        row += [f"{accuracies[index]:.2f}"] if accuracies is not None else []
        rows.append("| " + " | ".join(row) + " |")
    if method:
        load = _LOAD_ADAPTER.format(
            base=base, num_classes=classes, input_size=size or "...", plain=_plain(model, method)
        )
    else:
        plain = (
            '`timm.create_model("local-dir:FOLDER", pretrained=True)`'
            if library == "timm"
            else '`transformers.AutoModelForImageClassification.from_pretrained("FOLDER")`'
        )
        load = _LOAD_MERGED.format(input_size=size or "...", plain=plain)
    costs = f" MACs are of one image of {' x '.join(map(str, size))}, cumulative." if macs is not None and size else ""
    return [
        f"# {what[0].upper()}{what[1:]}, {count} exits",
        "",
        f"An image classifier of {classes} classes ({library}) that can stop at {count} exits (Dyn-Adapter, "
        f"arXiv:2407.14302).{costs}",
        "",
        *rows,
        "",
        "## How to load",
        "",
        load,
    ]
