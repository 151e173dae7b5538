"""Pieces shared by several architectures of the timm wing."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["check_image", "fold_batch_norms"]


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


def _conv_bn_pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every (parent, convolution name, batch norm name) where the norm is registered right after its convolution."""
    for parent in module.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (bn_name, bn) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and conv.out_channels == bn.num_features:
                yield parent, conv_name, bn_name


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm2d that directly follows a convolution into it, in place; return ``module``.

    For inference only: the outputs in evaluation mode stay the same up to rounding. timm registers a convolution and
    its norm one after the other in all blocks used here, and their combined norm-activation layers keep the activation.
    """
    for parent, conv_name, bn_name in list(_conv_bn_pairs(module)):
        conv, bn = getattr(parent, conv_name), getattr(parent, bn_name)
        setattr(parent, conv_name, fuse_conv_bn_eval(conv.eval(), bn.eval()))
        setattr(parent, bn_name, getattr(bn, "act", nn.Identity()))
    return module
