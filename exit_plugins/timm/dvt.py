"""DVT: a cascade of vision transformers that read one image as more and more tokens, each starting from the last.

Paper: "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient Image Recognition" (Wang et al.,
NeurIPS 2021). Section numbers below are the paper's; where it is silent, the layers follow what the authors' published
weights compute, so that these load.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from .._modules import ModuleDict, ModuleList
from ..exits.protocol import MultiExit
from ._checkpoints import build_with_checkpoint, share_link
from ._dvt_reuse import DVTBlock, TokenResize
from ._dvt_tokens import Patches, PatchTokens, Performer, T2TTokens, cut_side, sinusoids
from ._dvt_weights import allow_numpy_data, checkpoint_filter_fn, policies_from_checkpoint
from ._host import feature_take_indices, update_model_args, update_model_input_size
from .kernels import check_evaluating, use_faster_products
from .layers import check_has_exits

__all__ = ["DVT", "DVTCfg", "policies_from_checkpoint"]

Size = int | tuple[int, int]

torch.fx.wrap("_check_image")


@dataclass(frozen=True)
class DVTCfg:
    """The vision transformer that a DVT repeats, and how the repetitions help each other.

    A DVT over another transformer is one line, ``DVT(DVTCfg(embed_dim=192, num_heads=3))`` or
    ``create_model("dvt_deit_small", embed_dim=192, num_heads=3)``.

    Attributes:
        embed_dim: D, channels of a token.
        depth: L, blocks of each transformer.
        num_heads: H, attention heads of each block.
        mlp_ratio: Width of the MLPs over D.
        qkv_bias: Whether queries, keys and values have a bias.
        norm_eps: Of every LayerNorm of the blocks.
        tokens: ``t2t`` (tokens-to-token module, fixed sinusoidal positions) or ``patch`` (one strided convolution,
            learned positions).
        token_grids: Tokens along each side (or along height and width) at each exit, shallow to deep.
        base_size: Image size in pixels the token grids are stated for, which fixes the patches' sizes; None for the
            size of the images the model is built for.
        feature_reuse: Exits after the first read the tokens the exit before ended with (section 3.2, eq. 4 and 5).
        relation_reuse: Exits after the first read the attention logits of the exit before (section 3.2, eq. 8 and 9).
        context_hidden: Hidden width of the feature reuse's MLPs.
        context_width: D', channels that feature reuse adds to each token before a block's MLP.
        feature_source: Table 7: tokens a block reads of the exit before, those after its ``last`` block, or after the
            ``same`` block as its own.
        feature_blocks: Table 7: ``all`` blocks read them, or the ``first`` alone (no f_l for l >= 2).
        feature_class_token: Table 7: f_l takes the class token too, whose row is zero otherwise.
        feature_norm: Table 7: LN in f_l.
        relation_source: Table 8: attention logits a block reads of the exit before, those of ``all`` its blocks, of the
            ``same`` block or of the ``last``.
        relation_mlp: Table 8: r_l is an MLP; False for a linear layer.
        relation_upsample: Table 8: ``grid`` (figure 5), or ``naive``: the map between tokens is resized as if it were
            an image (bilinear, the class token apart; the paper does not say how).
        t2t_width: Channels of the tokens inside the tokens-to-token module.
        t2t_features: Random features of its linear attention.
        t2t_drop_rate: Dropout inside it.
    """

    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    tokens: str = "patch"
    token_grids: tuple[Size, ...] = (7, 10, 14)
    base_size: Size | None = None
    feature_reuse: bool = True
    relation_reuse: bool = True
    context_hidden: int = 128
    context_width: int = 48
    feature_source: str = "last"
    feature_blocks: str = "all"
    feature_class_token: bool = False
    feature_norm: bool = True
    relation_source: str = "all"
    relation_mlp: bool = True
    relation_upsample: str = "grid"
    t2t_width: int = 64
    t2t_features: int = 32
    t2t_drop_rate: float = 0.1


def _pair(size: Size) -> tuple[int, int]:
    height, width = to_2tuple(size)
    return height, width


_CHOICES = {
    "feature_source": ("last", "same"),
    "feature_blocks": ("all", "first"),
    "relation_source": ("all", "same", "last"),
    "relation_upsample": ("grid", "naive"),
}


def _check_cfg(cfg: DVTCfg, img_size: Size) -> DVTCfg:
    """``cfg`` with every size there and a pair, or ValueError saying what is wrong with it."""
    if cfg.tokens not in ("t2t", "patch"):
        raise ValueError(f"tokens must be 't2t' or 'patch', got {cfg.tokens!r}.")
    for name, known in _CHOICES.items():
        if getattr(cfg, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(cfg, name)!r}.")
    if cfg.depth < 1 or cfg.num_heads < 1 or cfg.embed_dim % cfg.num_heads:
        raise ValueError(f"embed_dim {cfg.embed_dim} does not divide into {cfg.num_heads} heads (depth {cfg.depth}).")
    grids = tuple(_pair(grid) for grid in cfg.token_grids)
    if not grids or min(map(min, grids)) < 1:
        raise ValueError(f"token_grids needs one entry of positive token counts per exit, got {cfg.token_grids}.")
    return replace(cfg, token_grids=grids, base_size=_pair(cfg.base_size or img_size))


def _check_image(x: Tensor, in_chans: int, height: int, width: int) -> Tensor:
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f"expected images of shape (batch, {in_chans}, {height}, {width}), got {list(x.shape)}: resize them, or "
            "build the model with other img_size and in_chans (set_input_size changes img_size later)."
        )
    return x


class DVTStage(nn.Module):
    """One transformer of the cascade, from the image to its exit."""

    pos_embed: Tensor

    def __init__(
        self,
        cfg: DVTCfg,
        patches: tuple[Patches, Patches],
        grid: tuple[int, int],
        upstream_grid: tuple[int, int] | None,
        last: bool,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        proj_drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grid = grid
        self.patches = patches
        self.num_heads = cfg.num_heads
        self.global_pool = global_pool
        # Nobody reads what the last exit would hand on: its logits are never kept and its attention is fused.
        self.hands_on_logits = cfg.relation_reuse and not last
        self.first_handed_on = cfg.depth - 1 if cfg.relation_source == "last" else 0
        self.hands_on_tokens = cfg.feature_reuse and not last
        # After which blocks, where it is not the last one.
        self.tokens_by_block = cfg.feature_source == "same"
        self.blocks_read = cfg.depth if cfg.feature_blocks == "all" else 1
        self.grad_checkpointing = False
        self.tokens_to_token = self.patch_embed = None
        pos_embed = torch.empty(1, 1 + grid[0] * grid[1], cfg.embed_dim, **dd)
        if cfg.tokens == "t2t":
            self.tokens_to_token = T2TTokens(
                patches, in_chans, cfg.embed_dim, cfg.t2t_width, cfg.t2t_features, cfg.t2t_drop_rate, **dd
            )
            self.register_buffer("pos_embed", pos_embed)
        else:
            self.patch_embed = PatchTokens(patches, in_chans, cfg.embed_dim, **dd)
            self.pos_embed = nn.Parameter(pos_embed)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.embed_dim, **dd))

        channels = cfg.depth * cfg.num_heads
        self.relation_reuse_conv = self.resize = None
        self.upstream_tokens = 0 if upstream_grid is None else 1 + upstream_grid[0] * upstream_grid[1]
        if upstream_grid is not None and (cfg.feature_reuse or cfg.relation_reuse):
            self.resize = TokenResize(upstream_grid, grid, cfg.relation_upsample == "naive", **dd)
        if upstream_grid is not None and cfg.relation_reuse:
            read = cfg.num_heads if cfg.relation_source == "last" else channels
            groups = cfg.depth if cfg.relation_source == "same" else 1  # each block its own r_l on its own logits
            widths = (read, 3 * channels, channels) if cfg.relation_mlp else (read, channels)
            layers: list[nn.Module] = []
            for width_in, width in pairwise(widths):
                layers += [nn.Conv2d(width_in, width, 1, groups=groups, **dd), nn.GELU()]
            self.relation_reuse_conv = nn.Sequential(*layers[:-1])
        norm_layer = partial(nn.LayerNorm, eps=cfg.norm_eps)
        reads_features = upstream_grid is not None and cfg.feature_reuse
        self.blocks = ModuleList(
            [
                DVTBlock(
                    cfg.embed_dim,
                    cfg.num_heads,
                    cfg.mlp_ratio,
                    context_hidden=cfg.context_hidden,
                    context_width=cfg.context_width if reads_features and index < self.blocks_read else 0,
                    context_norm=cfg.feature_norm,
                    context_class_token=cfg.feature_class_token,
                    resize=self.resize,
                    qkv_bias=cfg.qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    **dd,
                )
                for index, rate in enumerate(calculate_drop_path_rates(drop_path_rate, cfg.depth))
            ]
        )
        self.norm: nn.Module = norm_layer(cfg.embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(cfg.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def fill_positions(self) -> None:
        """Draw the learned positions, or compute the fixed ones."""
        if isinstance(self.pos_embed, nn.Parameter):
            trunc_normal_(self.pos_embed, std=0.02)
        else:
            self.pos_embed.copy_(torch.from_numpy(sinusoids(*self.pos_embed.shape[1:])))

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, 1 + N, D), class token first, positions added."""
        if self.tokens_to_token is not None:
            x = self.tokens_to_token(x)
        elif self.patch_embed is not None:
            x = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed

    def read_relations(self, relations: Tensor) -> Tensor:
        """What each block adds to its logits, not yet resized, (B, L*H, N, N), from those of the exit before."""
        if self.relation_reuse_conv is None:
            return relations
        if self.training:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                return checkpoint(self.relation_reuse_conv, relations)
            return self.relation_reuse_conv(relations)
        # Between the layers there is three times as much as the logits: a quarter at a time needs less memory.
        step = (self.upstream_tokens + 3) // 4
        slices: list[Tensor] = []
        for start in range(0, self.upstream_tokens, step):
            slices.append(self.relation_reuse_conv(relations[:, :, start : start + step]))
        return torch.cat(slices, dim=2)

    def run_blocks(
        self, x: Tensor, context: Tensor | None, relations: Tensor | None, take: list[int], last: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run blocks 0 to ``last``: the tokens, the attention logits to hand on, the tokens after those in ``take``."""
        x = self.embed(x)
        maps: Tensor | None = None
        if relations is not None:
            maps = self.read_relations(relations)
        logits: list[Tensor] = []
        taken: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index <= last:
                relation: Tensor | None = None
                if maps is not None:
                    relation = maps[:, index * self.num_heads : (index + 1) * self.num_heads]
                seen: Tensor | None = context
                if self.tokens_by_block and context is not None:
                    seen = context[:, min(index, self.blocks_read - 1)]
                keep = self.hands_on_logits and index >= self.first_handed_on
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, own = checkpoint(block, x, seen, relation, keep)
                else:
                    x, own = block(x, seen, relation, keep)
                if own is not None:
                    logits.append(own)
                if index in take:
                    taken.append(x)
        return x, logits, taken

    def forward(
        self, x: Tensor, context: Tensor | None, relations: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens (B, 1 + N, D) before the final norm, and the tokens and attention logits that the next exit reads.

        Args:
            x: Images (B, C, H, W).
            context: The second result of the exit before, if it is read: tokens (B, 1 + N_up, D) after its last block,
                or (B, L, 1 + N_up, D) after each.
            relations: The third one, (B, L*H, 1 + N_up, 1 + N_up): layer by layer, in each head by head; of the last
                block alone (B, H, 1 + N_up, 1 + N_up).
        """
        take: list[int] = []
        if self.hands_on_tokens and self.tokens_by_block:
            take = list(range(self.blocks_read))
        x, logits, taken = self.run_blocks(x, context, relations, take, len(self.blocks))
        tokens: Tensor | None = None
        if self.hands_on_tokens:
            tokens = torch.stack(taken, dim=1) if self.tokens_by_block else x
        handed_on: Tensor | None = None
        if self.hands_on_logits:
            handed_on = torch.cat(logits, dim=1)
        return x, tokens, handed_on

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from normalised tokens (B, 1 + N, D), or their pooled features (B, D)."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, num_prefix_tokens=1))
        return x if pre_logits else self.head(x)


if TYPE_CHECKING:
    _Stages = ModuleDict[DVTStage]
else:
    _Stages = ModuleDict


class DVT(MultiExit, _Stages):
    """Dynamic Vision Transformer: K transformers in a cascade, one exit each.

    The stages are named after the published weights: ``normal_token`` is the last, and each one before it has one more
    ``less_`` (``less_token``, ``less_less_token``). The model is a dictionary of them because TorchScript can run
    through one.

    Images must have the size the model was built for. With ``token_grids`` given, it is cut into exactly these grids.
    Without, the registered networks' patches keep the size they have at 224 pixels and their number follows
    ``img_size``, whose sides must be multiples of the coarsest patches (32 pixels): 256 gives 8, 11 and 16 tokens.

    Args:
        cfg: The network; keyword arguments named like its fields replace them.
        img_size: Height and width of the images, or one number for both.
        in_chans: Channels of the images.
        num_classes: Classes at every exit; 0 for none: exits then return their pooled features (B, D).
        global_pool: ``token`` (the class token), ``avg`` or ``""``.
        drop_rate: Dropout before the classifiers.
        proj_drop_rate: Dropout after attention and in the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block of each stage, falling linearly to 0 at the first.

    Raises:
        ValueError: The images cannot be cut as asked; the message says which sizes can.
        TypeError: An unknown keyword argument.
    """

    exit_loss = "dvt"  # eq. 1

    def __init__(
        self,
        cfg: DVTCfg | None = None,
        img_size: Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if "token_grids" in kwargs:
            kwargs.setdefault("base_size", None)
        self.cfg = cfg = _check_cfg(replace(cfg or DVTCfg(), **kwargs), img_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = cfg.embed_dim
        self.num_exits = len(cfg.token_grids)
        self.img_size = _pair(img_size)
        self.base_size = _pair(cfg.base_size or img_size)
        self.global_pool = _check_pool(global_pool)

        self._patches = [
            (cut_side(self.base_size[0], rows, cfg.tokens), cut_side(self.base_size[1], columns, cfg.tokens))
            for rows, columns in map(_pair, cfg.token_grids)
        ]
        grids = self._grids(self.img_size)
        self.normal_token: DVTStage  # the last entry, by its name
        self.stage_names = tuple(_stage_name(index, self.num_exits) for index in range(self.num_exits))
        for index, name in enumerate(self.stage_names):
            self[name] = DVTStage(
                cfg,
                self._patches[index],
                grids[index],
                upstream_grid=grids[index - 1] if index else None,
                last=index + 1 == self.num_exits,
                in_chans=in_chans,
                num_classes=num_classes,
                global_pool=self.global_pool,
                drop_rate=drop_rate,
                proj_drop_rate=proj_drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path_rate=drop_path_rate,
                **dd,
            )
        self.feature_info = [
            dict(num_chs=cfg.embed_dim, reduction=self._patches[-1][0].reduction, module=f"normal_token.blocks.{index}")
            for index in range(cfg.depth)
        ]
        self.init_weights()

    def _grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Token grid of every stage for images of ``img_size``, or ValueError."""
        for side, base, coarsest in zip(img_size, self.base_size, self._patches[0], strict=True):
            if side < 1 or (side != base and side % coarsest.reduction):
                below = side - side % coarsest.reduction
                near = " or ".join(str(size) for size in (below, below + coarsest.reduction) if size > 0)
                raise ValueError(
                    f"an image side of {side} pixels does not divide into tokens {coarsest.reduction} pixels apart; "
                    f"use {near}, or name the token_grids to cut it into."
                )
        grids = [(rows.count(img_size[0]), columns.count(img_size[1])) for rows, columns in self._patches]
        for before, after in zip(grids[:-1], grids[1:], strict=True):
            if after[0] < before[0] or after[1] < before[1]:
                raise ValueError(f"token grids must not shrink from exit to exit, got {grids} at {img_size} pixels.")
        return grids

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise everything, as the authors do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, Performer):
                module.init_weights()
            elif isinstance(module, DVTStage):
                trunc_normal_(module.cls_token, std=0.02)
                module.fill_positions()

    @torch.jit.ignore
    def fuse(self) -> "DVT":
        """Have tokens multiplied by the processor's fastest kernels, in place and for inference only; return ``self``.

        The outputs stay the same up to rounding, the state dict as it is: there is nothing to fold.

        Raises:
            RuntimeError: The model is in training mode.
        """
        check_evaluating(self)
        return use_faster_products(self)

    def begin_exits(self, x: Tensor) -> dict[str, Tensor]:
        """State before the first segment: the images (B, C, H, W), checked."""
        check_has_exits(self.num_exits)
        return {"images": _check_image(x, self.in_chans, self.img_size[0], self.img_size[1])}

    def forward_exit(self, index: int, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, num_classes) of exit ``index`` and the state the next segment starts from.

        Every segment cuts the image anew, so the state keeps the ``images`` (B, C, H, W). With feature reuse it holds
        the ``tokens`` (B, 1 + N, D) before the final norm, with relation reuse the ``relations``
        (B, L*H, 1 + N, 1 + N), the attention logits after what was added to them; in other shapes where other blocks
        are read (see ``DVTStage.forward``). After the last exit it is empty.
        """
        stage = self[self.stage_names[index]]
        images = state["images"]
        x, tokens, relations = stage(images, state.get("tokens"), state.get("relations"))
        logits = stage.forward_head(stage.norm(x))
        if index + 1 == self.num_exits:
            return logits, {}
        state = {"images": images}
        if tokens is not None:
            state["tokens"] = tokens
        if relations is not None:
            state["relations"] = relations
        return logits, state

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        """Tokens (B, 1 + N, D) of every stage, before the final norms."""
        x = _check_image(x, self.in_chans, self.img_size[0], self.img_size[1])
        tokens: Tensor | None = None
        relations: Tensor | None = None
        outputs: list[Tensor] = []
        for stage in self.values():
            final, tokens, relations = stage(x, tokens, relations)
            outputs.append(final)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens (B, 1 + N, D) of the last stage, class token first."""
        return self.normal_token.norm(self._run_stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last exit from ``forward_features``, or its pooled features (B, D)."""
        return self.normal_token.forward_head(x, pre_logits)

    def forward(self, x: Tensor):
        """Logits of the last exit in evaluation, the tuple of every exit's in training."""
        if self.training and self.num_exits > 0 and not torch.jit.is_scripting():
            # Same as forward_exits, with the heads last: timm's FX tests look for the outputs at the graph's end.
            stages = zip(self.values(), self._run_stages(x), strict=True)
            return tuple(stage.forward_head(stage.norm(tokens)) for stage, tokens in stages)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Tokens after the blocks of the last stage, which is the one with the finest grid.

        Args:
            x: Images (B, C, H, W).
            indices: The last n blocks if an int, all if None, else the blocks to take.
            return_prefix_tokens: Return pairs of grid tokens and class token (B, 1, D).
            norm: Apply the final norm to them.
            stop_early: Stop once the last wanted block is done.
            output_fmt: ``NCHW`` or ``NLC``.
            intermediates_only: Return the tokens alone.

        Returns:
            The tokens, or what ``forward_features`` returns and the tokens.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got '{output_fmt}'.")
        take, max_index = feature_take_indices(len(self.normal_token.blocks), indices)
        x = _check_image(x, self.in_chans, self.img_size[0], self.img_size[1])
        tokens: Tensor | None = None
        relations: Tensor | None = None
        for name, earlier in self.items():
            if name != "normal_token":
                _, tokens, relations = earlier(x, tokens, relations)
        stage = self.normal_token
        last = max_index if stop_early else len(stage.blocks)
        final, _, taken = stage.run_blocks(x, tokens, relations, take, last)
        if norm:
            taken = [stage.norm(y) for y in taken]
        prefix = [y[:, :1] for y in taken]
        taken = [y[:, 1:] for y in taken]
        if output_fmt == "NCHW":
            taken = [y.transpose(1, 2).unflatten(2, stage.grid).contiguous() for y in taken]
        if return_prefix_tokens and not torch.jit.is_scripting():
            pairs: Any = list(zip(taken, prefix, strict=True))
            return pairs if intermediates_only else (stage.norm(final), pairs)
        if intermediates_only:
            return taken
        return stage.norm(final), taken

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the intermediate tokens at ``indices`` do not need; return the indices kept.

        The exits go with it unless ``prune_head`` is False.
        """
        take, max_index = feature_take_indices(len(self.normal_token.blocks), indices)
        self.normal_token.blocks = self.normal_token.blocks[: max_index + 1]
        if prune_norm:
            self.normal_token.norm = nn.Identity()
        if prune_head:
            for name in self.stage_names[:-1]:
                self[name].norm = nn.Identity()
            self.reset_classifier(0)
            self.num_exits = 0
        return take

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The classifiers of all exits, shallow to deep."""
        return tuple(stage.head for stage in self.values())

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give every exit a new classifier for ``num_classes`` (0 for none)."""
        if num_classes > 0:
            check_has_exits(self.num_exits)
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        for stage in self.values():
            stage.global_pool = self.global_pool
            head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
            if isinstance(head, nn.Linear):
                trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
            stage.head = head.train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size: Size) -> None:
        """Take images of ``img_size`` from now on, with patches of the size they have; positions are resampled.

        Raises:
            ValueError: The size does not divide into tokens; nothing is changed.
        """
        img_size = _pair(img_size)
        grids = self._grids(img_size)
        upstream: tuple[int, int] | None = None
        for stage, grid in zip(self.values(), grids, strict=True):
            if isinstance(stage.pos_embed, nn.Parameter):
                resized = resample_abs_pos_embed(stage.pos_embed, new_size=grid, old_size=stage.grid)
                stage.pos_embed = nn.Parameter(resized.detach(), requires_grad=stage.pos_embed.requires_grad)
            else:
                stage.pos_embed = stage.pos_embed.new_empty(1, 1 + grid[0] * grid[1], self.embed_dim)
                stage.fill_positions()
            if stage.resize is not None and upstream is not None:
                stage.resize.set_grids(upstream, grid, **get_device_dtype(stage))
                stage.upstream_tokens = 1 + upstream[0] * upstream[1]
            stage.grid = upstream = grid
        self.img_size = img_size
        update_model_input_size(self, img_size)
        # A model built from these arguments has the patches this one has.
        update_model_args(self, token_grids=self.cfg.token_grids, base_size=self.cfg.base_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.values():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class tokens and the learned positions of every stage."""
        return {name for name, _ in self.named_parameters() if name.endswith((".cls_token", ".pos_embed"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates; blocks at the same depth share one, whatever their stage."""
        stem = r"^\w+_token\.(?:cls_token|pos_embed|tokens_to_token|patch_embed|relation_reuse_conv)"
        return dict(stem=stem, blocks=[(r"^\w+_token\.blocks\.(\d+)", None), (r"^\w+_token\.norm", (99999,))])


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}.")
    return global_pool


def _stage_name(index: int, num_exits: int) -> str:
    less = num_exits - 1 - index
    return "less_" * less + "token" if less else "normal_token"


def _create_dvt(variant: str, pretrained: bool, cfg: DVTCfg, **kwargs: Any) -> DVT:
    out_indices = kwargs.pop("out_indices", 3)
    with allow_numpy_data() if pretrained else nullcontext():
        return build_with_checkpoint(
            DVT,
            variant,
            pretrained,
            model_cfg=cfg,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
            **kwargs,
        )


def _cfg(url: str = "", tokens: str = "t2t", num_exits: int = 3, **kwargs: Any) -> dict[str, Any]:
    first = "tokens_to_token.attention1.kqv" if tokens == "t2t" else "patch_embed.proj"
    stages = [_stage_name(index, num_exits) for index in range(num_exits)]
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": tuple(f"{stage}.{first}" for stage in stages),
        "classifier": tuple(f"{stage}.head" for stage in stages),
        "paper_ids": "arXiv:2105.15075",
        "paper_name": "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient Image Recognition",
        "origin_url": "https://github.com/blackfeather-wang/Dynamic-Vision-Transformer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "dvt_t2t_vit_12.in1k": _cfg(share_link("f7987d559f00435caa3d")),
        "dvt_t2t_vit_14.in1k": _cfg(share_link("afda2eec77c7491bbdaf")),
        "dvt_deit_small.in1k": _cfg(share_link("c415017423dd40ab8e72"), tokens="patch"),
        "dvt_t2t_vit_12_2exit.untrained": _cfg(num_exits=2),
        "dvt_test.untrained": _cfg(input_size=(3, 64, 64), crop_pct=1.0),
    }
)

_T2T = partial(DVTCfg, tokens="t2t", qkv_bias=False, norm_eps=1e-5, base_size=224)
_T2T12 = partial(_T2T, embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0)


@register_model
def dvt_t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> DVT:
    """T2T-ViT-12 at 7x7, 10x10 and 14x14 tokens."""
    return _create_dvt("dvt_t2t_vit_12", pretrained, _T2T12(), **kwargs)


@register_model
def dvt_t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> DVT:
    """T2T-ViT-14 at 7x7, 10x10 and 14x14 tokens."""
    cfg = _T2T(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0)
    return _create_dvt("dvt_t2t_vit_14", pretrained, cfg, **kwargs)


@register_model
def dvt_deit_small(pretrained: bool = False, **kwargs: Any) -> DVT:
    """DeiT-small at 7x7, 10x10 and 14x14 tokens."""
    return _create_dvt("dvt_deit_small", pretrained, DVTCfg(base_size=224), **kwargs)


@register_model
def dvt_t2t_vit_12_2exit(pretrained: bool = False, **kwargs: Any) -> DVT:
    """T2T-ViT-12 at 7x7 and 14x14 tokens: the paper's model for measured speed (table 2)."""
    return _create_dvt("dvt_t2t_vit_12_2exit", pretrained, _T2T12(token_grids=(7, 14)), **kwargs)


@register_model
def dvt_test(pretrained: bool = False, **kwargs: Any) -> DVT:
    """A network of 64-pixel images small enough for tests and demonstrations; not from the paper."""
    cfg = _T2T(embed_dim=64, depth=3, num_heads=2, mlp_ratio=2.0, token_grids=(2, 3, 4), base_size=64)
    cfg = replace(cfg, context_hidden=32, context_width=16, t2t_width=32, t2t_features=16)
    return _create_dvt("dvt_test", pretrained, cfg, **kwargs)
