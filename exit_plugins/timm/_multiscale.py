"""The skeleton that MSDNet and CHASE share: dense layers over several scales, and exits that read the coarsest one.

Every layer holds feature maps at several scales at once, each map a running concatenation of all that came before it
at its scale. The coarsest scale is coarse from the first layer on; finer scales are dropped with depth. Which layer
reads what is planned as data (``_scale_plan``), and the network is built from the plan.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct, calculate_drop_path_rates, get_device_dtype
from torch import Tensor, nn

from .._modules import ModuleList
from ..exits.protocol import MultiExit
from ._host import feature_take_indices
from ._scale_layers import DenseLayer, DenseScale, MapExitHead, MultiScaleStem, ScalesLayer
from ._scale_plan import LayerPlan, plan_layers, trim_plan
from .kernels import check_evaluating
from .layers import fuse_convolutions

__all__ = ["MultiScaleNet", "cifar_cfg", "imagenet_cfg"]

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class MultiScaleNet(MultiExit, nn.Module):
    """The skeleton of MSDNet and CHASE: a stem, dense layers over several scales, exits that read the coarsest one.

    Args:
        num_classes: classes of every exit; 0 for pooled features instead of logits.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling before each classifier; ``""`` for unpooled features (no classes then).
        form: ``imagenet`` (the stem divides the resolution by 4) or ``cifar`` (small images).
        blocks: number of exits, K.
        base: layers of the first block.
        step: layers of each further block, see ``step_mode``.
        step_mode: ``even`` (``step`` layers in every further block) or ``lin_grow`` (``step * i + 1`` in block i).
        width: base channel count of the stem.
        growth: base channel count each layer adds.
        growth_factors: for each scale, fine to coarse, what ``width`` and ``growth`` are multiplied by.
        bottleneck_factors: for each scale, the width of the bottlenecks over that of their output; None for
            ``growth_factors``.
        bottleneck: whether a 1x1 convolution precedes each 3x3 one.
        prune: ``max`` or ``min``: when finer scales are dropped, see ``plan_layers``.
        reduction: factor of the width at a transition; 0 for no transitions.
        head_width: width of the exits' convolutions; None for the width of the map they read.
        drop_rate: dropout before each classifier.
        drop_path_rate: stochastic depth of the layers' new features, rising linearly to this rate at the last layer.

    Shapes: images (B, in_chans, H, W) of any size; logits (B, num_classes). The state between segments is the list of
    the maps that later layers read, fine to coarse; it is empty after the last exit.
    """

    fuses_new = False  # whether a layer's fused features read what the finer scale computes in the same layer
    drops_between = False  # whether scales are dropped between layers or inside one, see ``plan_layers``
    act_layer: type[nn.Module] = nn.ReLU
    fused = False

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        form: str = "imagenet",
        blocks: int = 5,
        base: int = 4,
        step: int = 4,
        step_mode: str = "even",
        width: int = 32,
        growth: int = 16,
        growth_factors: Sequence[int] = (1, 2, 4, 4),
        bottleneck_factors: Sequence[int] | None = None,
        bottleneck: bool = True,
        prune: str = "max",
        reduction: float = 0.5,
        head_width: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        factors = tuple(growth_factors)
        self._check(form, blocks, base, step, step_mode, width, growth, factors, bottleneck_factors)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.form = form
        self.growth = growth
        self.growth_factors = factors
        self.bottleneck_factors = tuple(bottleneck_factors or factors) if bottleneck else None
        self.drop_rate = drop_rate

        steps = [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, blocks)]
        self.num_exits = blocks
        self.exit_layers = [sum(steps[: i + 1]) - 1 for i in range(blocks)]  # the layer each exit reads behind
        num_layers, num_scales = sum(steps), len(factors)
        plans = plan_layers(num_layers, num_scales, width, growth, prune, reduction, self.drops_between)
        wanted = [{num_scales - 1} if layer in self.exit_layers else set() for layer in range(num_layers)]
        self._plan(plans, wanted, steps)

        finest, stem_reduction = self._make_stem(width * factors[0], dd)
        coarser = [
            self._conv(width * factors[s - 1], width * factors[s], 3, stride=2, **dd) for s in range(1, num_scales)
        ]
        self.stem = MultiScaleStem(in_chans, finest, coarser, self.stem_scales)
        rates = cast("list[float]", calculate_drop_path_rates(drop_path_rate, num_layers))
        self.layers = ModuleList(self._make_layer(index, plan, rates, dd) for index, plan in enumerate(self.plans))
        heads = []
        for layer in self.exit_layers:
            channels = self._channels(layer, num_scales - 1)
            head_chs = head_width or channels
            heads.append(
                MapExitHead(
                    self._make_head(channels, head_chs, dd), head_chs, num_classes, global_pool, drop_rate, **dd
                )
            )
        self.heads = ModuleList(heads)
        self.num_features = self.heads[-1].classifier.in_features
        self.head_hidden_size = self.heads[-1].classifier.num_features

        self._find_taps()
        self.feature_info = [
            dict(num_chs=self._channels(layer, s), reduction=stem_reduction * 2**s, module=f"layers.{layer}")
            for s, layer in zip(self.tap_scales, self.tap_layers, strict=True)
        ]
        self.apply(_init_weights)

    @staticmethod
    def _check(form, blocks, base, step, step_mode, width, growth, factors, bottleneck_factors) -> None:
        if form not in ("imagenet", "cifar"):
            raise ValueError(f"form must be 'imagenet' or 'cifar', got {form!r}.")
        if step_mode not in ("even", "lin_grow"):
            raise ValueError(f"step_mode must be 'even' or 'lin_grow', got {step_mode!r}.")
        if min(blocks, base, step, width, growth, *(factors or (0,))) < 1:
            raise ValueError(
                f"blocks, base, step, width, growth and growth_factors must be at least 1, got {blocks}, {base}, "
                f"{step}, {width}, {growth}, {factors}."
            )
        if any(growth * factor % 2 for factor in factors[1:]):
            raise ValueError(
                f"two functions share each coarser scale's new channels: growth * factor must be even, got "
                f"growth={growth} and growth_factors={factors}."
            )
        if bottleneck_factors is not None and len(bottleneck_factors) != len(factors):
            raise ValueError(f"expected {len(factors)} bottleneck_factors, one per scale, got {bottleneck_factors}.")

    # What the architectures differ in -----------------------------------------------------------------------------

    def _plan(self, plans: list[LayerPlan], wanted: list[set[int]], steps: list[int]) -> None:
        """Settle ``self.plans`` and ``self.stem_scales``; ``steps`` are the layers of each block."""
        self.plans, self.stem_scales = trim_plan(plans, wanted, self.fuses_new)

    def _make_stem(self, width: int, dd: dict[str, Any]) -> tuple[nn.Module, int]:
        """The part of the stem that yields the finest map, and what it divides the resolution by."""
        raise NotImplementedError

    def _make_head(self, in_chs: int, width: int, dd: dict[str, Any]) -> nn.Module:
        """The convolutions of one exit, from ``in_chs`` to ``width`` channels."""
        raise NotImplementedError

    def _make_branch(self, in_chs: int, out_chs: int, factor: int, stride: int, dd: dict[str, Any]) -> nn.Sequential:
        """One of a layer's functions: ``factor`` times as wide a bottleneck as its output, then a 3x3 convolution."""
        branch = nn.Sequential()
        if self.bottleneck_factors is not None:
            bottleneck = min(in_chs, factor * out_chs)
            branch.add_module("reduce", self._conv(in_chs, bottleneck, 1, **dd))
            in_chs = bottleneck
        branch.add_module("conv", self._conv(in_chs, out_chs, 3, stride=stride, **dd))
        return branch

    # What they share ----------------------------------------------------------------------------------------------

    def _conv(self, in_chs: int, out_chs: int, kernel: int, stride: int = 1, **kwargs) -> ConvNormAct:
        return ConvNormAct(in_chs, out_chs, kernel, stride=stride, act_layer=self.act_layer, **kwargs)

    def _make_layer(self, index: int, plan: LayerPlan, rates: Sequence[float], dd: dict[str, Any]) -> ScalesLayer:
        """Layer ``index``; ``rates`` are the drop path rates of all layers, in order."""
        scales = {}
        for s in plan.computes:
            factor, total = self.growth_factors[s], self.growth * self.growth_factors[s]
            bottlenecks = self.bottleneck_factors or self.growth_factors
            in_chs, down = plan.in_width * factor, None
            if s in plan.fuses:
                total //= 2
                finer = (plan.in_width + self.growth * self.fuses_new) * self.growth_factors[s - 1]
                down = self._make_branch(finer, total, bottlenecks[s - 1], 2, dd)
            normal = self._make_branch(in_chs, total, bottlenecks[s], 1, dd)
            transition: nn.Module = nn.Identity()
            if plan.transition and s in plan.returns:
                transition = self._conv((plan.in_width + self.growth) * factor, plan.out_width * factor, 1, **dd)
            scales[s] = DenseScale(normal, down, transition, rates[index], self.fuses_new)
        return DenseLayer(scales, plan)

    def _channels(self, layer: int, scale: int) -> int:
        """Channels of the map at ``scale`` behind ``layer``."""
        return self.plans[layer].out_width * self.growth_factors[scale]

    def _find_taps(self) -> None:
        """The feature pyramid: for each scale the last layer that returns it, and where in that layer's list."""
        last = {scale: layer for layer, plan in enumerate(self.plans) for scale in plan.returns}
        self.tap_scales = sorted(last)
        self.tap_layers = [last[scale] for scale in self.tap_scales]
        self.tap_positions = [self.plans[last[scale]].returns.index(scale) for scale in self.tap_scales]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth: one per layer, or with ``coarse`` one per exit's segment; all heads come last."""
        start, blocks = 0, []
        for segment, end in enumerate(self.exit_layers):
            blocks.append((rf"^layers\.(?:{'|'.join(map(str, range(start, end + 1)))})\.", (segment,)))
            start = end + 1
        layers = blocks if coarse else [(r"^layers\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=[*layers, (r"^heads", (99999,))])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for layer in self.layers:
            layer.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.ModuleList:
        """The linear layers of all exits, shallow to deep."""
        return nn.ModuleList(head.classifier.fc for head in self.heads)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers for every exit; ``num_classes=0`` for none, ``global_pool=None`` keeps the pooling."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        for head in self.heads:
            head.classifier.reset(num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.heads[-1].classifier.num_features

    def begin_exits(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to the stem's maps."""
        return self.stem(x)

    def fuse(self) -> "MultiScaleNet":
        """Fold the batch norms and make 1x1 convolutions fast, in place and for inference only; return ``self``.

        The outputs stay the same up to rounding; the state dict changes with it.

        Raises:
            RuntimeError: The model is in training mode.
        """
        check_evaluating(self)
        self.fused = True
        return fuse_convolutions(self)

    def forward_exit(self, index: int, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the layers of segment ``index``; logits (B, num_classes) and the maps that later layers read."""
        if not 0 <= index < self.num_exits:
            raise IndexError(f"exit {index} of a model with exits 0 to {self.num_exits - 1}.")
        start = self.exit_layers[index - 1] + 1 if index else 0
        for layer in range(start, self.exit_layers[index] + 1):
            state = self.layers[layer](state)
        logits = self.heads[index](state[-1])
        return logits, state if index < self.num_exits - 1 else []

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature pyramid: for each scale the last map computed at it, fine to coarse.

        Args:
            x: images (B, C, H, W).
            indices: features to return; the last n if an int, all if None.
            norm: no effect, there is no final normalisation.
            stop_early: run no layer behind the last map asked for.
            output_fmt: ``NCHW``, nothing else.
            intermediates_only: return the list alone, without the final features.

        Returns:
            ``(features, maps)``, features as of ``forward_features`` (of the layers run), or ``maps``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}.")
        take, max_index = feature_take_indices(len(self.tap_layers), indices)
        for feature in take:
            if self.tap_layers[feature] < 0:
                raise ValueError(f"feature {feature} was pruned; the model only has the features it was pruned to.")
        intermediates: list[Tensor] = []
        maps = self.stem(x)
        for i, layer in enumerate(self.layers):
            if not stop_early or i <= self.tap_layers[max_index]:
                maps = layer(maps)
                for feature, tap in enumerate(self.tap_layers):
                    if tap == i and feature in take:
                        intermediates.append(maps[self.tap_positions[feature]])
        if intermediates_only:
            return intermediates
        if stop_early and self.tap_layers[max_index] < len(self.layers) - 1:
            return maps[-1], intermediates
        return self.heads[-1].convs(maps[-1]), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop every layer, scale and exit that the maps ``indices`` of ``forward_intermediates`` do not need.

        What remains is a model with one exit, without convolutions, behind the last layer kept; ``reset_classifier``
        gives it classes. With ``prune_head=False`` all exits stay, and so does every layer.

        Returns:
            The indices, counted from the front.
        """
        take, max_index = feature_take_indices(len(self.tap_layers), indices)
        missing = [feature for feature in take if self.tap_layers[feature] < 0]
        if missing:
            raise ValueError(f"the features {missing} were pruned before.")
        if not prune_head:
            return take
        last = self.tap_layers[max_index]
        wanted: list[set[int]] = [set() for _ in range(last + 1)]
        for feature in take:
            wanted[self.tap_layers[feature]].add(self.tap_scales[feature])
        self.plans, self.stem_scales = trim_plan(self.plans[: last + 1], wanted, self.fuses_new)
        self.stem.keep(self.stem_scales)
        self.layers = self.layers[: last + 1]
        for layer, plan in zip(self.layers, self.plans, strict=True):
            layer.keep(plan)
        for feature, (tap, scale) in enumerate(zip(self.tap_layers, self.tap_scales, strict=True)):
            kept = feature in take
            self.tap_layers[feature] = tap if kept else -1
            self.tap_positions[feature] = self.plans[tap].returns.index(scale) if kept else -1
        self.num_exits, self.exit_layers = 1, [last]
        self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        head = MapExitHead(nn.Identity(), self.num_features, 0, "", self.drop_rate, **get_device_dtype(self))
        self.heads = ModuleList([head]).train(self.training)
        self.num_classes = 0
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features (B, num_features, h, w) of the last exit, its convolutions included."""
        maps = self.stem(x)
        for layer in self.layers:
            maps = layer(maps)
        return self.heads[-1].convs(maps[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of the last exit from ``forward_features``, or with ``pre_logits`` what is pooled."""
        return self.heads[-1].classifier(x, pre_logits=pre_logits)

    def forward(self, x: Tensor):
        """In training the tuple of every exit's logits, in evaluation the last exit's logits (B, num_classes)."""
        if self.training and not torch.jit.is_scripting():
            return self.forward_exits(x)
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def cifar_cfg(exits: int, first_conv: str, **kwargs) -> dict[str, Any]:
    """Default configuration of a model for 32-pixel images with ``exits`` exits."""
    return dict(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(2, 2),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
        first_conv=first_conv,
        classifier=tuple(f"heads.{i}.classifier.fc" for i in range(exits)),
        **kwargs,
    )


def imagenet_cfg(exits: int, first_conv: str, **kwargs) -> dict[str, Any]:
    """Default configuration of a model for ImageNet with ``exits`` exits."""
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=first_conv,
        classifier=tuple(f"heads.{i}.classifier.fc" for i in range(exits)),
        **kwargs,
    )
