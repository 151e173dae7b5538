"""The authors' published weights of Dyn-Perceiver: their names of our parameters, and reading such a file."""

from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models.regnet import Bottleneck as RegNetBottleneck
from torch import Tensor, nn

from ._checkpoints import check_keys, unwrap_state_dict
from ._host import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite, TimmModel

__all__ = ["checkpoint_filter_fn", "public_names"]


def public_names(model: TimmModel) -> dict[str, tuple[str, ...]]:
    """For each key of a Dyn-Perceiver's state dict, the one in the authors' layout; several where one is their join."""
    return {key: _public_name(key, model) for key in model.state_dict()}


# Ours to the authors' names inside the attention layers, tokens' layers and heads.
_PUBLIC_CROSS = {
    "q_norm.": "cross_attn.q_norm.",
    "kv_norm.": "cross_attn.kv_norm.",
    "q.": "cross_attn.attention.q_proj.",
    "key_position": "cross_attn.attention.relative_position_bias",
    "proj.": "cross_attn.attention.o_proj.",
    "norm.": "mlp.layernorm.",
    "mlp.": "mlp.",
}
_PUBLIC_SELF = {
    "norm1.": "self_attn.norm.",
    "attn.proj.": "self_attn.attention.o_proj.",
    "norm2.": "mlp.layernorm.",
    "mlp.": "mlp.",
}
_PUBLIC_REGNET = {
    "downsample.conv.": "proj.0.",
    "downsample.bn.": "proj.1.",
    "conv1.conv.": "f.a.0.",
    "conv1.bn.": "f.a.1.",
    "conv2.conv.": "f.b.0.",
    "conv2.bn.": "f.b.1.",
    "se.": "f.se.",
    "conv3.conv.": "f.c.0.",
    "conv3.bn.": "f.c.1.",
}
_PUBLIC_HEADS = ("early_classifier3", "classifier_att", "classifier_cnn", "classifier_merge")


def _rename(name: str, table: dict[str, str]) -> str:
    for ours, public in table.items():
        if name.startswith(ours):
            return public + name[len(ours) :]
    raise KeyError(name)


def _public_block(block: nn.Module, name: str) -> str:
    """A key inside a block of the feature branch, in the authors' layout."""
    if isinstance(block, RegNetBottleneck):
        return _rename(name, _PUBLIC_REGNET)
    if isinstance(block, ConvNormAct):
        return _rename(name, {"conv.": "0.", "bn.": "1."})
    if isinstance(block, DepthwiseSeparableConv):
        parts = [("conv_dw.", "bn1."), ("conv_pw.", "bn2.")]
    elif isinstance(block, InvertedResidual):
        parts = [("conv_pw.", "bn1."), ("conv_dw.", "bn2."), ("conv_pwl.", "bn3.")]
    else:  # ResNet's names are torchvision's in both
        return name
    table = {}
    squeezes = isinstance(block.se, SqueezeExcite)
    for index, (conv, norm) in enumerate(parts):
        if squeezes and index == len(parts) - 1:
            table["se.conv_reduce."] = f"block.{index}.fc1."
            table["se.conv_expand."] = f"block.{index}.fc2."
            index += 1
        table[conv], table[norm] = f"block.{index}.0.", f"block.{index}.1."
    return _rename(name, table)


def _public_name(key: str, model: TimmModel) -> tuple[str, ...]:
    root, _, name = key.partition(".")
    if root == "latent":
        return (key,)
    if root == "stem":
        if isinstance(model.stem, ConvNormAct):
            return ("cnn_stem." + _public_block(model.stem, name),)
        index, _, name = name.partition(".")
        public = _public_block(model.stem[int(index)], name)
        return ("cnn_stem." + (public if isinstance(model.stem[1], nn.MaxPool2d) else f"{index}.{public}"),)
    if root == "transfers":
        index, part, name = name.split(".", 2)
        return (f"isc{int(index) + 3}.{dict(fc=0, norm=1)[part]}.{name}",)
    if root == "heads":
        index, _, name = name.partition(".")
        head = model.heads[int(index)]
        hidden = isinstance(head.hidden, nn.Sequential)
        normed = isinstance(head.norm, nn.BatchNorm1d)
        first = int(normed)
        table = {"norm.": "0.", "hidden.0.": f"{first}.", "fc.": f"{first + 3}." if hidden else f"{first}."}
        if not hidden and not normed:
            table = {"fc.": ""}
        return (f"{_PUBLIC_HEADS[int(index)]}.{_rename(name, table)}",)
    stage, part, name = name.split(".", 2)
    number = int(stage) + 1
    if part == "grid":
        return (f"dwc{number}_x2z.{name}",)
    if part in ("token_mixer", "channel_expander"):
        prefix = "token_mixer" if part == "token_mixer" else "token_expander"
        return (f"{prefix}.{stage}.{_rename(name, {'norm.': '0.', 'fc.': '1.'})}",)
    if part in ("x2z", "z2x"):
        prefix = f"cross_att{number}_x2z." if part == "x2z" else f"cross_att{number + 1}_z2x."
        if part == "z2x" and number == 4:
            prefix = "last_cross_att_z2x."
        if name == "kv.weight":
            return tuple(f"{prefix}cross_attn.attention.{p}_proj.weight" for p in "kv")
        return (prefix + _rename(name, _PUBLIC_CROSS),)
    index, _, name = name.partition(".")
    if part == "self_attn":
        prefix = f"self_att{number}.{index}."
        if name == "attn.qkv.weight":
            return tuple(f"{prefix}self_attn.attention.{p}_proj.weight" for p in "qkv")
        return (prefix + _rename(name, _PUBLIC_SELF),)
    block = model.stages[int(stage)].blocks[int(index)]
    prefix = f"cnn_body_stage{number}.{index}."
    if isinstance(block, RegNetBottleneck):
        prefix = f"cnn_body.block{number}.block{number}-{index}."
    return (prefix + _public_block(block, name),)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: TimmModel) -> dict[str, Tensor]:
    """State dict in our layout from ours or the authors': plain, ``{"model": ...}`` training file, EMA.

    Raises:
        ValueError: A key is missing or unknown; the message names them.
    """
    state_dict = unwrap_state_dict(state_dict)
    if any(key.startswith("stages.") for key in state_dict):
        names: dict[str, tuple[str, ...]] = {key: (key,) for key in model.state_dict()}
    elif model.left_out:
        raise ValueError(
            f"the authors' weights are those of the whole network, and this one was built with other values of "
            f"{', '.join(model.left_out)}; leave these options out, or load weights trained with them."
        )
    else:
        names = public_names(model)
    head_roots = ("heads.", "transfers.", "isc", "early_classifier", "classifier_")
    wanted = {public for group in names.values() for public in group}
    unexpected = {
        key for key in state_dict.keys() - wanted if not (model.num_classes == 0 and key.startswith(head_roots))
    }
    check_keys(wanted - state_dict.keys(), unexpected, "Check the model's name against the file.")
    return {
        key: state_dict[group[0]] if len(group) == 1 else torch.cat([state_dict[name] for name in group])
        for key, group in names.items()
    }
