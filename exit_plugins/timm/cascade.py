"""Cascades: trained networks as the exits of one model, without any training.

Each member is an exit. The state is the picture; a member sees it at its own size and in its own normalisation. Two
good checkpoints are an early-exit model this way, and the rival that trained exits must beat.
"""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import generate_default_cfgs, get_model_args, get_model_input_config, group_parameters, register_model
from torch import Tensor, nn

from .._modules import ModuleList
from ..exits.protocol import MultiExit
from ._checkpoints import FEATURE_ARGUMENTS, WholeOrPart
from ._host import TimmModel, model_config, set_model_config, set_model_traits, update_model_args
from ._networks import fuse_network
from ._switches import check_switches
from .kernels import check_evaluating
from .layers import check_has_exits, check_image

__all__ = ["Cascade", "cascade_of"]

torch.fx.wrap("check_image")


def _resize(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """(B, C, H, W) resized by ``mode`` (``bilinear``, ``bicubic``), filtered before it is reduced."""
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        # Engines that run exported graphs filter in ways of their own: there it is two products with matrices.
        rows, columns = _filter(x.shape[2], height, mode, x), _filter(x.shape[3], width, mode, x)
        return rows @ x @ columns.transpose(0, 1)
    # In single precision at least: the filter has no kernels for less on processors.
    half = x.dtype == torch.bfloat16 or x.dtype == torch.float16
    resized = F.interpolate(x.float() if half else x, size=(height, width), mode=mode, antialias=True)
    return resized.to(x.dtype)


@torch.jit.ignore
def _filter(size: int, wanted: int, mode: str, like: Tensor) -> Tensor:
    """Matrix (wanted, size) of the filter that takes ``size`` pixels to ``wanted``; no number of pixels is fixed."""
    pixels = torch.arange(size, device=like.device, dtype=torch.float32)
    scale = (pixels[-1:] + 1) / wanted
    centres = (torch.arange(wanted, device=like.device, dtype=torch.float32) + 0.5) * scale
    d = ((pixels + 0.5 - centres.unsqueeze(1)) / scale.clamp(min=1)).abs()
    if mode == "bilinear":
        weights = (1 - d).clamp(min=0)
    else:  # cubic convolution with a = -0.5
        near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weights = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _to_size(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """``x`` resized unless it has that size already."""
    if not torch.jit.is_scripting() and (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        resizes = True  # a graph must not keep the size that it was made with
    else:
        resizes = x.shape[2] != height or x.shape[3] != width
    return _resize(x, height, width, mode) if resizes else x


torch.fx.wrap("_to_size")  # what it does hangs on the size of the picture


class View(nn.Module):
    """The picture as one member sees it: resized, and normalised as its configuration says.

    Where pictures have another number of channels than the configuration, the mean over its channels holds for all.

    Args:
        size: (height, width) to resize to.
        mode: ``bilinear`` or ``bicubic``; both filter before they reduce.
        scale, shift: Per channel, from the cascade's normalisation to the member's.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, size: tuple[int, int], mode: str, scale: Sequence[float], shift: Sequence[float], **dd: Any
    ) -> None:
        super().__init__()
        self.size, self.mode = size, mode
        self.same = all(abs(a - 1) < 1e-6 and abs(b) < 1e-6 for a, b in zip(scale, shift, strict=True))
        # Plain tensors beside the networks' weights; a state dict holds only what was trained.
        self.register_buffer("scale", torch.tensor(scale, **dd).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift, **dd).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        x = _to_size(x, self.size[0], self.size[1], self.mode)
        return x if self.same else x * self.scale + self.shift


class Cascade(MultiExit, nn.Module):
    """Networks of the same classes, cheap to dear, as the exits of one model.

    Images come as the last member's configuration says (``pretrained_cfg`` of the cascade: size, mean, standard
    deviation). In evaluation ``forward`` gives the last exit's logits; without averaging it runs the last member alone.

    Args:
        networks: Classification networks. One that is meant twice (at several sizes) is given twice.
        sizes: For each, the size its pictures are resized to, (height, width) or one number for squares; None for the
            size of its own configuration. One network and several sizes: the network at each of them.
        average: Answer with the mean of the logits of the members so far, instead of this member's own.

    Raises:
        ValueError: Classes, channels or sizes do not agree; the message says which.
    """

    exit_loss = "msdnet"  # every member learns for itself
    fused = False
    __constants__ = ("average",)

    def __init__(
        self,
        networks: Sequence[TimmModel],
        sizes: Sequence[int | tuple[int, int] | None] | None = None,
        average: bool = False,
    ) -> None:
        super().__init__()
        networks = list(networks)
        if len(networks) == 1 and sizes is not None:
            networks *= len(sizes)
        if len(networks) < 2:
            raise ValueError("a cascade has two members or more; give networks, or one network and several sizes.")
        if sizes is None:
            sizes = [None] * len(networks)
        if len(sizes) != len(networks):
            raise ValueError(f"{len(sizes)} sizes do not fit {len(networks)} networks; give one for each.")
        _check_members(networks)
        self.sizes = tuple(_size_of(net, size) for net, size in zip(networks, sizes, strict=True))
        # A network that is a member at several sizes is there once; the last one stands last.
        distinct = [
            net for index, net in enumerate(networks) if not any(net is other for other in networks[index + 1 :])
        ]
        self.networks = ModuleList(distinct)
        self.member_network = tuple(next(i for i, other in enumerate(distinct) if other is net) for net in networks)
        check_switches(Cascade, {"average": average})
        self.average = average
        self.num_exits = len(networks)
        self.num_classes = networks[-1].num_classes
        self.in_chans = get_model_input_config(networks[-1])["input_size"][0]
        self.num_features = networks[-1].num_features
        self.head_hidden_size = getattr(networks[-1], "head_hidden_size", self.num_features)
        self.views = nn.ModuleList(
            _view(net, networks[-1], size) for net, size in zip(networks, self.sizes, strict=True)
        )
        prefix = f"networks.{len(distinct) - 1}."
        self.feature_info = [
            {**info, "module": prefix + info["module"]} if "module" in info else info
            for info in getattr(networks[-1].feature_info, "info", networks[-1].feature_info)
        ]
        self.train(networks[-1].training)

    # The protocol

    def begin_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        """State before the first member: the pictures (B, C, H, W), checked."""
        check_has_exits(self.num_exits)
        return (check_image(x, self.in_chans, 1),)

    def forward_exit(self, index: int, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (B, num_classes) of member ``index`` and the state: pictures, and with averaging the sum of logits."""
        if not 0 <= index < self.num_exits:
            raise IndexError(f"this model has exits 0 to {self.num_exits - 1}, got {index}.")
        x = state[0]
        logits = self.networks[self.member_network[index]](self.views[index](x))
        last = index == self.num_exits - 1
        if not self.average:
            return logits, () if last else (x,)
        total = logits if index == 0 else state[1] + logits
        return total / (index + 1), () if last else (x, total)

    def forward(self, x: Tensor):
        """Logits of the last exit in evaluation, the tuple of every exit's in training."""
        if self.training and self.num_exits > 0 and not torch.jit.is_scripting():
            return self.forward_exits(x)
        if self.average:
            return self._mean_logits(x)
        return self.networks[-1](self.views[-1](x))

    @torch.jit.ignore
    def fuse(self) -> "Cascade":
        """Put every member's form for inference in place, with the same outputs up to rounding; return ``self``.

        Batch norms are folded where a trace shows what reads them: a member that cannot be traced keeps its own. The
        state dict changes with it.

        Raises:
            RuntimeError: The model is in training mode.
        """
        check_evaluating(self)
        if not self.fused:
            self.fused = True
            for net in self.networks:
                fuse_network(net)
        return self

    @torch.jit.ignore
    def _mean_logits(self, x: Tensor) -> Tensor:
        return self.forward_exits(x)[-1]

    # What timm's tools ask of a model: of all members what concerns weights, of the last what concerns features

    def forward_features(self, x: Tensor) -> Tensor:
        return self.networks[-1].forward_features(self.views[-1](x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.networks[-1].forward_head(x, pre_logits=pre_logits)

    @torch.jit.ignore
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The last member's own."""
        return self.networks[-1].forward_intermediates(self.views[-1](x), *args, **kwargs)

    @torch.jit.ignore
    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """The last member's own; the other members go with it."""
        kept = self.networks[-1].prune_intermediate_layers(*args, **kwargs)
        for index in range(len(self.networks) - 1):
            self.networks[index] = nn.Identity()
        self.num_exits = 0
        return kept

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        found = [net.get_classifier() for net in self.networks]
        return nn.ModuleList([m for item in found for m in (item if isinstance(item, (tuple, list)) else [item])])

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give every member a new classifier for ``num_classes``, 0 for none."""
        if num_classes > 0:
            check_has_exits(self.num_exits)
        if num_classes == 0 and self.average:
            raise ValueError("features of different networks cannot be averaged: num_classes=0 asks for average=False.")
        for net in self.networks:
            net.reset_classifier(num_classes, **({} if global_pool is None else {"global_pool": global_pool}))
        self.num_classes = num_classes

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for net in self.networks:
            net.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Groups of layers for layer-wise learning rates: those of every member, all classifiers in the last."""
        groups = [group_parameters(net, net.group_matcher(coarse=coarse), reverse=True) for net in self.networks]
        last = max(max(own.values(), default=0) for own in groups)

        def group(name: str) -> tuple[float, ...]:
            _, index, key = name.split(".", 2)
            own = groups[int(index)]
            layer = own.get(key, last)
            return (last if layer == max(own.values()) else layer,)

        return group

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {
            f"networks.{index}.{name}"
            for index, net in enumerate(self.networks)
            for name in getattr(net, "no_weight_decay", set)()
        }


def _check_members(networks: Sequence[TimmModel]) -> None:
    for net in networks:
        if isinstance(net, MultiExit):
            raise ValueError(f"{type(net).__name__} has exits of its own; a cascade is of networks with one answer.")
        if getattr(net, "num_classes", None) is None:
            raise ValueError(f"expected timm classification models, got a {type(net).__name__}.")
    classes = [net.num_classes for net in networks]
    if len(set(classes)) > 1:
        raise ValueError(f"the members of a cascade know the same classes, and these have {classes} of them.")
    names = {tuple(labels) for labels in map(_labels, networks) if labels}
    if len(names) > 1:
        raise ValueError("the members of a cascade know the same classes in the same order, and their labels differ.")
    channels = [get_model_input_config(net)["input_size"][0] for net in networks]
    if len(set(channels)) > 1:
        raise ValueError(f"the members of a cascade see the same pictures, and these take {channels} channels.")


def _labels(net: nn.Module) -> Any:
    return model_config(net).get("label_names")


def _size_of(net: nn.Module, size: int | tuple[int, int] | None) -> tuple[int, int]:
    config = get_model_input_config(net)
    own = tuple(config["input_size"][1:])
    if size is None:
        return own
    wanted = (size, size) if isinstance(size, int) else tuple(size)
    if len(wanted) != 2 or min(wanted) < 1:
        raise ValueError(f"a size is a number of pixels, or (height, width); got {wanted}.")
    if config["fixed_input_size"] and wanted != own:
        raise ValueError(
            f"{type(net).__name__} takes images of {own} only, not of {wanted}: build it with img_size={wanted}."
        )
    return wanted


def _view(net: nn.Module, last: nn.Module, size: tuple[int, int]) -> View:
    ours, theirs = resolve_model_data_config(last), resolve_model_data_config(net)
    mode = theirs["interpolation"] if theirs["interpolation"] in ("bilinear", "bicubic") else "bilinear"
    channels = get_model_input_config(net)["input_size"][0]

    def of_channels(values: Sequence[float]) -> list[float]:
        return list(values) if len(values) == channels else [sum(values) / len(values)] * channels

    mean, std, own_mean, own_std = (of_channels(config[key]) for config in (ours, theirs) for key in ("mean", "std"))
    scale = [a / b for a, b in zip(std, own_std, strict=True)]
    shift = [(a - b) / s for a, b, s in zip(mean, own_mean, own_std, strict=True)]
    weight = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    return View(size, mode, scale, shift, device=weight.device, dtype=weight.dtype)


def cascade_of(
    networks: Sequence[nn.Module],
    sizes: Sequence[int | tuple[int, int] | None] | None = None,
    average: bool = False,
) -> Cascade:
    """Trained networks as the exits of one model, with no training.

    ``exit_plugins.cascade([small, large], sizes=(96, 224))``; by names it is ``timm.create_model("cascade", ...)``.

    Args:
        networks, sizes, average: See ``Cascade``.
    """
    model = Cascade(networks, sizes, average)
    set_model_config(model, _configuration(model))
    _remember(model)
    return model


def _reduction(net: TimmModel) -> int:
    """By how much a side of the last map of ``net`` is smaller than the picture's."""
    return getattr(net.feature_info, "info", net.feature_info)[-1]["reduction"]


def _configuration(model: Cascade) -> dict[str, Any]:
    """The last member's pretrained configuration, as the cascade has it."""

    def all_names(key: str) -> tuple[str, ...]:
        names = []
        for index, net in enumerate(model.networks):
            found = net.pretrained_cfg.get(key) or ()
            names += [f"networks.{index}.{name}" for name in ([found] if isinstance(found, str) else found)]
        return tuple(names)

    kept = ("num_classes", "interpolation", "mean", "std", "crop_pct", "crop_mode", "label_names", "license")
    cfg = {key: value for key, value in model.networks[-1].pretrained_cfg.items() if key in kept}
    last = model.networks[-1]
    if last.pretrained_cfg.get("pool_size") and len(last.feature_info):
        cfg["pool_size"] = tuple(-(-side // _reduction(last)) for side in model.sizes[-1])
    return cfg | {
        "architecture": "cascade",
        "input_size": (model.networks[-1].pretrained_cfg["input_size"][0], *model.sizes[-1]),
        "classifier": all_names("classifier"),
        "first_conv": all_names("first_conv"),
    }


def _remember(model: Cascade) -> None:
    """Keep what timm needs to build ``model`` again from a saved folder."""
    set_model_traits(model, {"first_conv": _configuration(model)["first_conv"], "fixed_input_size": False})
    members = [model.networks[index] for index in model.member_network]
    arguments = [get_model_args(net) for net in members]
    shared = {key: value for key, value in arguments[0].items() if all(a.get(key) == value for a in arguments)}
    own = [{key: value for key, value in a.items() if key not in shared} for a in arguments]
    update_model_args(
        model,
        **shared,
        members=[net.pretrained_cfg.get("architecture") for net in members],
        member_args=own,
        one_network=len(model.networks) == 1,
        sizes=[list(size) for size in model.sizes],
        average=model.average,
    )


def _create_cascade(
    variant: str,
    pretrained: bool,
    members: str | Sequence[str],
    sizes: Sequence[int | tuple[int, int] | None] | None = None,
    average: bool = False,
    member_args: Sequence[dict[str, Any]] | None = None,
    one_network: bool | None = None,
    checkpoints: Sequence[str | None] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> Any:
    features = {key: kwargs.pop(key) for key in FEATURE_ARGUMENTS if key in kwargs}
    names = [name.strip() for name in members.split(",")] if isinstance(members, str) else list(members)
    if one_network:
        names = names[:1]
    count = len(names)
    for what, given in (("member_args", member_args), ("checkpoints", checkpoints)):
        if given is not None and len(given) < count:
            raise ValueError(f"{len(given)} {what} do not fit {count} members; give one for each.")
    source = WholeOrPart.find("networks.", variant, pretrained, pretrained_cfg, pretrained_cfg_overlay)
    networks = [
        timm.create_model(
            name,
            source.of_part,
            pretrained_cfg_overlay=source.part_overlay,
            checkpoint_path=(checkpoints[index] if checkpoints else None) or "",
            cache_dir=cache_dir,
            **{**kwargs, **(member_args[index] if member_args else {})},
        )
        for index, name in enumerate(names)
    ]
    model = Cascade(networks, sizes, average)
    _remember(model)
    return source.build(model, variant, _configuration(model), cache_dir, **features)


default_cfgs = generate_default_cfgs({"cascade.untrained": {}, "cascade_test.untrained": {}})


@register_model
def cascade(pretrained: bool = False, members: str | Sequence[str] = "resnet18,resnet50", **kwargs: Any) -> Cascade:
    """Networks of timm as the exits of one model.

    Args:
        pretrained: Load the members' pretrained weights.
        members: Their names, cheap to dear; one string with commas will do.
        kwargs: ``sizes`` and ``average``, see ``Cascade``; ``checkpoints``: a file of weights for each member;
            ``member_args``: further arguments for each; all others go to every member.
    """
    return _create_cascade("cascade", pretrained, members, **kwargs)


@register_model
def cascade_test(pretrained: bool = False, **kwargs: Any) -> Cascade:
    """Two very small networks at two sizes, for tests and first steps."""
    args: dict[str, Any] = {}
    if "members" not in kwargs:
        args = {"members": "test_efficientnet,test_resnet", "sizes": (32, 64)}
        args["member_args"] = ({}, {"zero_init_last": False})
    return _create_cascade("cascade_test", pretrained, **{**args, **kwargs})
