"""The parts of Dyn-Perceiver beside its convolutions: attention between latents and map, a stage, the exits' heads.

A part's form for inference stands below it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ._host import TimmModel
from .kernels import has_own_weights, is_closed
from .layers import (
    AdaptiveAverage,
    FusedBlock,
    FusedLayer,
    adaptive_average,
    add_residual,
    fold_layer_norm,
    project,
    transposed,
)

__all__ = ["CrossAttention", "DynPerceiverStage", "GridConv", "KnowledgeTransfer", "PooledExitHead"]

_GRID = 7  # X2Z reads every feature map as 7 x 7 tokens

# Leaves for FX tracing, where shapes are not known.
torch.fx.wrap("adaptive_average")
torch.fx.wrap("add_residual")
torch.fx.wrap("_read_grid")


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H*W, C): a view of a channels_last map."""
    return x.flatten(2).transpose(1, 2)


class CrossAttention(nn.Module):
    """One head of attention from query tokens to other tokens, and an MLP, each with pre-norm and residual.

    Keys and values come from one projection. With ``num_keys`` a learned position is added to each projected key, which
    the paper calls a relative position bias: it is the bias ``q @ position`` of the attention scores.
    """

    def __init__(
        self, query_width: int, width: int, attn_width: int, num_keys: int = 0, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.q_norm = nn.LayerNorm(query_width, **dd)
        self.kv_norm = nn.LayerNorm(width, **dd)
        self.q = nn.Linear(query_width, attn_width, bias=False, **dd)
        self.kv = nn.Linear(width, 2 * attn_width, bias=False, **dd)
        self.key_position = nn.Parameter(torch.zeros(1, num_keys, attn_width, **dd)) if num_keys else None
        self.proj = nn.Linear(attn_width, query_width, **dd)
        self.norm = nn.LayerNorm(query_width, **dd)
        self.mlp = Mlp(query_width, query_width, **dd)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, Q, query_width) informed by ``tokens`` (B, N, width)."""
        q = self.q(self.q_norm(query))
        k, v = self.kv(self.kv_norm(tokens)).chunk(2, dim=-1)
        if self.key_position is not None:
            k = k + self.key_position
        attended = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        query = query + self.proj(attended)
        return query + self.mlp(self.norm(query))


class FusedCrossAttention(FusedLayer):
    """What ``CrossAttention`` computes, for inference only: affine parts and key positions are in the projections."""

    q_weight: Tensor
    q_bias: Tensor
    kv_weight: Tensor
    kv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(self, layer: CrossAttention) -> None:
        super().__init__()
        mlp: TimmModel = layer.mlp  # of linear layers here, of convolutions elsewhere
        self.query_width, self.width = layer.q.in_features, layer.kv.in_features
        self.eps = layer.norm.eps
        kv_weight, kv_bias = fold_layer_norm(layer.kv_norm, layer.kv)
        if layer.key_position is not None:
            kv_bias = kv_bias + F.pad(layer.key_position.detach(), (0, layer.key_position.shape[2]))
        self._register(
            q=fold_layer_norm(layer.q_norm, layer.q),
            kv=(kv_weight, kv_bias),
            proj=transposed(layer.proj),
            fc1=fold_layer_norm(layer.norm, mlp.fc1),
            fc2=transposed(mlp.fc2),
        )

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q = project(F.layer_norm(query, [self.query_width], eps=self.eps), self.q_weight, self.q_bias)
        kv = F.layer_norm(tokens, [self.width], eps=self.eps) @ self.kv_weight + self.kv_bias
        k, v = kv.unsqueeze(1).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(q.unsqueeze(1), k, v).squeeze(1)
        query = add_residual(query, project(attended, self.proj_weight, self.proj_bias))
        hidden = project(F.layer_norm(query, [self.query_width], eps=self.eps), self.fc1_weight, self.fc1_bias)
        return add_residual(query, project(F.gelu(hidden), self.fc2_weight, self.fc2_bias))


class GridConv(nn.Conv2d):
    """The map as X2Z reads it: a depthwise 7x7 convolution with residual, averaged to a grid of 7x7 positions."""

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(width, width, _GRID, padding=_GRID // 2, groups=width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 7, 7)."""
        rows, columns = self.kernel_size
        return adaptive_average(self._conv_forward(x, self.weight, self.bias) + x, rows, columns)


def _pooled_kernel(weight: Tensor, height: int, width: int) -> Tensor:
    """Kernel of the convolution that equals ``weight`` (C, 1, h, w) followed by means over ``height`` x ``width``."""
    box = torch.full((1, 1, height, width), 1.0 / (height * width), device=weight.device, dtype=weight.dtype)
    margins = [width - 1, width - 1, height - 1, height - 1]
    return F.conv2d(F.pad(weight, margins), box)


def _read_grid(x: Tensor, weight: Tensor, bias: Tensor, pooled: Tensor, window: list[int]) -> Tensor:
    """Depthwise convolution with ``weight`` (C, 1, h, w), averaged to as many positions as the kernel has.

    Averaging over equal windows is a convolution too. Where they are equal, the two are one, with the stride of the
    window: 26 times fewer operations on a map of 112 x 112. ``pooled`` is its kernel for windows of size ``window``.
    """
    rows, columns = weight.shape[2], weight.shape[3]
    height, width = x.shape[2], x.shape[3]
    padding = [rows // 2, columns // 2]
    any_size = not torch.jit.is_scripting() and (  # a graph that is to be run on maps of other sizes too
        torch.jit.is_tracing() or isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)
    )
    if any_size or height % rows != 0 or width % columns != 0:
        x = F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
        return adaptive_average(x, rows, columns)
    stride = [height // rows, width // columns]
    if stride != window:
        pooled = _pooled_kernel(weight, stride[0], stride[1])
    return F.conv2d(x, pooled, bias, stride=stride, padding=padding, groups=x.shape[1])


class FusedGridConv(nn.Module):
    """What ``GridConv`` computes, for inference only, fastest on maps of ``height`` x ``width``."""

    weight: Tensor
    bias: Tensor
    pooled: Tensor

    def __init__(self, conv: GridConv, height: int, width: int) -> None:
        super().__init__()
        weight = conv.weight.detach().clone()
        weight[:, :, _GRID // 2, _GRID // 2] += 1  # the residual
        self.window = [max(height // _GRID, 1), max(width // _GRID, 1)]
        self.register_buffer("weight", weight)
        self.register_buffer("bias", conv.get_parameter("bias").detach())
        self.register_buffer("pooled", _pooled_kernel(weight, self.window[0], self.window[1]))

    def forward(self, x: Tensor) -> Tensor:
        return _read_grid(x, self.weight, self.bias, self.pooled, self.window)


class TokenMixer(nn.Module):
    """Halves the tokens: LayerNorm and Linear along them."""

    def __init__(self, num_tokens: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(num_tokens, **dd)
        self.fc = nn.Linear(num_tokens, num_tokens // 2, **dd)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, C) to (B, L/2, C)."""
        return self.fc(self.norm(z.transpose(1, 2))).transpose(1, 2)


class ChannelExpander(nn.Module):
    """Takes the latent tokens to the next stage's channels."""

    def __init__(self, width: int, out_width: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(width, **dd)
        self.fc = nn.Linear(width, out_width, **dd)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc(self.norm(z))


class DynPerceiverStage(nn.Module):
    """One stage of both branches: latents read the map (X2Z), the map is convolved, the map reads the latents (Z2X).

    The three steps are separate methods because exits lie between them.

    Args:
        blocks: The convolutions, from ``width`` to ``out_width`` channels.
        latent_width, latent_out_width: Channels of the latents that enter the stage, and of those that leave it.
        num_tokens: Latents that enter; the token mixer halves them.
        x2z, grid_conv, z2x, token_mixer: Whether the stage has these parts.
        latents: Whether it has anything but the convolutions.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        width: int,
        out_width: int,
        latent_width: int,
        latent_out_width: int,
        num_tokens: int,
        num_heads: int,
        latent_depth: int,
        mlp_ratio: float,
        x2z: bool = True,
        grid_conv: bool = True,
        z2x: bool = True,
        token_mixer: bool = True,
        latents: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grid: nn.Module = nn.Identity()
        self.x2z: CrossAttention | FusedCrossAttention | None = None
        self.z2x: CrossAttention | FusedCrossAttention | None = None
        if x2z and latents:
            self.grid = GridConv(width, **dd) if grid_conv else AdaptiveAverage(_GRID, _GRID)
            self.x2z = CrossAttention(latent_width, width, latent_width, num_keys=_GRID * _GRID, **dd)
        depth = latent_depth if latents else 0
        self.self_attn = nn.Sequential(
            *[Block(latent_width, num_heads, mlp_ratio, norm_layer=nn.LayerNorm, **dd) for _ in range(depth)]
        )
        self.blocks = blocks
        mixes = token_mixer and latents
        self.token_mixer: nn.Module = TokenMixer(num_tokens, **dd) if mixes else nn.Identity()
        self.channel_expander: nn.Module = (
            ChannelExpander(latent_width, latent_out_width, **dd) if mixes else nn.Identity()
        )
        if z2x and latents:
            self.z2x = CrossAttention(out_width, latent_out_width, out_width // 8, **dd)
        self.grad_checkpointing = False

    def read(self, x: Tensor, z: Tensor) -> Tensor:
        """Latents (B, L, C) that have read the map ``x`` (B, C, H, W) entering this stage, then themselves."""
        if self.x2z is not None:
            z = self.x2z(z, _to_tokens(self.grid(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.self_attn, z)
        return self.self_attn(z)

    def convolve(self, x: Tensor) -> Tensor:
        """The feature map (B, C', H', W') after this stage's convolutions."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def expand(self, z: Tensor) -> Tensor:
        """Half as many latents, in the next stage's channels; the same latents where there is no token mixer."""
        return self.channel_expander(self.token_mixer(z))

    def write(self, x: Tensor, z: Tensor) -> Tensor:
        """The map with every position informed by the latents ``z`` that leave this stage."""
        if self.z2x is None:
            return x
        return self.z2x(_to_tokens(x), z).transpose(1, 2).reshape(x.shape)

    def keep_convolutions(self) -> None:
        """Drop the latents' part of this stage."""
        self.x2z = self.z2x = None
        self.grid = self.token_mixer = self.channel_expander = nn.Identity()
        self.self_attn = nn.Sequential()

    def fuse(self, height: int, width: int) -> None:
        """Put the inference forms of the latents' parts in place, fastest on maps of ``height`` x ``width``."""
        if isinstance(self.x2z, CrossAttention):
            if isinstance(self.grid, GridConv) and has_own_weights(self.grid) and is_closed(self.grid):
                self.grid = FusedGridConv(self.grid, height, width)
            if is_closed(self.x2z):
                self.x2z = FusedCrossAttention(self.x2z)
        for index, block in enumerate(self.self_attn):
            if FusedBlock.replaces(block):
                self.self_attn[index] = FusedBlock(block)
        if isinstance(self.z2x, CrossAttention) and is_closed(self.z2x):
            self.z2x = FusedCrossAttention(self.z2x)


class PooledExitHead(nn.Module):
    """One exit of pooled features (B, width): optionally a batch norm and a hidden layer before the linear layer."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        batch_norm: bool = False,
        hidden_width: int = 0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.BatchNorm1d(width, **dd) if batch_norm else nn.Identity()
        self.hidden: nn.Module = nn.Identity()
        if hidden_width:
            self.hidden = nn.Sequential(nn.Linear(width, hidden_width, **dd), nn.Hardswish(), nn.Dropout(drop_rate))
        self.fc = nn.Linear(hidden_width or width, num_classes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.norm(x)))


class KnowledgeTransfer(nn.Module):
    """What an exit's logits tell a later exit (the paper's FKT): Linear, BatchNorm, ReLU."""

    def __init__(self, num_classes: int, width: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc = nn.Linear(num_classes, width, **dd)
        self.norm = nn.BatchNorm1d(width, **dd)
        self.act = nn.ReLU()

    def forward(self, logits: Tensor) -> Tensor:
        return self.act(self.norm(self.fc(logits)))
