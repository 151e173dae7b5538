"""CHASE: MSDNet's skeleton with channel attention in every layer and self-attention before the last exit.

Paper: `CHASE: Channel-Wise and Spatial Attention for Early Exiting in Image Classification`, Addad, Lechervy, Jurie.
No code was published with it, so two kinds of things meet here.

The paper fixes: the skeleton of MSDNet; the order of the stem's parts (section II); what every function reads (eq. 1,
table I); the transition between two blocks, 1x1 convolution, batch norm and GELU to half the width (eq. 3), and that an
exit between two blocks reads what comes after it (section II-C); channel attention in front of every function, its
parts and r = 2 (II-B, eq. 4); global attention on the coarsest map of the last block, with conditional position
encoding (II-A); the parts of an exit and the unweighted loss (II-C, eq. 5).

We chose what it does not print, so that the published costs are met: numbers of exits and layers, widths and growth;
inside global attention its width, kernels of 7, an expansion of 2, LayerScale from 1e-5 and heads of 32 channels, and
that it stands in the place of the dense layers of its block; the kernels of the exits' convolutions. Published are 2.15
and 2.6 G at the last two exits on ImageNet, and curves through 27 M and 55 M on CIFAR.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, ConvNormAct, DropPath, LayerScale2d, SqueezeExcite
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._checkpoints import build_with_checkpoint
from ._multiscale import MultiScaleNet, cifar_cfg, imagenet_cfg
from ._scale_layers import ScalesLayer
from ._scale_plan import LayerPlan

__all__ = ["CHASE"]


class ChaseStem(nn.Module):
    """Four convolutions, a residual connection over the middle two; divides the resolution by 2 * ``stride``."""

    def __init__(self, in_chans: int, width: int, stride: int, **kwargs) -> None:
        super().__init__()
        self.first = ConvNormAct(in_chans, width, 3, stride=stride, **kwargs)
        self.depthwise = ConvNormAct(width, width, 3, groups=width, **kwargs)
        self.pointwise = ConvNormAct(width, width, 1, **kwargs)
        self.down = ConvNormAct(width, width, 3, stride=2, groups=width, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.down(x + self.pointwise(self.depthwise(x)))


class ConvFFN(nn.Module):
    """Feed-forward part of a block: depthwise 7x7 convolution, then two 1x1 ones with twice the width between them."""

    def __init__(self, dim: int, act_layer: type[nn.Module], **dd) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(dim, dim, 7, groups=dim, apply_act=False, **dd)
        self.fc1 = nn.Conv2d(dim, 2 * dim, 1, **dd)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(2 * dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.depthwise(x))))


class AttentionBlock(nn.Module):
    """MetaFormer block on a feature map: self-attention over all positions, then ``ConvFFN``, both scaled residuals."""

    def __init__(self, dim: int, head_dim: int, drop_path: float, act_layer: type[nn.Module], **dd) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, num_heads=dim // head_dim, **dd)
        self.scale1 = LayerScale2d(dim, 1e-5, **dd)
        self.ffn = ConvFFN(dim, act_layer, **dd)
        self.scale2 = LayerScale2d(dim, 1e-5, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attn(self.norm(x).flatten(2).transpose(1, 2))
        x = x + self.drop_path(self.scale1(tokens.transpose(1, 2).reshape(x.shape)))
        return x + self.drop_path(self.scale2(self.ffn(x)))


class GlobalAttentionLayer(ScalesLayer):
    """GAL (section II-A): reads the coarsest map alone and ends in ``dim`` channels, in place of the last dense layers.

    Positions are encoded by what lies around them (conditional position encoding): a depthwise 7x7 convolution.
    """

    def __init__(
        self,
        in_chs: int,
        dim: int,
        head_dim: int,
        drop_paths: Sequence[float],
        act_layer: type[nn.Module],
        **dd,
    ) -> None:
        super().__init__()
        self.reduce = ConvNormAct(in_chs, dim, 3, act_layer=act_layer, **dd)
        self.position = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.blocks = nn.Sequential(*(AttentionBlock(dim, head_dim, rate, act_layer, **dd) for rate in drop_paths))

    def compute(self, maps: list[Tensor]) -> list[Tensor]:
        x = self.reduce(maps[-1])
        return [self.blocks(x + self.position(x))]


class CHASE(MultiScaleNet):
    """Early-exit network with channel-wise and spatial attention.

    Args:
        cam: channel attention (CAM, section II-B) in front of every function of every dense layer.
        cam_reduction: r, what the channels are divided by inside CAM.
        gal: global attention (GAL, section II-A) instead of the last block's dense layers, as many blocks as layers.
        gal_blocks: how many of the last blocks are global attention; 2 is the most costly curve of figure 5. Each of
            them reads what the one before returns.
        attn_dim: width of GAL, a multiple of ``head_dim``.
        head_dim: width of one attention head.
        kwargs: the arguments of ``MultiScaleNet``.
    """

    exit_loss = "chase"  # eq. 5
    fuses_new = True
    drops_between = True
    act_layer = nn.GELU

    def __init__(
        self,
        *,
        cam: bool = True,
        cam_reduction: int = 2,
        gal: bool = True,
        gal_blocks: int = 1,
        attn_dim: int = 384,
        head_dim: int = 32,
        **kwargs,
    ) -> None:
        if cam_reduction < 1:
            raise ValueError(f"cam_reduction must be at least 1, got {cam_reduction}.")
        if gal and (head_dim < 1 or attn_dim < 1 or attn_dim % head_dim):
            raise ValueError(f"attn_dim must be a multiple of head_dim, got {attn_dim} and {head_dim}.")
        if gal and gal_blocks < 1:
            raise ValueError(f"gal_blocks must be at least 1, got {gal_blocks}; for no global attention say gal=False.")
        if gal and kwargs.get("blocks", 5) <= gal_blocks:
            raise ValueError(
                "global attention takes the place of the last blocks and needs one before them: blocks > gal_blocks, "
                f"got {kwargs.get('blocks', 5)} and {gal_blocks}."
            )
        # Plain values, read while the skeleton builds itself.
        self.cam_reduction = cam_reduction if cam else 0
        self.gal_blocks = gal_blocks if gal else 0
        self.attn_dim = attn_dim
        self.head_dim = head_dim
        super().__init__(**kwargs)

    def _plan(self, plans: list[LayerPlan], wanted: list[set[int]], steps: list[int]) -> None:
        # The layers that GAL replaces count when it is settled where scales are dropped.
        self.gal_steps = steps[len(steps) - self.gal_blocks :]
        self.dense_layers = len(plans) - sum(self.gal_steps)
        super()._plan(plans[: self.dense_layers], wanted[: self.dense_layers], steps)
        coarsest, width = (len(self.growth_factors) - 1,), plans[self.dense_layers - 1].out_width
        for position in range(self.gal_blocks):
            self.exit_layers[position - self.gal_blocks] = self.dense_layers + position
            self.plans.append(LayerPlan(coarsest, coarsest, coarsest, (), width, width))

    def _make_stem(self, width: int, dd: dict[str, Any]) -> tuple[nn.Module, int]:
        stride = 1 if self.form == "cifar" else 2
        return ChaseStem(self.in_chans, width, stride, act_layer=self.act_layer, **dd), 2 * stride

    def _make_branch(self, in_chs: int, out_chs: int, factor: int, stride: int, dd: dict[str, Any]) -> nn.Sequential:
        branch = nn.Sequential()
        if self.cam_reduction:
            hidden = max(in_chs // self.cam_reduction, 1)
            branch.add_module("cam", SqueezeExcite(in_chs, rd_channels=hidden, act_layer=self.act_layer, **dd))
        for name, module in super()._make_branch(in_chs, out_chs, factor, stride, dd).named_children():
            branch.add_module(name, module)
        return branch

    def _make_layer(self, index: int, plan: LayerPlan, rates: Sequence[float], dd: dict[str, Any]) -> ScalesLayer:
        if index >= self.dense_layers:
            position = index - self.dense_layers
            first = self.dense_layers + sum(self.gal_steps[:position])
            rates = rates[first : first + self.gal_steps[position]]
            in_chs = self._channels(index - 1, len(self.growth_factors) - 1)
            return GlobalAttentionLayer(in_chs, self.attn_dim, self.head_dim, rates, self.act_layer, **dd)
        return super()._make_layer(index, plan, rates, dd)

    def _make_head(self, in_chs: int, width: int, dd: dict[str, Any]) -> nn.Module:
        kernel, stride = (3, 2) if self.form == "cifar" else (1, 1)
        return nn.Sequential(self._conv(in_chs, width, kernel, stride=stride, **dd), self._conv(width, width, 1, **dd))

    def _channels(self, layer: int, scale: int) -> int:
        if layer >= self.dense_layers:
            return self.attn_dim
        return super()._channels(layer, scale)


def _create_chase(variant: str, pretrained: bool = False, **kwargs) -> CHASE:
    return build_with_checkpoint(
        CHASE,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["growth_factors"]))), feature_cls="getter"),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "chase_step5.untrained": imagenet_cfg(8, "stem.finest.first.conv", pool_size=(7, 7)),
        "chase_cifar.untrained": cifar_cfg(7, "stem.finest.first.conv"),
        "chase_test.untrained": cifar_cfg(3, "stem.finest.first.conv"),
    }
)


@register_model
def chase_step5(pretrained: bool = False, **kwargs) -> CHASE:
    """CHASE for ImageNet: 8 exits, 5 layers between them."""
    args = dict(
        form="imagenet", growth_factors=(1, 2, 4, 4), blocks=8, base=5, step=5, width=32, growth=12, attn_dim=384
    )
    return _create_chase("chase_step5", pretrained, **dict(args, **kwargs))


_CIFAR = dict(form="cifar", growth_factors=(1, 2, 4))


@register_model
def chase_cifar(pretrained: bool = False, **kwargs) -> CHASE:
    """CHASE for CIFAR: 7 exits."""
    args = dict(_CIFAR, blocks=7, base=4, step=2, width=32, growth=12, head_width=128, attn_dim=192)
    return _create_chase("chase_cifar", pretrained, **dict(args, **kwargs))


@register_model
def chase_test(pretrained: bool = False, **kwargs) -> CHASE:
    """A very small CHASE for 32-pixel images, for tests and first steps."""
    args = dict(_CIFAR, blocks=3, base=3, step=2, width=8, growth=4, head_width=32, attn_dim=32, head_dim=16)
    return _create_chase("chase_test", pretrained, **dict(args, **kwargs))
