"""The layers of networks that hold maps at several scales at once: a stem, layers of dense connections, exits."""

from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from .._modules import ModuleDict, ModuleList
from ._scale_plan import LayerPlan
from .layers import check_image

__all__ = ["DenseLayer", "DenseScale", "MapExitHead", "MultiScaleStem", "ScalesLayer"]

torch.fx.wrap("check_image")  # a leaf for FX tracing, where shapes are not known


class MultiScaleStem(nn.Module):
    """Images to the first maps: ``finest``, then one stride-2 convolution per coarser scale."""

    def __init__(self, in_chans: int, finest: nn.Module, coarser: Sequence[nn.Module], returns: Sequence[int]) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.finest = finest
        self.coarser = ModuleList(coarser)
        self.keep(returns)

    def keep(self, returns: Sequence[int]) -> None:
        """Return the maps of these scales alone, and drop the convolutions behind the last of them."""
        self.returns = list(returns)
        self.coarser = self.coarser[: max(returns)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.finest(check_image(x, self.in_chans, 1))
        maps = [x]
        for conv in self.coarser:
            x = conv(x)
            maps.append(x)
        return [maps[scale] for scale in self.returns]


class DenseScale(nn.Module):
    """One scale of a layer: appends new features to the running concatenation.

    ``normal`` (h in CHASE's eq. 1) reads the scale's own map, ``down`` (f), where there is one, the next finer scale's.
    """

    def __init__(
        self, normal: nn.Module, down: nn.Module | None, transition: nn.Module, drop_path: float, fuses_new: bool
    ) -> None:
        super().__init__()
        self.down = down
        self.normal = normal
        self.transition = transition
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.fuses_new = fuses_new
        # Where the maps lie in the lists that the layer hands over; set by DenseLayer.keep.
        self.own = 0
        self.finer = 0
        self.computed = 0
        self.returned = True

    def forward(self, maps: list[Tensor], new: list[Tensor]) -> Tensor:
        x = maps[self.own]
        features = [x]
        if self.down is not None:
            finer = new[self.finer] if self.fuses_new else maps[self.finer]
            features.append(self.drop_path(self.down(finer)))
        features.append(self.drop_path(self.normal(x)))
        return torch.cat(features, dim=1)


class ScalesLayer(nn.Module):
    """One layer over all scales: a list of maps in, a list of maps out, fine to coarse in both."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def keep(self, plan: LayerPlan) -> None:
        """Compute and return what ``plan``, a trimmed form of the layer's own, says, and drop the rest."""

    def compute(self, maps: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.compute, maps)
        return self.compute(maps)


class DenseLayer(ScalesLayer):
    """The layer of dense connections, one ``DenseScale`` for each scale it computes."""

    def __init__(self, scales: dict[int, DenseScale], plan: LayerPlan) -> None:
        super().__init__()
        self.scales = ModuleDict({str(scale): module for scale, module in scales.items()})
        self.keep(plan)

    def keep(self, plan: LayerPlan) -> None:
        for key in [key for key in self.scales if int(key) not in plan.computes]:
            del self.scales[key]
        for key, module in self.scales.items():
            scale = int(key)
            module.own = plan.reads.index(scale)
            module.computed = plan.computes.index(scale)
            if scale in plan.fuses:
                module.finer = (plan.computes if module.fuses_new else plan.reads).index(scale - 1)
            module.returned = scale in plan.returns
            if not module.returned:
                module.transition = nn.Identity()

    def compute(self, maps: list[Tensor]) -> list[Tensor]:
        new: list[Tensor] = []
        for scale in self.scales.values():
            new.append(scale(maps, new))
        kept: list[Tensor] = []
        for scale in self.scales.values():
            if scale.returned:
                kept.append(scale.transition(new[scale.computed]))
        return kept


class MapExitHead(nn.Module):
    """One exit of maps: convolutions on the coarsest, pooling, dropout, linear classifier."""

    def __init__(
        self, convs: nn.Module, width: int, num_classes: int, global_pool: str, drop_rate: float, **dd
    ) -> None:
        super().__init__()
        self.convs = convs
        self.classifier = ClassifierHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.convs(x))
