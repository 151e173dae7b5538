"""The classifier of an early exit on a network somebody else wrote, whatever the module it stands behind returned."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from .split import Cut, pool_features

__all__ = ["HEADS", "EarlyHead"]

HEADS = ("linear", "mlp", "conv")


class EarlyHead(nn.Module):
    """Classifier of an early exit: from what a module of the network returned, (B, num_classes).

    Args:
        cut: Where it stands.
        num_classes: Classes; 0 gives what the last linear layer would read.
        kind: ``linear``: mean over positions, norm, linear layer. ``mlp``: a hidden layer (GELU) in between. ``conv``:
            a 3x3 convolution with stride 2, norm and activation before the mean; on maps only. The norm is a batch norm
            behind maps, which folds into the linear layer, and a layer norm behind tokens.
        hidden: Width of the hidden layer, or of the convolution; the default is that of what it reads.
        drop_rate: Dropout before the last linear layer.
    """

    def __init__(
        self,
        cut: Cut,
        num_classes: int,
        kind: str = "linear",
        hidden: int | None = None,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cut = cut
        width = cut.width
        self.convs = nn.ModuleList()
        if kind == "conv":
            if not set(cut.layouts) <= {"NCHW", "NHWC"}:
                raise ValueError(
                    f"a conv head reads maps, and {cut.name} gives {', '.join(cut.layouts)} of shape "
                    f"{', '.join(map(str, cut.shapes))}: use head='linear' or 'mlp'."
                )
            self.convs.extend(ConvNormAct(w, hidden or w, 3, stride=2, **dd) for w in cut.widths)
            width = sum(hidden or w for w in cut.widths)
            self.norm: nn.Module = nn.Identity()
        else:
            norm: type[nn.Module] = nn.LayerNorm if "NLC" in cut.layouts else nn.BatchNorm1d
            self.norm = norm(width, **dd)
        self.mlp: nn.Module = nn.Identity()
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(width, hidden or width, **dd), nn.GELU())
            width = hidden or width
        self.drop = nn.Dropout(drop_rate)
        self.width = width
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes, **dd)

    def reset(self, num_classes: int, device: Any = None, dtype: Any = None) -> None:
        """A new last layer."""
        self.fc = nn.Identity()
        if num_classes:
            self.fc = fc = nn.Linear(self.width, num_classes, device=device, dtype=dtype)
            nn.init.trunc_normal_(fc.weight, std=0.02)
            nn.init.zeros_(fc.bias)
        self.fc.train(self.training)

    @torch.jit.ignore  # scripted models run the network alone
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        if len(self.convs):
            maps = [
                conv(x if layout == "NCHW" else x.permute(0, 3, 1, 2))
                for conv, x, layout in zip(self.convs, features, self.cut.layouts, strict=True)
            ]
            x = torch.cat([m.mean((2, 3)) for m in maps], dim=1)
        else:
            x = pool_features(features, self.cut)
        return self.fc(self.drop(self.mlp(self.norm(x))))
