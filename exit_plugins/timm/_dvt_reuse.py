"""What an exit of a DVT takes from the exit before it: its tokens and its attention (section 3.2 of the paper)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = ["DVTBlock", "ReuseAttention", "TokenResize"]


class TokenResize(nn.Module):
    """Takes rows that stand for the class token and a grid of tokens to a finer grid (section 3.2, figure 5).

    Along each side: nearest upsampling to the next multiple of the old token count that is not below the new one, then
    adaptive average pooling. Each new token is thus the mean of at most two old ones, so two gathers and one
    interpolation do a side. The class token, row 0, stays.

    Args:
        old_grid, new_grid: Tokens (h, w) before and after.
        naive_maps: Maps between tokens are resized as images of their rows and columns, whatever token these stand for.
    """

    width_first: Tensor
    width_second: Tensor
    width_weight: Tensor
    height_first: Tensor
    height_second: Tensor
    height_weight: Tensor

    def __init__(
        self,
        old_grid: tuple[int, int],
        new_grid: tuple[int, int],
        naive_maps: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.naive_maps = naive_maps
        self.set_grids(old_grid, new_grid, device, dtype)

    def set_grids(
        self, old_grid: tuple[int, int], new_grid: tuple[int, int], device: Any = None, dtype: Any = None
    ) -> None:
        """Take ``old_grid`` (h, w) to ``new_grid`` from now on."""
        self.old_grid, self.new_grid = old_grid, new_grid
        rows = old_grid[0] * new_grid[1] + 1
        tokens = new_grid[0] * new_grid[1] + 1
        for name, length in (("width", rows), ("height", tokens)):
            for end in ("first", "second"):
                index = torch.empty(length, dtype=torch.int64, device=device)
                self.register_buffer(f"{name}_{end}", index, persistent=False)
            self.register_buffer(f"{name}_weight", torch.empty(length, 1, device=device, dtype=dtype), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the tables (timm calls this after building a model on the meta device)."""
        (old_h, old_w), (new_h, new_w) = self.old_grid, self.new_grid
        first, second, weight = _two_taps(old_w, new_w)
        row = np.arange(old_h)[:, None] * old_w
        self._fill("width", row + first, row + second, np.broadcast_to(weight, (old_h, new_w)))
        first, second, weight = _two_taps(old_h, new_h)
        column = np.arange(new_w)
        self._fill(
            "height",
            first[:, None] * new_w + column,
            second[:, None] * new_w + column,
            np.broadcast_to(weight[:, None], (new_h, new_w)),
        )

    def _fill(self, name: str, first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> None:
        for end, index in (("first", first), ("second", second)):
            self.get_buffer(f"{name}_{end}").copy_(torch.from_numpy(np.append(0, index.ravel() + 1)))
        self.get_buffer(f"{name}_weight").copy_(torch.from_numpy(np.append(0.0, weight.ravel())[:, None]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., 1 + h*w, C) to (..., 1 + h'*w', C)."""
        first, second = x.index_select(-2, self.width_first), x.index_select(-2, self.width_second)
        x = torch.lerp(first, second, self.width_weight.to(x.dtype))
        first, second = x.index_select(-2, self.height_first), x.index_select(-2, self.height_second)
        return torch.lerp(first, second, self.height_weight.to(x.dtype))

    def both_axes(self, x: Tensor) -> Tensor:
        """Maps between tokens, (B, H, N, N) to (B, H, N', N'): keys first, then queries."""
        if self.naive_maps:
            tokens = self.new_grid[0] * self.new_grid[1]
            inner = F.interpolate(x[:, :, 1:, 1:], size=[tokens, tokens], mode="bilinear")
            to_class = F.interpolate(x[:, :, 1:, :1], size=[tokens, 1], mode="bilinear")
            of_class = F.interpolate(x[:, :, :1, 1:], size=[1, tokens], mode="bilinear")
            top = torch.cat([x[:, :, :1, :1], of_class], dim=3)
            return torch.cat([top, torch.cat([to_class, inner], dim=3)], dim=2)
        # Gathering whole rows is several times faster than gathering along the last axis.
        x = self.forward(x.transpose(-2, -1).contiguous())
        return self.forward(x.transpose(-2, -1).contiguous())


def _two_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new token of a side the two old tokens it is made of and the second's weight."""
    factor = -(-new // old)
    upsampled = factor * old
    start = np.arange(new) * upsampled // new
    stop = -(-(np.arange(new) + 1) * upsampled // new)
    first, second = start // factor, (stop - 1) // factor
    weight = (stop - second * factor) / (stop - start)
    return first, second, np.where(first == second, 0.0, weight)


# timm's layers whose forward takes and returns more here than theirs does. That is said by these names: a comment for
# the type checker on the method TorchScript would take for one of its own.
_Attention: Any = Attention
_Block: Any = Block


class ReuseAttention(_Attention):
    """Self-attention whose logits can be added to and handed on (eq. 9).

    It stays on the fused kernel unless somebody asks for the logits.
    """

    def forward(
        self, x: Tensor, added: Tensor | None = None, return_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attended tokens (B, N, D) and, if asked for, the logits (B, H, N, N) after ``added`` is in them."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        logits: Tensor | None = None
        if return_logits or not self.fused_attn:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if added is not None:
                scores = scores + added
            x = self.attn_drop(scores.softmax(dim=-1)) @ v
            if return_logits:
                logits = scores
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout)
        x = x.transpose(1, 2).reshape(batch, length, self.attn_dim)
        return self.proj_drop(self.proj(x)), logits


class DVTBlock(_Block):
    """timm's transformer block with both kinds of reuse.

    Args:
        context_hidden: Hidden width of f_l (eq. 4).
        context_width: D', its output's width; 0 for no feature reuse.
        context_norm: Whether it begins with a LayerNorm.
        context_class_token: Whether it takes the class token too.
        resize: Takes the exit before's tokens to this one's; None in the first exit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        context_hidden: int = 0,
        context_width: int = 0,
        context_norm: bool = True,
        context_class_token: bool = False,
        resize: TokenResize | None = None,
        proj_drop: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        kwargs = dict(proj_drop=proj_drop, norm_layer=norm_layer, attn_layer=ReuseAttention, **kwargs)
        super().__init__(dim, num_heads, mlp_ratio, **kwargs, **dd)
        self.resize = resize
        self.context_class_token = context_class_token
        self.feature_resuse_mlp = None  # so spelled in the published weights
        if context_width:
            self.feature_resuse_mlp = nn.Sequential(
                norm_layer(dim, **dd) if context_norm else nn.Identity(), Mlp(dim, context_hidden, context_width, **dd)
            )
            self.norm2 = norm_layer(dim + context_width, **dd)
            self.mlp = Mlp(dim + context_width, int(dim * mlp_ratio), dim, drop=proj_drop, **dd)

    def forward(
        self, x: Tensor, context: Tensor | None = None, relation: Tensor | None = None, return_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) and, if asked for, this block's attention logits (B, H, N, N).

        ``context`` (B, N_up, D) and ``relation`` (B, H, N_up, N_up) come from the exit before.
        """
        added: Tensor | None = None
        if self.resize is not None and relation is not None:
            added = self.resize.both_axes(relation)
        attended, logits = self.attn(self.norm1(x), added, return_logits)
        x = x + self.drop_path1(self.ls1(attended))
        y = x
        if self.resize is not None and self.feature_resuse_mlp is not None and context is not None:
            if self.context_class_token:
                embedding = self.feature_resuse_mlp(context)
            else:  # its row is zero
                embedding = F.pad(self.feature_resuse_mlp(context[:, 1:]), (0, 0, 1, 0))
            y = torch.cat([x, self.resize(embedding)], dim=-1)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(y)))), logits
