"""The folders of this wing: what stands beside a host's own files, and how a merged model is written and read.

An adapter's folder is PEFT's, with ``dyn_config.json`` and ``dyn_heads.safetensors`` beside it. A merged model's folder
is its backbone's host's, with the same two.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..exits.files import atomic_folder
from ..exits.reading import reading, strict_json
from ..timm._host import save_config_for_hf
from ._host import HostModel
from .exit_model import ExitModel
from .families import Family, find_family

CONFIG_NAME = "dyn_config.json"
HEADS_NAME = "dyn_heads.safetensors"
WEIGHTS_NAME = "model.safetensors"
FORMAT = 1
HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")
_EXTRA = "backbone:"  # in the heads' file: weights of the backbone that its host's constructor makes no place for


def check_keys(what: str, found: set[str], expected: set[str]) -> None:
    """ValueError naming what is missing and what is too much."""
    if found != expected:
        raise ValueError(
            f"{what} do not fit the model. Missing: {sorted(expected - found) or 'none'}. "
            f"Unexpected: {sorted(found - expected) or 'none'}."
        )


def name_of(model: HostModel) -> str | None:
    """The architecture of a timm model, or where a transformers model comes from; None if it does not say."""
    if hasattr(model, "pretrained_cfg"):
        return (model.pretrained_cfg or {}).get("architecture")
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def write_exits(folder: Path, backbone: nn.Module, kind: str, settings: dict[str, Any], tensors: dict) -> None:
    """Write the two files into ``folder``; ``kind`` is ``"adapter"`` or ``"merged"``."""
    record = {
        "format": FORMAT,
        "kind": kind,
        "base_model_class": type(backbone).__name__,
        "base_model_name": name_of(backbone),
        **settings,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2))
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    (folder / HEADS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))


def read_exits(model_id: str | os.PathLike, kind: str, **hub: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors that ``write_exits`` wrote.

    Raises:
        ValueError: a file is missing or damaged, of another format, or of another ``kind``.
    """
    paths = [_find(model_id, name, **hub) for name in (CONFIG_NAME, HEADS_NAME)]
    with reading(paths[0], "record of exits", "save them again"):
        record = strict_json(Path(paths[0]).read_bytes())
    with reading(paths[1], "file of early heads", "save them again"):
        tensors = load_file(paths[1])
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise ValueError(f"{paths[0]} has format {found}, and this version reads format {FORMAT}.")
    found = record.get("kind", "adapter")
    if found != kind:
        reader = {"adapter": "DynPeftModel.from_pretrained(backbone, folder)"}.get(
            found, "MultiExitBackbone.from_pretrained(folder) of exit_plugins.peft"
        )
        raise ValueError(f"{model_id} holds a model of the kind {found!r}, not {kind!r}; {reader} reads it.")
    return record, tensors


def check_base(model_id: str | os.PathLike, record: dict[str, Any], model: nn.Module) -> None:
    """ValueError if the exits were trained over another class of backbone."""
    if record.get("base_model_class") != type(model).__name__:
        raise ValueError(
            f"{model_id} was trained over a {record.get('base_model_class')} ({record.get('base_model_name')}) and was "
            f"given a {type(model).__name__}."
        )


def reading_folder(model_id: str | os.PathLike) -> AbstractContextManager:
    """Around all that reads a folder of an adapter or a merged model: whatever goes wrong becomes one line."""
    if not os.path.isdir(model_id):  # a name on the hub, which says itself what is wrong
        return nullcontext()
    return reading(model_id, "folder of a model with exits", "save it again")


def _find(model_id: str | os.PathLike, name: str, **hub: Any) -> Path:
    if os.path.isdir(model_id):
        path = Path(model_id, hub.get("subfolder") or "", name)
        if not path.exists():
            raise ValueError(
                f"{model_id} has no {name}, and so no exits. For an adapter without exits use "
                "PeftModel.from_pretrained; an adapter that is not called default is in the folder of its name."
            )
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(model_id), name, **hub))


def save_merged(
    model: ExitModel, save_directory: str | os.PathLike, describe: Callable[[Path], None], **kwargs: Any
) -> None:
    """Write a merged model: the backbone as its host does, its exits beside it, and what ``describe`` adds."""
    if os.path.isfile(save_directory):
        raise ValueError(f"{save_directory} is a file; name a folder.")
    backbone, heads = model.backbone, list(model.early_heads)
    tensors = {f"{index}.{key}": value for index, head in enumerate(heads) for key, value in head.state_dict().items()}
    if isinstance(backbone, PreTrainedModel):
        with torch.device("meta"):
            described = set(type(backbone)(backbone.config).state_dict())
        state = backbone.state_dict()
        widened = tuple(f"{n}." for n in model.family.classifiers(backbone)) if model.last_head_width else ()
        extra = {key: state.pop(key) for key in list(state) if key not in described or key.startswith(widened)}
        kwargs["state_dict"] = state
        tensors |= {_EXTRA + key: value for key, value in extra.items()}
        if extra:
            warnings.warn(
                f"a {type(backbone).__name__} has no place for {len(extra)} weights that adapting and merging gave it, "
                f"such as {next(iter(extra))}: MultiExitBackbone.from_pretrained reads them, transformers' own "
                "AutoModel drops them and then answers otherwise (but for a bias of attention's keys, without effect).",
                stacklevel=3,
            )
    settings = {
        "num_classes": heads[0].fc.out_features,
        "last_head_width": model.last_head_width,
        "exit_after": list(model.exit_after),
        "token": model.token,
        "widths": [head.width for head in heads],
        "hidden_widths": [head.hidden for head in heads],
        "num_frames": getattr(model, "num_frames", None),
    }
    with atomic_folder(save_directory) as folder:
        if isinstance(backbone, PreTrainedModel):
            backbone.save_pretrained(folder, **kwargs)
        else:
            weights = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
            (folder / WEIGHTS_NAME).write_bytes(save(weights, metadata={"format": "pt"}))
            if hasattr(backbone, "pretrained_cfg"):
                save_config_for_hf(backbone, str(folder / "config.json"), model_args=kwargs.get("model_args"))
        write_exits(folder, backbone, "merged", settings, tensors)
        card = Path(save_directory, "README.md")
        if card.exists():
            shutil.copy2(card, folder)
        describe(folder)


def load_merged(
    model_id: str | os.PathLike,
    model: nn.Module | None,
    widen: Callable[[nn.Module, Sequence[str], int], None],
    **hub: Any,
) -> tuple[nn.Module, Family, dict[str, Any], dict[str, Tensor]]:
    """Backbone, its family, record and early heads that ``save_merged`` wrote; ``widen`` makes last heads wider."""
    record, tensors = read_exits(model_id, "merged", **hub)
    if model is not None:
        check_base(model_id, record, model)
    heads = {key: value for key, value in tensors.items() if not key.startswith(_EXTRA)}
    config = json.loads(_find(model_id, "config.json", **hub).read_text()) if model is None else {}
    by_transformers = "model_type" in config or isinstance(model, PreTrainedModel)
    if by_transformers:
        cls: Any = AutoModelForImageClassification if model is None else type(model)
        backbone, report = cls.from_pretrained(str(model_id), output_loading_info=True, **hub)
        weights = {key.removeprefix(_EXTRA): value for key, value in tensors.items() if key.startswith(_EXTRA)}
        replaced = tuple(f"{name}." for name in find_family(backbone).classifiers(backbone))
        missing = [
            key for key in report["missing_keys"] if not (record["last_head_width"] and key.startswith(replaced))
        ]
        if missing:
            raise ValueError(f"the weights in {model_id} are not complete. Missing: {sorted(missing)}.")
    else:
        backbone = _create_timm(model_id, **hub) if model is None else model
        weights = load_file(_find(model_id, WEIGHTS_NAME, **hub))
    if model is not None and by_transformers:
        model.load_state_dict(backbone.state_dict())
        backbone = model
    family = find_family(backbone)
    widen(backbone, family.classifiers(backbone), record["last_head_width"])
    _add_biases(backbone, weights)
    if not by_transformers:
        check_keys(f"the weights in {model_id}", set(weights), set(backbone.state_dict()))
    backbone.load_state_dict(weights, strict=False)
    return backbone, family, record, heads


def _create_timm(model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> nn.Module:
    """The timm model that a folder's ``config.json`` describes, without its weights."""
    if os.path.isdir(model_id):
        return timm.create_model(f"local-dir:{Path(model_id, subfolder or '')}")
    if subfolder or hub.get("revision"):
        raise ValueError("timm makes models anew from the root of a repository's main branch; give the model.")
    return timm.create_model(f"hf-hub:{model_id}", cache_dir=hub.get("cache_dir"))


def _add_biases(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give layers the bias that merging gave them and their host's constructor does not."""
    for key, value in weights.items():
        name, _, kind = key.rpartition(".")
        try:
            layer = backbone.get_submodule(name)
        except AttributeError:
            continue
        if kind == "bias" and isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is None:
            layer.bias = nn.Parameter(value.to(layer.weight), requires_grad=layer.weight.requires_grad)
