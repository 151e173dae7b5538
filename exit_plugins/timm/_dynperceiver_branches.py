"""The convolutional branches of Dyn-Perceiver's paper (tables 5 to 7), of timm's blocks: a stem and four stages."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import ConvNormAct, DropPath, calculate_drop_path_rates, make_divisible
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.resnet import Bottleneck as ResNetBottleneck
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from ._branch import FeatureBranch
from ._host import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite, TimmModel
from .kernels import is_closed
from .layers import add_residual

__all__ = ["FusedRegNetBlock", "mobilenetv3", "regnety", "resnet"]

torch.fx.wrap("add_residual")


def _stage_rates(drop_path_rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Of each stage the rates of its blocks."""
    return cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))


def regnety(
    widths: Sequence[int],
    depths: Sequence[int],
    group_size: int,
    in_chans: int,
    drop_path_rate: float,
    dd: dict[str, Any],
) -> FeatureBranch:
    """RegNet-Y in torchvision's layout: 3x3/2 stem, every stage at stride 2, squeeze 1/4 of a block's input width."""
    stem = ConvNormAct(in_chans, widths[0], 3, stride=2, **dd)
    rates = _stage_rates(drop_path_rate, depths)
    stages = []
    for width_in, width, depth, stage_rates in zip(widths[:-1], widths[1:], depths, rates, strict=True):
        blocks = [
            RegNetBottleneck(
                width if index else width_in,
                width,
                stride=1 if index else 2,
                group_size=group_size,
                drop_path_rate=stage_rates[index],
                **dd,
            )
            for index in range(depth)
        ]
        stages.append(nn.Sequential(*blocks))
    return FeatureBranch(stem, stages, list(widths), 2, [4, 8, 16, 32])


def resnet(width_mult: float, in_chans: int, drop_path_rate: float, dd: dict[str, Any]) -> FeatureBranch:
    """ResNet-50 with every width, the 7x7 stem's included, scaled by ``width_mult``."""
    planes = [int(width_mult * width) for width in (64, 128, 256, 512)]
    depths = [3, 4, 6, 3]
    channels = [planes[0]] + [ResNetBottleneck.expansion * width for width in planes]
    stem = nn.Sequential(
        ConvNormAct(in_chans, channels[0], 7, stride=2, **dd), nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    )
    rates = _stage_rates(drop_path_rate, depths)
    stages = []
    for stage, depth in enumerate(depths):
        blocks = []
        for index in range(depth):
            width_in = channels[stage + 1] if index else channels[stage]
            stride = 2 if stage and not index else 1
            rate = rates[stage][index]
            blocks.append(
                ResNetBottleneck(
                    width_in,
                    planes[stage],
                    stride=stride,
                    downsample=None if index else downsample_conv(width_in, channels[stage + 1], 1, stride, **dd),
                    drop_path=DropPath(rate) if rate > 0 else None,
                    **dd,
                )
            )
        stages.append(nn.Sequential(*blocks))
    return FeatureBranch(stem, stages, channels, 4, [4, 8, 16, 32])


# Kernel, expanded width, output width, squeeze-and-excitation, activation and stride of MobileNetV3-Large's blocks.
_MOBILENETV3_BLOCKS = (
    (3, 16, 16, False, nn.ReLU, 1),
    (3, 64, 24, False, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 1),
    (5, 72, 40, True, nn.ReLU, 2),
    (5, 120, 40, True, nn.ReLU, 1),
    (5, 120, 40, True, nn.ReLU, 1),
    (3, 240, 80, False, nn.Hardswish, 2),
    (3, 200, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 480, 112, True, nn.Hardswish, 1),
    (3, 672, 112, True, nn.Hardswish, 1),
    (5, 672, 160, True, nn.Hardswish, 2),
    (5, 960, 160, True, nn.Hardswish, 1),
    (5, 960, 160, True, nn.Hardswish, 1),
)
_MOBILENETV3_SPLITS = (2, 4, 7, 13, 15)  # blocks in the stem and, cumulatively, up to the end of each stage


def mobilenetv3(width_mult: float, in_chans: int, drop_path_rate: float, dd: dict[str, Any]) -> FeatureBranch:
    """MobileNetV3-Large with torchvision's widths; its last 1x1 convolution belongs to stage 4."""
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)

    def scaled(width: int) -> int:
        return make_divisible(width * width_mult, 8)

    rates = calculate_drop_path_rates(drop_path_rate, len(_MOBILENETV3_BLOCKS))
    blocks: list[nn.Module] = []
    width_in = scaled(16)
    widths = []
    for (kernel, expanded, width, squeeze, act_layer, stride), rate in zip(_MOBILENETV3_BLOCKS, rates, strict=True):
        expanded, width = scaled(expanded), scaled(width)
        se_layer = None
        if squeeze:
            se_layer = partial(
                SqueezeExcite,
                rd_channels=make_divisible(expanded // 4, 8),
                force_act_layer=nn.ReLU,
                gate_layer=nn.Hardsigmoid,
            )
        kwargs = dict(
            dw_kernel_size=kernel,
            stride=stride,
            act_layer=act_layer,
            norm_layer=norm_layer,
            se_layer=se_layer,
            drop_path_rate=rate,
            **dd,
        )
        if expanded == width_in:
            blocks.append(DepthwiseSeparableConv(width_in, width, **kwargs))
        else:
            blocks.append(InvertedResidual(width_in, width, exp_ratio=expanded / width_in, **kwargs))
        width_in = width
        widths.append(width)

    act = dict(norm_layer=norm_layer, act_layer=nn.Hardswish, **dd)
    first, *ends = _MOBILENETV3_SPLITS
    stem = nn.Sequential(ConvNormAct(in_chans, scaled(16), 3, stride=2, **act), *blocks[:first])
    stages = [nn.Sequential(*blocks[start:end]) for start, end in zip((first, *ends[:-1]), ends, strict=True)]
    stages[-1].append(ConvNormAct(width_in, 6 * width_in, 1, **act))
    channels = [widths[end - 1] for end in _MOBILENETV3_SPLITS[:-1]] + [6 * width_in]
    return FeatureBranch(stem, stages, channels, 4, [8, 16, 32, 32], head_width=make_divisible(1280 * width_mult, 8))


class FusedRegNetBlock(nn.Module):
    """What a RegNet-Y block computes once its convolutions are fused: the rest of it in their memory, for inference."""

    @staticmethod
    def replaces(block: TimmModel) -> bool:
        """Whether it may stand for ``block``: only where all batch norms could be folded."""
        kept = [block.conv1.conv, block.conv2.conv, block.conv3.conv, block.se.fc1, block.se.fc2]
        folded = not any(isinstance(part, nn.BatchNorm2d) for part in block.modules())
        return folded and is_closed(block, entered=[*kept, *block.downsample.modules()])

    def __init__(self, block: TimmModel) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block.conv1.conv, block.conv2.conv, block.conv3.conv
        self.squeeze, self.excite = block.se.fc1, block.se.fc2
        self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        y = self.conv2(self.conv1(x).relu_()).relu_()
        gate = self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu_()).sigmoid_()
        return add_residual(self.downsample(x), self.conv3(y.mul_(gate))).relu_()
