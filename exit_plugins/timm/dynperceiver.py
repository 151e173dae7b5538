"""Dyn-Perceiver: a latent branch that classifies early reads a convolutional branch, and informs it in return.

Paper: "Dynamic Perceiver for Efficient Visual Recognition" (Han et al., ICCV 2023). Models are those of its tables 5 to
7; where the paper is silent, the layers follow what the authors' published weights compute, so that these load.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, get_model_input_config, register_model
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.resnet import Bottleneck as ResNetBottleneck
from torch import Tensor, nn

from .._modules import ModuleList
from ..exits.protocol import MultiExit
from ._branch import FeatureBranch, NetworkPiece, network_branch
from ._checkpoints import FEATURE_ARGUMENTS, WholeOrPart, build_with_checkpoint, share_link
from ._dynperceiver_branches import FusedRegNetBlock, mobilenetv3, regnety, resnet
from ._dynperceiver_layers import DynPerceiverStage, KnowledgeTransfer, PooledExitHead
from ._dynperceiver_weights import checkpoint_filter_fn
from ._host import (
    TimmModel,
    feature_take_indices,
    model_config,
    model_traits,
    set_model_traits,
)
from ._networks import fuse_network, groups_of_part
from ._switches import check_switches
from .kernels import check_evaluating
from .layers import (
    check_has_exits,
    check_image,
    fuse_convolutions,
)

__all__ = ["DynPerceiver", "DynPerceiverCfg"]

torch.fx.wrap("check_image")  # a leaf for FX tracing, where shapes are not known


@dataclass(frozen=True)
class DynPerceiverCfg:
    """One network of the paper's tables 5 to 7, and what of it to leave out: the ablations of tables 2 and 3.

    Attributes:
        branch: Builder of the feature branch, one of ``regnety``, ``resnet``, ``mobilenetv3``; or ``network``: the one
            the model is given.
        num_latents: L, latent tokens in stage 1, halved after each of the first three stages; divisible by 8.
        latent_depths: Self-attention blocks in each of the four stages.
        mlp_ratio: Widening factor of the self-attention blocks' MLPs.
        widths: RegNet-Y: stem width and the width of each stage.
        depths: RegNet-Y: blocks in each stage.
        group_size: RegNet-Y: channels in each group of the 3x3 convolutions.
        width_mult: ResNet and MobileNet: multiplier of every width.
        x2z: Latents read the map in every stage; False leaves the cross-attention of stage 1 alone, without which the
            paper's training diverged.
        grid_conv: X2Z reads the map through a depthwise convolution (DWC); False: the averaged map as it is.
        z2x: The map reads the latents behind every stage.
        fkt: Forward knowledge transfer: exits that read latents hear what the latents' exit before them said.
        token_mixer: Behind each of the first three stages, half as many latents with the channels of the next stage;
            False: L latents with the channels of the stem in all four. All stages' heads must divide those then.
        early_exits: Where the exits before the last one read. ``classification``: the paper's network, see
            ``DynPerceiver``. ``feature``: the feature map behind stage 3's convolutions and behind stage 4's; the
            latents' part in knowledge transfer falls to the first of them. ``none``: one exit, the last. None for
            ``classification``, or ``feature`` without latents.
        latent_branch: Whether there are latents at all; without them the convolutional branch is alone, and its exits
            are those of ``early_exits="feature"`` less the one that reads latents, or the very last map's.
    """

    branch: str
    num_latents: int = 128
    latent_depths: tuple[int, int, int, int] = (3, 3, 9, 9)
    mlp_ratio: float = 4.0
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    group_size: int = 8
    width_mult: float = 1.0
    x2z: bool = True
    grid_conv: bool = True
    z2x: bool = True
    fkt: bool = True
    token_mixer: bool = True
    early_exits: str | None = None
    latent_branch: bool = True


_ABLATIONS = ("x2z", "grid_conv", "z2x", "fkt", "token_mixer", "early_exits", "latent_branch")


class ExitSite(NamedTuple):
    """Where an exit reads.

    A stage is three steps (latents read, map is convolved, map reads latents), a network twelve.

    Attributes:
        step: The exit comes after this many steps.
        reads_latents, reads_map: What its head sees.
        hears: The earlier exit whose logits are transferred to it.
    """

    step: int
    reads_latents: bool
    reads_map: bool
    hears: int | None = None


_SITES = {
    "classification": (
        ExitSite(7, True, False),
        ExitSite(10, True, False, hears=0),
        ExitSite(11, False, True),
        ExitSite(12, True, True, hears=1),
    ),
    "feature": (ExitSite(8, False, True), ExitSite(11, False, True), ExitSite(12, True, True, hears=0)),
    "none": (ExitSite(12, True, True),),
}


def _exit_sites(cfg: DynPerceiverCfg) -> tuple[ExitSite, ...]:
    """The exits of a network, shallow to deep."""
    kind = cfg.early_exits or ("classification" if cfg.latent_branch else "feature")
    if kind not in _SITES:
        raise ValueError(f"unknown early_exits {kind!r}; expected one of {', '.join(_SITES)}.")
    sites = _SITES[kind]
    if not cfg.latent_branch:
        if kind == "classification":
            raise ValueError("early exits in the classification branch read its latents: they need latent_branch=True.")
        # The last map is then the end of the network.
        sites = tuple(site for site in sites if not site.reads_latents) or (ExitSite(11, False, True),)
    return sites if cfg.fkt else tuple(site._replace(hears=None) for site in sites)


_BRANCHES: dict[str, Callable[..., FeatureBranch]] = {
    "regnety": lambda cfg, *rest: regnety(cfg.widths, cfg.depths, cfg.group_size, *rest),
    "resnet": lambda cfg, *rest: resnet(cfg.width_mult, *rest),
    "mobilenetv3": lambda cfg, *rest: mobilenetv3(cfg.width_mult, *rest),
}


class DynPerceiver(MultiExit, nn.Module):
    """Dyn-Perceiver with four exits.

    Exit 1 classifies the latents after stage 3's self-attention, before its convolutions; exit 2 those of stage 4 with
    what exit 1 said; exit 3 the feature map after stage 4's convolutions; exit 4 that map, informed by the latents,
    with them and with what exit 2 said. Training returns the logits of all four, evaluation the last's. (Table 3 seems
    to list the map's exit second and the latents' third: its third column falls with what the latents lose.)

    With ``num_classes=0`` each exit returns the features its classifier would read, without earlier exits' logits.

    The ablations of tables 2 and 3 are arguments, for ``create_model(..., x2z=False)``. The paper does not draw the
    exits in the feature branch; where they read and what they hear is our choice.

    Args:
        cfg: The network; keyword arguments named like its fields replace them.
        in_chans: Channels of the images.
        num_classes: Classes at every exit; 0 for none.
        global_pool: Only ``avg``.
        drop_rate: Dropout of the pooled feature map (exits 3 and 4); in MobileNet of these exits' hidden layers. The
            default is the paper's: 0.2 in MobileNet, none elsewhere.
        drop_path_rate: Stochastic depth of the last convolutional block, falling linearly to 0 at the first.
        features_before_z2x: Take intermediate feature maps before the cross-attention that follows each stage.
        backbone: With ``branch="network"``: a timm network with four stages of maps, which becomes the feature branch
            with its weights, under ``backbone.``.
        freeze_backbone: Keep that network as it is, in evaluation mode at all times.
    """

    exit_loss = "paper"  # eq. 3
    __constants__ = ("informed", "relayed", "early_latents")

    def __init__(
        self,
        cfg: DynPerceiverCfg,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        features_before_z2x: bool = False,
        backbone: nn.Module | None = None,
        freeze_backbone: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        cfg = replace(cfg, **kwargs)
        if cfg.branch not in _BRANCHES and backbone is None:
            raise ValueError(f"unknown feature branch {cfg.branch!r}; expected one of {', '.join(_BRANCHES)}.")
        if cfg.latent_branch and (cfg.num_latents < 8 or cfg.num_latents % 8):
            raise ValueError(f"num_latents must be a positive multiple of 8, got {cfg.num_latents}.")
        if global_pool != "avg":
            raise ValueError(f"Dyn-Perceiver pools by average only (global_pool='avg'), got {global_pool!r}.")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.sites = _exit_sites(cfg)
        self.num_exits = len(self.sites)
        self.first_step, self.last_step = self.sites[0].step, self.sites[-1].step
        # How the last exit's logits come about: what it hears, and what that exit heard itself.
        hears = self.sites[-1].hears
        self.informed = hears is not None
        self.relayed = hears is not None and self.sites[hears].hears is not None
        self.early_latents = self.sites[0].reads_latents
        self.left_out = tuple(name for name in _ABLATIONS if getattr(cfg, name) != getattr(DynPerceiverCfg, name))
        self.num_stages = 4
        self.min_size = 32  # pixels: the stride of the last feature map
        self.features_before_z2x = features_before_z2x
        self.fused = False

        self.freeze_backbone = freeze_backbone and backbone is not None
        if backbone is None:
            branch = _BRANCHES[cfg.branch](cfg, in_chans, drop_path_rate, dd)
        else:
            self.backbone: TimmModel = backbone
            branch = network_branch(backbone)
            if freeze_backbone:
                self.backbone.requires_grad_(False)
        self.channels = branch.channels
        self.head_width = branch.head_width
        self.stem_reduction = branch.stem_reduction
        self.own_drop_rate = 0.2 if branch.head_width else 0.0
        self.drop_rate = self.own_drop_rate if drop_rate is None else drop_rate
        self.stem = branch.stem
        self.latent = None
        if cfg.latent_branch:
            self.latent = nn.Parameter(torch.empty(cfg.num_latents, branch.channels[0], **dd))
        # Channels of the latents in the stages, and of those that leave the last, which has no token mixer.
        widths = [branch.channels[index if cfg.token_mixer else 0] for index in (0, 1, 2, 3, 3)]
        self.latent_widths = widths if cfg.latent_branch else [0] * 5
        self.stages = ModuleList(
            [
                DynPerceiverStage(
                    blocks,
                    width=branch.channels[index],
                    out_width=branch.channels[index + 1],
                    latent_width=widths[index],
                    latent_out_width=widths[index + 1],
                    num_tokens=cfg.num_latents >> index,
                    num_heads=1 << index,
                    latent_depth=cfg.latent_depths[index],
                    mlp_ratio=cfg.mlp_ratio,
                    x2z=cfg.x2z or index == 0,
                    grid_conv=cfg.grid_conv,
                    z2x=cfg.z2x,
                    token_mixer=cfg.token_mixer and index < 3,
                    latents=cfg.latent_branch,
                    **dd,
                )
                for index, blocks in enumerate(branch.stages)
            ]
        )
        infos: list[dict[str, Any]] = [
            dict(num_chs=width, reduction=reduction, module=f"stages.{index}")
            for index, (width, reduction) in enumerate(zip(branch.channels[1:], branch.reductions, strict=True))
        ]
        self.feature_info = infos
        self.num_features = self.head_hidden_size = branch.channels[4] + self.latent_widths[4]
        # MobileNet's dropout follows the hidden layer of its heads.
        self.head_drop = nn.Dropout(0.0 if branch.head_width else self.drop_rate)
        self.heads, self.transfers = self._build_heads(num_classes, dd)
        self.init_weights()

    def _build_heads(self, num_classes: int, dd: dict[str, Any]) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Heads, one per exit, and the knowledge transfers, one per exit that hears another, in their order."""
        hearing = [site for site in self.sites if site.hears is not None]
        if num_classes == 0:
            return nn.ModuleList([nn.Identity() for _ in self.sites]), nn.ModuleList([nn.Identity() for _ in hearing])
        told = self.latent_widths[3]
        heads = []
        for site in self.sites:
            width = told if site.hears is not None else 0
            if site.reads_latents:
                width += self.latent_widths[(site.step - 1) // 3]
            if site.reads_map:
                width += self.channels[(site.step + 1) // 3]
            # MobileNet's heads on the last map have a hidden layer.
            deep = site.reads_map and site.step > 10
            options: dict[str, Any] = dict(hidden_width=self.head_width, drop_rate=self.drop_rate) if deep else {}
            both = site.reads_map and site.reads_latents
            heads.append(PooledExitHead(width, num_classes, batch_norm=both, **options, **dd))
        return nn.ModuleList(heads), nn.ModuleList([KnowledgeTransfer(num_classes, told, **dd) for _ in hearing])

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the feature branch as its family does and the latents; everything else keeps torch's default."""
        if self.latent is not None:
            nn.init.normal_(self.latent, std=0.02)
            with torch.no_grad():
                self.latent.clamp_(-2, 2)
        for root in (self.stem, *(stage.blocks for stage in self.stages)):
            for module in root.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, ResNetBottleneck):
                    module.zero_init_last()

    def train(self, mode: bool = True) -> "DynPerceiver":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    # A stage is three steps: read, convolve, write. Everything that runs the network runs a range of them.

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(check_image(x, self.in_chans, self.min_size))
        return x, self._first_latents(x)

    def _first_latents(self, x: Tensor) -> Tensor:
        """The latents (B, L, C) before stage 1; without a latent branch none of width 0."""
        if self.latent is None:
            return x.new_zeros((x.shape[0], 0, 0))
        return self.latent.expand(x.shape[0], -1, -1)

    def _run(self, x: Tensor, z: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The map and the latents after the steps ``start`` to ``stop - 1``; those of stage i are 3i to 3i + 2."""
        for index, stage in enumerate(self.stages):
            if start <= 3 * index < stop:
                z = stage.read(x, z)
            if start <= 3 * index + 1 < stop:
                x = stage.convolve(x)
            if start <= 3 * index + 2 < stop:
                z = stage.expand(z)
                x = stage.write(x, z)
        return x, z

    def _pool_map(self, x: Tensor) -> Tensor:
        return self.head_drop(x.mean(dim=(2, 3)))

    def _pool(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([self._pool_map(x), z.mean(dim=1)], dim=1)

    def _exit(self, index: int, x: Tensor, z: Tensor, heard: Tensor | None) -> Tensor:
        """Logits of exit ``index`` from the map, the latents and the logits it hears."""
        site = self.sites[index]
        parts = [self._pool_map(x)] if site.reads_map else []
        if site.reads_latents:
            parts.append(z.mean(dim=1))
        if site.hears is not None and self.num_classes > 0:
            hearing = [k for k, other in enumerate(self.sites) if other.hears is not None]
            parts.append(self.transfers[hearing.index(index)](heard))
        return self.heads[index](torch.cat(parts, dim=1))

    def begin_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        """State before the first segment: the images (B, C, H, W), checked."""
        check_has_exits(self.num_exits)
        return (check_image(x, self.in_chans, self.min_size),)

    def forward_exit(self, index: int, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (B, num_classes) of exit ``index``, counted from 0, and the state the next segment starts from.

        Between segments the state is the feature map (B, C, H, W), the latents (B, L, C) where there are any, and the
        logits (B, num_classes) that a later exit hears, where one does; after the last exit it is empty.

        IndexError if there is no such exit.
        """
        if not 0 <= index < self.num_exits:
            raise IndexError(f"this model has exits 0 to {self.num_exits - 1}, got {index}.")
        x, rest = state[0], list(state[1:])  # no starred name: torch 2.6 compiles it to a tuple
        if index == 0:
            x, z = self._begin(x)
        else:
            z = self._first_latents(x) if self.latent is None else rest.pop(0)
        heard = rest[0] if rest else None
        x, z = self._run(x, z, self.sites[index - 1].step if index else 0, self.sites[index].step)
        logits = self._exit(index, x, z, heard)
        if index == self.num_exits - 1:
            return logits, ()
        told = {later.hears for later in self.sites[index + 1 :]}
        if index in told:
            heard = logits
        elif not any(earlier in told for earlier in range(index)):
            heard = None
        state = (x,) if self.latent is None else (x, z)
        return logits, state if heard is None else (*state, heard)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """What the last exit reads: the map (B, C5, H, W), the latents (B, L, C), and what exit 1 reads if it hears it.

        That is the latents at exit 1, or the map where the early exits lie in the feature branch.
        """
        x, z = self._begin(x)
        x, z = self._run(x, z, 0, self.first_step)
        early = z if self.early_latents else x
        x, z = self._run(x, z, self.first_step, self.last_step)
        return self._collect(x, z, early)

    def _collect(self, x: Tensor, z: Tensor, early: Tensor) -> list[Tensor]:
        if self.informed:
            return [x, z, early]
        if self.latent is None:
            return [x]
        return [x, z]

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Tensor:
        """Logits of the last exit from ``forward_features``, or what is pooled for them (B, num_features)."""
        pooled = self._pool_map(features[0]) if self.latent is None else self._pool(features[0], features[1])
        if pre_logits or self.num_classes == 0:
            return pooled
        if self.informed:
            early = features[2]
            logits = self.heads[0](early.mean(dim=1) if self.early_latents else self._pool_map(early))
            if self.relayed:
                logits = self.heads[1](torch.cat([features[1].mean(dim=1), self.transfers[0](logits)], dim=1))
            pooled = torch.cat([pooled, self.transfers[-1](logits)], dim=1)
        return self.heads[-1](pooled)

    def forward(self, x: Tensor):
        """Logits of the last exit in evaluation, the tuple of every exit's in training."""
        if self.training and self.num_exits > 0 and not torch.jit.is_scripting():
            return self.forward_exits(x)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """Feature maps of the stages, after their Z2X cross-attention or, with ``features_before_z2x``, before it.

        Args:
            x: Images (B, C, H, W).
            indices: The last n stages if an int, all if None, else the stages (0 to 3) to take.
            norm: Without effect: no norm follows the stages.
            stop_early: Stop once the last wanted map is there.
            output_fmt: Only ``NCHW``.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or what ``forward_features`` returns and the maps.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}.")
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        intermediates: list[Tensor] = []
        x, z = self._begin(x)
        early = z
        taken = 1 if self.features_before_z2x else 2  # the step of a stage behind which its map is taken
        for index in range(max_index + 1 if stop_early else self.num_stages):
            for step in range(3):
                x, z = self._run(x, z, 3 * index + step, 3 * index + step + 1)
                if 3 * index + step + 1 == self.first_step:
                    early = z if self.early_latents else x
                if step == taken and index in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self._collect(x, z, early), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the intermediate maps at ``indices`` do not need; return the indices kept.

        The exits go with it unless everything is needed and ``prune_head`` is False.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = max_index == len(self.feature_info) - 1
        if last and not prune_head:
            return take_indices
        if not last or self.features_before_z2x:
            self.stages = self.stages[: max_index + 1]
            self.num_stages = max_index + 1
            latent_width = self.latent_widths[max_index + 1]
            if self.features_before_z2x:
                self.stages[max_index].keep_convolutions()
                latent_width = self.latent_widths[max_index]
                if max_index == 0 and self.latent is not None:
                    self.latent.requires_grad_(False)  # no map reads the latents
            self.num_features = self.head_hidden_size = self.channels[max_index + 1] + latent_width
            self.num_exits = 0
        self.reset_classifier(0)
        return take_indices

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.heads

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give every exit a new classifier for ``num_classes`` (0 for none), and so new knowledge transfers.

        ValueError for another pooling than the average.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"Dyn-Perceiver pools by average only (global_pool='avg'), got {global_pool!r}.")
        if num_classes > 0:
            check_has_exits(self.num_exits)
        self.num_classes = num_classes
        self.heads, self.transfers = self._build_heads(num_classes, get_device_dtype(self))
        self.heads.train(self.training)
        self.transfers.train(self.training)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], tuple[float, ...]]:
        """Parameter groups for layer-wise learning rates: stem and latents, then block by block.

        Over a given network those of the network; everything of the latents is in the last.
        """
        if hasattr(self, "backbone"):
            return groups_of_part(self.backbone, "backbone.", coarse)
        if coarse:
            return dict(stem=r"^(?:stem|latent)", blocks=r"^stages\.(\d+)")
        return dict(
            stem=r"^(?:stem|latent)",
            blocks=[
                (r"^stages\.(\d+)\.(?:grid|x2z)", (0,)),
                (r"^stages\.(\d+)\.(?:self_attn|blocks)\.(\d+)", None),
                (r"^stages\.(\d+)\.(?:token_mixer|channel_expander|z2x)", (99999,)),
            ],
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Latents and key positions, as timm treats positions; the authors' recipe decays them."""
        own = {name for name, _ in self.named_parameters() if name == "latent" or name.endswith("key_position")}
        inner = getattr(getattr(self, "backbone", None), "no_weight_decay", set)
        return own | {f"backbone.{name}" for name in inner()}

    @torch.jit.ignore
    def fuse(self, image_size: tuple[int, int] | None = None) -> "DynPerceiver":
        """Change the model in place into its form for inference, with the same outputs up to rounding; return it.

        Batch norms are folded into the layers before them, the affine parts of layer norms into those after, the
        convolution that X2Z reads through into its pooling; RegNet blocks work in place; and maps are laid out as
        ``channels_last``, in which a map is its tokens. The state dict changes with it.

        Args:
            image_size: Height and width to prepare for; the default is that of the pretrained configuration. Others
                work as well, a little slower.

        Raises:
            RuntimeError: The model is in training mode.
        """
        check_evaluating(self)
        if self.fused:
            return self
        self.fused = True
        if image_size is None:
            image_size = model_config(self).get("input_size", (3, 224, 224))[-2:]
        height, width = image_size
        reductions = [self.stem_reduction, *(info["reduction"] for info in self.feature_info)]
        for stage, reduction in zip(self.stages, reductions[: self.num_stages], strict=True):
            stage.fuse(-(-height // reduction), -(-width // reduction))
        if isinstance(self.stem, NetworkPiece):
            fuse_network(self.backbone, [cut.name for cut in self.stem.split.cuts])
        else:
            fuse_convolutions(self)
        for stage in self.stages:
            for index, block in enumerate(stage.blocks):
                if isinstance(block, RegNetBottleneck) and FusedRegNetBlock.replaces(block):
                    stage.blocks[index] = FusedRegNetBlock(block)
        return self.eval().to(memory_format=torch.channels_last)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": (*(f"heads.{index}.fc" for index in range(4)), "transfers.0.fc", "transfers.1.fc"),
        "paper_ids": "arXiv:2306.11248",
        "paper_name": "Dynamic Perceiver for Efficient Visual Recognition",
        "origin_url": "https://github.com/LeapLabTHU/Dynamic_Perceiver",
        **kwargs,
    }


def _create_dynperceiver(variant: str, pretrained: bool, cfg: DynPerceiverCfg, **kwargs: Any) -> DynPerceiver:
    model = build_with_checkpoint(
        DynPerceiver,
        variant,
        pretrained,
        model_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )
    if isinstance(model, DynPerceiver) and model.left_out:
        roots = {"heads": model.heads, "transfers": model.transfers}
        names = (f"{root}.{index}.fc" for root, modules in roots.items() for index in range(len(modules)))
        model_config(model)["classifier"] = tuple(names)
    return model


# Arguments of a model of a given network that are not the network's.
_OWN_ARGUMENTS = (*(field.name for field in fields(DynPerceiverCfg)), "features_before_z2x", "freeze_backbone")


def _create_over_network(
    pretrained: bool,
    backbone: str,
    num_classes: int | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> Any:
    own = {key: kwargs.pop(key) for key in _OWN_ARGUMENTS if key in kwargs}
    for taker in (DynPerceiver, DynPerceiverCfg):
        check_switches(taker, own)
    features = {key: kwargs.pop(key) for key in FEATURE_ARGUMENTS if key in kwargs}
    source = WholeOrPart.find("latent", "dynperceiver", pretrained, pretrained_cfg, pretrained_cfg_overlay)
    overlay = source.part_overlay
    net: TimmModel = timm.create_model(
        backbone, source.of_part, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **kwargs
    )
    source.forget_weights(net)
    cfg = {key: value for key, value in net.pretrained_cfg.items() if key in _INPUT_KEYS}
    first_conv = net.pretrained_cfg.get("first_conv")
    cfg["first_conv"] = f"backbone.{first_conv}" if isinstance(first_conv, str) else None
    if num_classes is None:
        num_classes = source.given.get("num_classes", net.num_classes)
    net.reset_classifier(0)
    dd = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
    in_chans = get_model_input_config(net)["input_size"][0]
    drop = {key: kwargs[key] for key in ("drop_rate",) if key in kwargs}
    model = DynPerceiver(DynPerceiverCfg("network"), in_chans, num_classes, backbone=net, **own, **drop, **dd)
    set_model_traits(model, {**model_traits(net), "first_conv": cfg["first_conv"]})
    cfg["classifier"] = tuple(
        f"{root}.{index}.fc" for root in ("heads", "transfers") for index in range(len(getattr(model, root)))
    )
    return source.build(model, "dynperceiver", cfg, cache_dir, **features)


_INPUT_KEYS = ("num_classes", "input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "fixed_input_size")

_resnet_cfg = partial(_cfg, first_conv="stem.0.conv")
_mobilenet_cfg = partial(_cfg, first_conv="stem.0.conv")
default_cfgs = generate_default_cfgs(
    {
        "dynperceiver.untrained": {},
        "dynperceiver_resnet50_0_375x.in1k": _resnet_cfg(share_link("844ac164a62246eb9ce8")),
        "dynperceiver_resnet50_0_5x.untrained": _resnet_cfg(),
        "dynperceiver_resnet50_0_5x_t256.untrained": _resnet_cfg(),
        "dynperceiver_resnet50_0_625x.untrained": _resnet_cfg(),
        "dynperceiver_resnet50_0_75x.untrained": _resnet_cfg(),
        "dynperceiver_regnety_400mf.untrained": _cfg(),
        "dynperceiver_regnety_400mf_t256.untrained": _cfg(),
        "dynperceiver_regnety_800mf.in1k": _cfg(share_link("ca3c8a808d504fdfa2c8")),
        "dynperceiver_regnety_800mf_t256.untrained": _cfg(),
        "dynperceiver_regnety_1_6gf.untrained": _cfg(),
        "dynperceiver_regnety_3_2gf.untrained": _cfg(),
        "dynperceiver_mobilenetv3_0_75x.in1k": _mobilenet_cfg(share_link("a86c56e3076146ad8748")),
        "dynperceiver_mobilenetv3_1_0x.untrained": _mobilenet_cfg(),
        "dynperceiver_mobilenetv3_1_0x_deep.untrained": _mobilenet_cfg(),
        "dynperceiver_mobilenetv3_1_25x.untrained": _mobilenet_cfg(),
        "dynperceiver_mobilenetv3_1_5x.untrained": _mobilenet_cfg(),
        "dynperceiver_test.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)

_ResNet = partial(DynPerceiverCfg, "resnet", latent_depths=(3, 3, 9, 3))
_MobileNetV3 = partial(DynPerceiverCfg, "mobilenetv3")
_RegNetY = partial(DynPerceiverCfg, "regnety")
_RegNetY400MF = partial(_RegNetY, widths=(32, 48, 104, 208, 440), depths=(1, 3, 6, 6), group_size=8)
_RegNetY800MF = partial(_RegNetY, widths=(32, 64, 144, 320, 784), depths=(1, 3, 8, 2), group_size=16)
_RegNetY1_6GF = partial(_RegNetY, widths=(32, 48, 120, 336, 888), depths=(2, 6, 17, 2), group_size=24)
_RegNetY3_2GF = partial(
    DynPerceiverCfg, "regnety", widths=(32, 72, 216, 576, 1512), depths=(2, 5, 13, 1), group_size=24
)


@register_model
def dynperceiver(
    pretrained: bool = False, backbone: str = "resnet18", pretrained_backbone: bool = False, **kwargs: Any
) -> DynPerceiver:
    """Dyn-Perceiver over a timm network: that network is the feature branch, the latent branch is new.

    Args:
        pretrained, pretrained_backbone: Load the network's pretrained weights; of a saved folder or a file of the whole
            model, everything.
        backbone: Name of a network with a stem and four stages of maps, as in ``timm.create_model``.
        kwargs: Fields of ``DynPerceiverCfg`` and arguments of ``DynPerceiver``; all others go to the network.
    """
    return _create_over_network(pretrained or pretrained_backbone, backbone, **kwargs)


@register_model
def dynperceiver_resnet50_0_375x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 5, model 1: ResNet-50 at 0.375x width."""
    cfg = _ResNet(width_mult=0.375)
    return _create_dynperceiver("dynperceiver_resnet50_0_375x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_resnet50_0_5x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 5, model 2: ResNet-50 at 0.5x width."""
    cfg = _ResNet(width_mult=0.5, latent_depths=(3, 3, 9, 9))
    return _create_dynperceiver("dynperceiver_resnet50_0_5x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_resnet50_0_5x_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 5, model 3: ResNet-50 at 0.5x width, 256 latents."""
    cfg = _ResNet(width_mult=0.5, num_latents=256)
    return _create_dynperceiver("dynperceiver_resnet50_0_5x_t256", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_resnet50_0_625x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 5, model 4: ResNet-50 at 0.625x width, 192 latents."""
    cfg = _ResNet(width_mult=0.625, num_latents=192)
    return _create_dynperceiver("dynperceiver_resnet50_0_625x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_resnet50_0_75x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 5, model 5: ResNet-50 at 0.75x width."""
    cfg = _ResNet(width_mult=0.75, mlp_ratio=2.0)
    return _create_dynperceiver("dynperceiver_resnet50_0_75x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_regnety_400mf(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 6, model 1: RegNetY-400MF."""
    cfg = _RegNetY400MF(latent_depths=(6, 6, 9, 9))
    return _create_dynperceiver("dynperceiver_regnety_400mf", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_regnety_400mf_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 6, model 2: RegNetY-400MF, 256 latents."""
    cfg = _RegNetY400MF(num_latents=256, latent_depths=(3, 3, 9, 9))
    return _create_dynperceiver("dynperceiver_regnety_400mf_t256", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_regnety_800mf(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 6, model 3: RegNetY-800MF."""
    cfg = _RegNetY800MF(latent_depths=(3, 3, 9, 6))
    return _create_dynperceiver("dynperceiver_regnety_800mf", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_regnety_800mf_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 6, model 4: RegNetY-800MF, 256 latents."""
    cfg = _RegNetY800MF(num_latents=256, latent_depths=(3, 3, 9, 6))
    return _create_dynperceiver("dynperceiver_regnety_800mf_t256", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_regnety_1_6gf(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 6, model 5: RegNetY-1.6GF, 256 latents."""
    cfg = _RegNetY1_6GF(num_latents=256, latent_depths=(6, 6, 9, 6), mlp_ratio=2.0)
    return _create_dynperceiver("dynperceiver_regnety_1_6gf", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_regnety_3_2gf(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 6, model 6: RegNetY-3.2GF, 256 latents."""
    cfg = _RegNetY3_2GF(num_latents=256, latent_depths=(6, 6, 9, 9))
    return _create_dynperceiver("dynperceiver_regnety_3_2gf", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_mobilenetv3_0_75x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 7, model 1: MobileNetV3-Large at 0.75x width."""
    cfg = _MobileNetV3(width_mult=0.75)
    return _create_dynperceiver("dynperceiver_mobilenetv3_0_75x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_mobilenetv3_1_0x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 7, model 2: MobileNetV3-Large."""
    cfg = _MobileNetV3()
    return _create_dynperceiver("dynperceiver_mobilenetv3_1_0x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_mobilenetv3_1_0x_deep(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 7, model 3: MobileNetV3-Large, more self-attention."""
    cfg = _MobileNetV3(latent_depths=(6, 6, 9, 9))
    return _create_dynperceiver("dynperceiver_mobilenetv3_1_0x_deep", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_mobilenetv3_1_25x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 7, model 4: MobileNetV3-Large at 1.25x width."""
    cfg = _MobileNetV3(width_mult=1.25, latent_depths=(6, 6, 9, 9))
    return _create_dynperceiver("dynperceiver_mobilenetv3_1_25x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_mobilenetv3_1_5x(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Table 7, model 5: MobileNetV3-Large at 1.5x width, 256 latents."""
    cfg = _MobileNetV3(width_mult=1.5, num_latents=256)
    return _create_dynperceiver("dynperceiver_mobilenetv3_1_5x", pretrained, cfg, **kwargs)


@register_model
def dynperceiver_test(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """A network of 64-pixel images small enough for tests and demonstrations; not from the paper."""
    cfg = DynPerceiverCfg(
        "regnety",
        num_latents=32,
        latent_depths=(1, 1, 2, 1),
        mlp_ratio=2.0,
        widths=(16, 24, 40, 64, 96),
        depths=(1, 1, 2, 1),
        group_size=8,
    )
    return _create_dynperceiver("dynperceiver_test", pretrained, cfg, **kwargs)
