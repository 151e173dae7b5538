"""A timm network as the feature branch of Dyn-Perceiver: a stem and four stages that pass maps to each other."""

from typing import NamedTuple

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from ._host import TimmModel
from .split import Split, map_layout, traceable_copy

__all__ = ["FeatureBranch", "NetworkPiece", "network_branch"]

_STEMS = ("stem", "patch_embed")  # where ``feature_info`` begins with the first stage


class FeatureBranch(NamedTuple):
    """The convolutional branch: C1..C4 are the channels entering the stages, C5 those leaving the last."""

    stem: nn.Module
    stages: list[nn.Sequential]
    channels: list[int]
    stem_reduction: int
    reductions: list[int]
    head_width: int = 0


class NetworkPiece(nn.Module):
    """What a network computes between two cuts, on maps (B, C, H, W). Its weights are the network's, elsewhere."""

    def __init__(self, net: TimmModel, split: Split, index: int, last_in: bool, last_out: bool) -> None:
        super().__init__()
        # No submodule: the weights must not appear twice.
        self.net: TimmModel
        self.__dict__["net"] = net
        self.split, self.index, self.last_in, self.last_out = split, index, last_in, last_out

    def forward(self, x: Tensor) -> Tensor:
        if self.last_in:
            x = x.permute(0, 2, 3, 1)
        (x,), _ = self.split.run(self.net, self.index, (x,))
        return x.permute(0, 3, 1, 2) if self.last_out else x


def network_branch(net: TimmModel) -> FeatureBranch:
    """``net`` as a branch: the last four stages that timm's ``feature_info`` names, and what comes before them.

    What follows the last stage up to the network's pooling is a part of it.

    Raises:
        ValueError: The network has no four stages of maps (convolutional or hierarchical), or more passes between them
            than the map.
    """
    name = type(net).__name__
    info = getattr(net.feature_info, "info", net.feature_info)
    names = [entry["module"] for entry in info]
    reductions = [int(entry["reduction"]) for entry in info]
    stems = [stem for stem in _STEMS if len(names) == 4 and isinstance(getattr(net, stem, None), nn.Module)]
    if stems:
        names, reductions = [stems[0], *names], [reductions[0], *reductions]
    if len(names) < 5 or len(set(reductions[-4:])) < 3:
        raise ValueError(
            f"Dyn-Perceiver reads the maps of a stem and four stages, and {name} has {len(names)} places of reduction "
            f"{reductions}: choose a convolutional or hierarchical network."
        )
    # The last stage ends where the network pools.
    split = Split(net, names[-5:-1], method="forward_features")
    for index, cut in zip(split.feature_index, split.cuts, strict=True):
        if index != 0 or not split.alone or cut.layouts not in (("NCHW",), ("NHWC",)):
            raise ValueError(f"more than one map passes behind {cut.name} of {name}: choose a plainer network.")
    input_size = get_model_input_config(net)["input_size"]
    shape = split.output_shapes[0]
    layouts = ["NCHW", *(cut.layouts[0] for cut in split.cuts), map_layout(net, shape, input_size)]
    pieces = [
        NetworkPiece(net, split, index, layouts[index] == "NHWC", layouts[index + 1] == "NHWC")
        for index in range(len(split))
    ]
    _freeze_unused(net, input_size)
    width = shape[0] if layouts[-1] == "NCHW" else shape[-1]
    return FeatureBranch(
        pieces[0],
        [nn.Sequential(piece) for piece in pieces[1:]],
        [*(cut.width for cut in split.cuts), width],
        reductions[-5],
        reductions[-4:],
    )


def _freeze_unused(net: nn.Module, input_size: tuple[int, ...]) -> None:
    """What only the network's head reads learns nothing here, and says so to those who wait for gradients (DDP)."""
    # Where the caller has switched gradients off, in either way, too.
    with torch.inference_mode(False), torch.enable_grad():
        shadow: TimmModel = traceable_copy(net).requires_grad_(True)
        dtype = next(shadow.parameters()).dtype
        shadow.forward_features(torch.empty((2, *input_size), device="meta", dtype=dtype)).sum().backward()
    for name, parameter in shadow.named_parameters():
        if parameter.grad is None:
            net.get_parameter(name).requires_grad_(False)
