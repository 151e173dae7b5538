"""MSDNet: multi-scale dense networks with early exits.

Paper: `Multi-Scale Dense Networks for Resource Efficient Image Classification`, Huang et al., ICLR 2018.

The skeleton is that of ``_multiscale``, which CHASE shares; here are the paper's stem and exits, the networks of its
experiments, and the layout of the public implementation's weights.
"""

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._checkpoints import build_with_checkpoint, unwrap_state_dict
from ._multiscale import MultiScaleNet, cifar_cfg, imagenet_cfg
from ._shipped import shipped_weights

__all__ = ["MSDNet"]


class MSDNet(MultiScaleNet):
    """Multi-scale dense network; the arguments are those of ``MultiScaleNet``."""

    exit_loss = "msdnet"  # section 4: every exit weighs the same

    def _make_stem(self, width: int, dd: dict[str, Any]) -> tuple[nn.Module, int]:
        if self.form == "cifar":
            return nn.Sequential(self._conv(self.in_chans, width, 3, **dd)), 1
        return nn.Sequential(
            self._conv(self.in_chans, width, 7, stride=2, **dd), nn.MaxPool2d(3, stride=2, padding=1)
        ), 4

    def _make_head(self, in_chs: int, width: int, dd: dict[str, Any]) -> nn.Module:
        # At the native sizes these leave a 2x2 map, so that the pooling of the paper, 2x2, is a global one.
        return nn.Sequential(self._conv(in_chs, width, 3, stride=2, **dd), self._conv(width, width, 3, stride=2, **dd))


# Where the public implementation keeps the convolution and the norm of a single unit, and of a layer's function.
_UNIT = {"0": "conv", "1": "bn"}
_PLAIN_BRANCH = {"0": "conv.conv", "1": "conv.bn"}
_BOTTLENECK_BRANCH = {"0": "reduce.conv", "1": "reduce.bn", "3": "conv.conv", "4": "conv.bn"}


def _rename(key: str, names: dict[str, str]) -> str:
    """``net.0.weight`` (the ``net.`` is missing in the ImageNet stem) with its position looked up in ``names``."""
    position, name = key.removeprefix("net.").split(".")
    return f"{names.get(position, position)}.{name}"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: "MSDNet") -> dict[str, Any]:
    """Rename the keys of the public implementation; files of this package pass through.

    There a block is one sequence of stem (in the first block), layers and transitions, told apart by the names inside
    them, and within each the scales are counted from the finest one still kept.
    """
    state_dict = unwrap_state_dict(state_dict)
    if not any(key.startswith("blocks.") for key in state_dict):
        return state_dict
    branch = _BOTTLENECK_BRANCH if model.bottleneck_factors else _PLAIN_BRANCH
    items: dict[tuple[int, int], dict[str, Any]] = {}
    renamed = {}
    for key, value in state_dict.items():
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.(.+)", key):
            items.setdefault((int(found[1]), int(found[2])), {})[found[3]] = value
        elif found := re.match(r"classifier\.(\d+)\.m\.(\d+)\.(.+)", key):
            renamed[f"heads.{found[1]}.convs.{found[2]}.{_rename(found[3], _UNIT)}"] = value
        elif found := re.match(r"classifier\.(\d+)\.linear\.(.+)", key):
            renamed[f"heads.{found[1]}.classifier.fc.{found[2]}"] = value
        else:
            renamed[key] = value
    for key, value in items.pop((0, 0), {}).items():
        _, scale, rest = key.split(".", 2)
        unit = "finest.0" if scale == "0" else f"coarser.{int(scale) - 1}"
        renamed[f"stem.{unit}.{_rename(rest, _UNIT)}"] = value
    # The first convolution has a bias there on ImageNet, which its batch norm takes away again: the mean absorbs it.
    if (bias := renamed.pop("stem.finest.0.conv.bias", None)) is not None:
        renamed["stem.finest.0.bn.running_mean"] = renamed["stem.finest.0.bn.running_mean"] - bias
    layer = -1
    for position in sorted(items):
        entries = items[position]
        is_layer = any(key.startswith("layers.") for key in entries)
        layer += is_layer
        dropped = len(model.growth_factors) - len({key.split(".")[1] for key in entries})
        for key, value in entries.items():
            _, scale, rest = key.split(".", 2)
            place = int(scale) + dropped
            if layer < len(model.plans) and place not in model.plans[layer].computes:
                continue  # computed there but read by no exit
            if is_layer:
                function, rest = rest.split(".", 1)
                rest = f"{function.removeprefix('conv_')}.{_rename(rest, branch)}"
            else:
                rest = f"transition.{_rename(rest, _UNIT)}"
            renamed[f"layers.{layer}.scales.{place}.{rest}"] = value
    return renamed


def _create_msdnet(variant: str, pretrained: bool = False, **kwargs) -> MSDNet:
    return build_with_checkpoint(
        MSDNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["growth_factors"]))), feature_cls="getter"),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "msdnet_cifar_anytime.untrained": cifar_cfg(7, "stem.finest.0.conv"),
        "msdnet_cifar_batch.untrained": cifar_cfg(5, "stem.finest.0.conv"),
        "msdnet_cifar_batch.cifar100": cifar_cfg(
            5, "stem.finest.0.conv", file=shipped_weights("msdnet_cifar_batch.cifar100")
        ),
        "msdnet_step4.untrained": imagenet_cfg(5, "stem.finest.0.conv", pool_size=(2, 2)),
        "msdnet_step6.untrained": imagenet_cfg(5, "stem.finest.0.conv", pool_size=(2, 2)),
        "msdnet_step7.untrained": imagenet_cfg(5, "stem.finest.0.conv", pool_size=(2, 2)),
        "msdnet_test.untrained": cifar_cfg(3, "stem.finest.0.conv"),
    }
)

_CIFAR = dict(form="cifar", width=16, growth=6, growth_factors=(1, 2, 4), head_width=128)
_IMAGENET = dict(form="imagenet", width=32, growth=16, growth_factors=(1, 2, 4, 4), blocks=5)


@register_model
def msdnet_cifar_anytime(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for CIFAR with exits at even distances (anytime prediction): 7 exits."""
    args = dict(_CIFAR, blocks=7, base=4, step=2)
    return _create_msdnet("msdnet_cifar_anytime", pretrained, **dict(args, **kwargs))


@register_model
def msdnet_cifar_batch(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for CIFAR with exits at growing distances (budgeted batches): 5 exits."""
    args = dict(_CIFAR, blocks=5, base=1, step=1, step_mode="lin_grow")
    return _create_msdnet("msdnet_cifar_batch", pretrained, **dict(args, **kwargs))


@register_model
def msdnet_step4(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for ImageNet, 4 layers a block."""
    return _create_msdnet("msdnet_step4", pretrained, **dict(_IMAGENET | dict(base=4, step=4), **kwargs))


@register_model
def msdnet_step6(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for ImageNet, 6 layers a block."""
    return _create_msdnet("msdnet_step6", pretrained, **dict(_IMAGENET | dict(base=6, step=6), **kwargs))


@register_model
def msdnet_step7(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for ImageNet, 7 layers a block."""
    return _create_msdnet("msdnet_step7", pretrained, **dict(_IMAGENET | dict(base=7, step=7), **kwargs))


@register_model
def msdnet_test(pretrained: bool = False, **kwargs) -> MSDNet:
    """A very small MSDNet for 32-pixel images, for tests and first steps."""
    args = dict(_CIFAR, width=8, growth=4, head_width=32, blocks=3, base=3, step=2)
    return _create_msdnet("msdnet_test", pretrained, **dict(args, **kwargs))
