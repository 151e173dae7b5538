"""Token merging in timm's vision transformers, after ToMe (Bolya et al., ICLR 2023): a rival of early exits.

In every block the r tokens most alike in their keys are averaged, so that each block computes on fewer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MergingBlock(nn.Module):
    """A timm vision transformer block that averages the ``merged`` most similar pairs of tokens after its attention."""

    def __init__(self, block: nn.Module, merged: int) -> None:
        super().__init__()
        self.block, self.merged = block, merged

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) and how many patches each stands for, (B, N, 1)."""
        block, attn = self.block, self.block.attn
        batch, count, width = x.shape
        qkv = attn.qkv(block.norm1(x)).view(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        # Proportional attention: a token that stands for s patches counts s times.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None, :, 0])
        x = x + block.ls1(attn.proj(attended.transpose(1, 2).reshape(batch, count, width)))
        if self.merged:
            x, size = merge_tokens(x, k.mean(1), size, self.merged)
        return x + block.ls2(block.mlp(block.norm2(x))), size


def merge_tokens(x: Tensor, keys: Tensor, size: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: each of the ``merged`` even tokens nearest to an odd one is averaged into it."""
    keys = F.normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, 0] = -math.inf  # the class token stays itself
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged = min(merged, order.shape[1] - 1)
    gone, kept = order[:, :merged, None], order[:, merged:, None].sort(1).values
    partner = partner.gather(1, gone[..., 0])[..., None]

    def joined(t: Tensor) -> Tensor:
        even, odd = t[:, ::2], t[:, 1::2]
        wide = (-1, -1, t.shape[-1])
        moved = even.gather(1, gone.expand(wide))
        return torch.cat((even.gather(1, kept.expand(wide)), odd.scatter_add(1, partner.expand(wide), moved)), 1)

    total = joined(size)
    return joined(x * size) / total, total


class MergingTransformer(nn.Module):
    """A timm vision transformer with token merging in every block."""

    def __init__(self, network: nn.Module, merged: int) -> None:
        super().__init__()
        self.network, self.num_classes = network, network.num_classes
        self.blocks = nn.ModuleList(MergingBlock(block, merged) for block in network.blocks)

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
        size = x.new_ones(x.shape[0], x.shape[1], 1)
        for block in self.blocks:
            x, size = block(x, size)
        return network.forward_head(network.norm(x))
