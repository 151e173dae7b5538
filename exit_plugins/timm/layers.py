"""Pieces shared by several architectures of the timm wing."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ._host import TimmModel
from .kernels import Network, has_own_weights, is_closed, use_faster_products

__all__ = [
    "AdaptiveAverage",
    "FusedBlock",
    "FusedLayer",
    "adaptive_average",
    "add_residual",
    "check_has_exits",
    "check_image",
    "fold_batch_norms",
    "fold_layer_norm",
    "fold_pair",
    "fuse_convolutions",
    "project",
    "transposed",
]

# Leaves for FX tracing, where types and shapes are not known.
torch.fx.wrap("adaptive_average")
torch.fx.wrap("add_residual")


def check_image(x: Tensor, in_chans: int, min_size: int) -> Tensor:
    """Return ``x`` if it is a batch of images (B, ``in_chans``, H, W) with both sides at least ``min_size`` pixels.

    Raises ValueError that says what was expected if it is not. An architecture that calls it marks it as a leaf for
    FX tracing (``torch.fx.wrap("check_image")``), where shapes are not known.
    """
    if x.ndim != 4:
        raise ValueError(f"expected images of shape (batch, {in_chans}, height, width), got {x.ndim} dimensions.")
    if x.shape[1] != in_chans:
        raise ValueError(
            f"expected images with {in_chans} channels, got {x.shape[1]}: build the model with in_chans={x.shape[1]}."
        )
    if x.shape[2] < min_size or x.shape[3] < min_size:
        raise ValueError(
            f"expected images of at least {min_size}x{min_size} pixels, got {x.shape[2]}x{x.shape[3]}: resize them."
        )
    return x


def check_has_exits(num_exits: int) -> None:
    """RuntimeError where ``prune_intermediate_layers`` left a model no exit to run or to give a classifier."""
    if num_exits == 0:
        raise RuntimeError("this model was pruned to intermediate features and has no exits left; build it anew.")


def adaptive_average(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, H, W) averaged to (B, C, ``rows``, ``columns``): ``F.adaptive_avg_pool2d``, in graphs too at any H and W.

    Graphs that are traced, scripted or exported hold it as sums over windows, one product with a matrix of zeros and
    ones for each side, whose entries are computed from H and W when the graph runs. torch's exporters write the
    windows of the size they saw into the graph, or do not know the operation at all.
    """
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        return F.adaptive_avg_pool2d(x, (rows, columns))
    across, down = _windows(x.shape[3], columns, x), _windows(x.shape[2], rows, x)
    # One side after the other, so that sums stay within half precision.
    x = x @ across.t() / across.sum(1)
    return down @ x / down.sum(1, keepdim=True)


class AdaptiveAverage(nn.Module):
    """``adaptive_average`` to ``rows`` x ``columns`` as a layer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_average(x, self.rows, self.columns)


def _windows(size: int, count: int, like: Tensor) -> Tensor:
    """(count, size) of the kind of ``like``: 1 where a position lies in a window of adaptive pooling, else 0.

    Window i is [floor(i * size / count), ceil((i + 1) * size / count)), said without a division.
    """
    window = torch.arange(count, device=like.device).unsqueeze(1) * size
    position = torch.arange(size, device=like.device) * count
    return ((position + count > window) & (position < window + size)).to(like)


# A norm folds into the layer right before it.
_FOLDS: tuple[tuple[type[nn.Module], type[nn.Module], Callable[[Any, Any], nn.Module]], ...] = (
    (nn.Conv2d, nn.BatchNorm2d, fuse_conv_bn_eval),
    (nn.Linear, nn.BatchNorm1d, fuse_linear_bn_eval),
)


def _foldable(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Each (parent, layer name, norm name, folded layer) where a batch norm is registered right after its layer."""
    for parent in module.modules():
        children = list(parent.named_children())
        for (name, layer), (norm_name, norm) in pairwise(children):
            for layer_type, norm_type, fold in _FOLDS:
                known = isinstance(layer, layer_type) and isinstance(norm, norm_type)
                if known and has_own_weights(layer) and is_closed(norm):
                    yield parent, name, norm_name, fold(layer.eval(), norm.eval())


def fold_batch_norms(module: Network) -> Network:
    """Fold every batch norm that directly follows a convolution or linear layer into it, in place; return ``module``.

    For inference only: the outputs in evaluation mode stay the same up to rounding. What has hooks or computed weights
    stays. timm registers a layer and its norm
    one after the other in all blocks used here, and its combined norm-activation layers keep their activation.
    """
    for parent, name, norm_name, folded in list(_foldable(module)):
        setattr(parent, name, folded)
        setattr(parent, norm_name, getattr(getattr(parent, norm_name), "act", nn.Identity()))
    return module


def fold_pair(net: nn.Module, layer_name: str, norm_name: str) -> None:
    """Fold the module ``norm_name`` into the module ``layer_name`` of ``net``, if they are a pair that can be folded.

    The norm must be the only one to read the layer's output. An activation that is a part of the norm stays.
    """
    layer, norm = net.get_submodule(layer_name), net.get_submodule(norm_name)
    for layer_type, norm_type, fold in _FOLDS:
        # Other convolutions, as those that standardise their weights, are subclasses that no norm folds into.
        plain = type(layer) in (layer_type, Conv2dSame) and has_own_weights(layer)
        if plain and isinstance(norm, norm_type) and is_closed(norm) and norm.running_mean is not None:
            net.set_submodule(layer_name, fold(layer.eval(), norm.eval()))
            net.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))


def fuse_convolutions(module: Network) -> Network:
    """``fold_batch_norms`` and ``use_faster_products``, in place; return ``module``."""
    return use_faster_products(fold_batch_norms(module))


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (in, out) and bias that do after a plain standardisation what ``linear`` does after ``norm``."""
    weight, bias = transposed(linear)
    return weight * norm.weight.detach().unsqueeze(1), bias + norm.bias.detach() @ weight


def transposed(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (in, out) and bias (out,) of ``linear``, the bias zero if it has none."""
    weight = linear.weight.detach().t().contiguous()
    bias = weight.new_zeros(weight.shape[1]) if linear.bias is None else linear.bias.detach()
    return weight, bias


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tokens (B, N, in) times ``weight`` (in, out) plus ``bias``: on few tokens, a third faster than ``F.linear``."""
    return torch.addmm(bias, x.reshape(-1, weight.shape[0]), weight).view(x.shape[0], x.shape[1], weight.shape[1])


def add_residual(x: Tensor, update: Tensor) -> Tensor:
    """``x + update``, in the memory of ``update`` where autocast has not made it narrower than ``x``.

    Both of one shape, (B, ...).
    """
    return update.add_(x) if update.dtype == x.dtype else x + update


class FusedLayer(nn.Module):
    """Base of layers in their inference form: plain tensors, read without calls of submodules.

    With few tokens such calls cost as much as the arithmetic.
    """

    def _register(self, **layers: tuple[Tensor, Tensor]) -> None:
        for name, (weight, bias) in layers.items():
            self.register_parameter(f"{name}_weight", nn.Parameter(weight, requires_grad=False))
            self.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))


class FusedBlock(FusedLayer):
    """What timm's transformer ``Block`` computes in evaluation, the affine parts of its norms in the projections.

    Raises:
        ValueError: The block has parts this form has no place for (layer scale, norms of queries and keys, a gate).
    """

    @staticmethod
    def replaces(block: TimmModel) -> bool:
        """Whether it may stand for ``block``: hooks on the attention's input, as temporal shift's, are taken over."""
        return is_closed(block, entered=[block.attn])

    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(self, block: TimmModel) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        extras = {"q_norm": attn.q_norm, "k_norm": attn.k_norm, "norm": attn.norm, "ls1": block.ls1, "ls2": block.ls2}
        extras |= {"mlp.norm": mlp.norm, "gate": attn.gate or nn.Identity()}
        unknown = [name for name, part in extras.items() if not isinstance(part, nn.Identity)]
        if unknown or not isinstance(mlp.act, nn.GELU) or mlp.act.approximate != "none":
            raise ValueError(f"cannot fuse a transformer block with {', '.join(unknown) or 'this activation'}.")
        self.num_heads = attn.num_heads
        self.width = attn.qkv.in_features
        self.eps2 = block.norm2.eps
        # A temporal shift is a hook on the attention: it stands between the norm and the projection, which then cannot
        # be folded into one.
        hooked = len(attn._forward_pre_hooks) > 0
        if hooked:
            shift = nn.Identity()
            shift._forward_pre_hooks.update(attn._forward_pre_hooks)
            self.enter: nn.Module = nn.Sequential(block.norm1, shift)
        else:
            self.enter = nn.LayerNorm(self.width, eps=block.norm1.eps, elementwise_affine=False)
        self._register(
            qkv=transposed(attn.qkv) if hooked else fold_layer_norm(block.norm1, attn.qkv),
            proj=transposed(attn.proj),
            fc1=fold_layer_norm(block.norm2, mlp.fc1),
            fc2=transposed(mlp.fc2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        batch, tokens, width = x.shape
        qkv = project(self.enter(x), self.qkv_weight, self.qkv_bias)
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = add_residual(x, project(attended, self.proj_weight, self.proj_bias))
        hidden = F.gelu(project(F.layer_norm(x, [self.width], eps=self.eps2), self.fc1_weight, self.fc1_bias))
        return add_residual(x, project(hidden, self.fc2_weight, self.fc2_bias))
