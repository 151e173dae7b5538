"""An image as the tokens of a DVT: how a side is cut into patches, the modules that embed them, fixed positions.

Section numbers are those of DVT's paper; the tokens-to-token module is T2T-ViT's.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PatchTokens", "Patches", "Performer", "T2TTokens", "cut_side", "sinusoids"]

torch.fx.wrap("_at_least_float32")


class Patches(NamedTuple):
    """How one side of an image is cut into patches: ``halvings`` more 3-wide, 2-apart cuts follow the first."""

    kernel: int
    stride: int
    padding: int
    halvings: int

    def count(self, side: int) -> int:
        """Tokens along a side of ``side`` pixels."""
        tokens = (side + 2 * self.padding - self.kernel) // self.stride + 1
        for _ in range(self.halvings):
            tokens = (tokens + 1) // 2
        return tokens

    @property
    def reduction(self) -> int:
        """Pixels from one token to the next."""
        return self.stride << self.halvings


def cut_side(side: int, tokens: int, kind: str) -> Patches:
    """Patches that make ``tokens`` of ``side`` pixels.

    Plain patches touch; those of the tokens-to-token module overlap, 7/4 as wide as they are apart, and are merged by
    two halvings. The padding is the least with which the patches cover the side.
    """
    halvings = 2 if kind == "t2t" else 0
    stride = -(-side // (tokens << halvings))
    kernel = -(-7 * stride // 4) if kind == "t2t" else stride
    covered = (-(-side // stride) - 1) * stride + kernel
    patches = Patches(kernel, stride, max(0, (covered - side + 1) // 2), halvings)
    if patches.count(side) != tokens:
        raise ValueError(
            f"{side} pixels cannot be cut into {tokens} tokens of one size (patches {stride} pixels apart make "
            f"{patches.count(side)}); choose another entry of token_grids."
        )
    return patches


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class Performer(nn.Module):
    """Attention of linear cost over random features with an MLP behind, as in the tokens-to-token module.

    It has one head, and its values, not its input, are the residual: (B, N, dim) becomes (B, N, width).
    """

    w: Tensor

    def __init__(
        self,
        dim: int,
        width: int,
        num_features: int,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.kqv = nn.Linear(dim, 3 * width, **dd)
        self.proj = nn.Linear(width, width, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, **dd)
        self.mlp = nn.Sequential(
            nn.Linear(width, width, **dd), nn.GELU(), nn.Linear(width, width, **dd), nn.Dropout(drop_rate)
        )
        # Drawn once and never trained: a buffer, so that optimizers and DDP leave it alone.
        self.register_buffer("w", torch.empty(num_features, width, **dd))

    def init_weights(self) -> None:
        """Draw the random features anew."""
        num_features, width = self.w.shape
        w = nn.init.orthogonal_(torch.empty(num_features, width, device="cpu"))
        self.w.copy_(w * math.sqrt(num_features))

    def _features(self, u: Tensor) -> Tensor:
        """Positive random features (B, N, m) of ``u`` (B, N, width); their products approximate exp(u . v)."""
        # exp(-|u|^2 / 2) underflows in half precision, and its sum divides.
        u = _at_least_float32(u)
        exponent = u @ self.w.to(u.dtype).t() - u.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.w.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k_features, q_features = self._features(k), self._features(q)
        weighted = q_features @ (k_features.transpose(1, 2) @ _at_least_float32(v))
        total = (q_features * k_features.sum(1, keepdim=True)).sum(-1, keepdim=True)
        x = v + self.drop(self.proj((weighted / (total + 1e-8)).to(v.dtype)))
        return x + self.mlp(self.norm2(x))


class T2TTokens(nn.Module):
    """Tokens-to-token module: overlapping patches, merged twice by attention and a 3x3 unfolding at stride 2."""

    def __init__(
        self,
        patches: tuple[Patches, Patches],
        in_chans: int,
        embed_dim: int,
        width: int,
        num_features: int,
        drop_rate: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        kernel, stride, padding, _ = zip(*patches, strict=True)
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.split = nn.Unfold(kernel, stride=stride, padding=padding)
        self.merge = nn.Unfold(3, stride=2, padding=1)
        performer = partial(Performer, width=width, num_features=num_features, drop_rate=drop_rate)
        self.attention1 = performer(in_chans * kernel[0] * kernel[1], **dd)
        self.attention2 = performer(9 * width, **dd)
        self.project = nn.Linear(9 * width, embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D)."""
        height = (x.shape[2] + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1
        width = (x.shape[3] + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1
        x = self.attention1(self.split(x).transpose(1, 2))
        x = self.merge(x.transpose(1, 2).unflatten(2, (height, width)))
        x = self.attention2(x.transpose(1, 2))
        x = self.merge(x.transpose(1, 2).unflatten(2, ((height + 1) // 2, (width + 1) // 2)))
        return self.project(x.transpose(1, 2))


class PatchTokens(nn.Module):
    """One convolution that cuts touching patches; unlike timm's PatchEmbed it may pad."""

    def __init__(
        self,
        patches: tuple[Patches, Patches],
        in_chans: int,
        embed_dim: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kernel, stride, padding, _ = zip(*patches, strict=True)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride, padding, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


def sinusoids(length: int, width: int) -> np.ndarray:
    """(1, length, width): sine in even, cosine in odd channels j of position / 10000^(2 floor(j/2) / width)."""
    channel = np.arange(width)
    angle = np.arange(length)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))[None]
