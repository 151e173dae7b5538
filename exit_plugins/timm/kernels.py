"""Matrix products by whichever of torch's kernels is the fastest on this processor, for inference.

A 1x1 convolution is a product over the positions of a map, a linear layer over tokens one over tokens: either can stand
for the other, and which is faster depends on whose processor it is and on how many images there are.
"""

import platform
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Network",
    "PointwiseConv",
    "TokenLinear",
    "check_evaluating",
    "has_own_weights",
    "is_closed",
    "pointwise",
    "processor",
    "tokenwise",
    "use_faster_products",
]

Network = TypeVar("Network", bound=nn.Module)

FEW = 4  # images up to which torch's convolutions do not go through oneDNN's best kernels
FEW_ON_ONE_THREAD = 15  # there, up to which they do not go through oneDNN at all

# Leaves for FX tracing, where types and shapes are not known.
torch.fx.wrap("pointwise")
torch.fx.wrap("tokenwise")


@cache
def processor() -> str:
    """The processor's maker: ``GenuineIntel``, ``AuthenticAMD``, or nothing where it is neither or cannot be told.

    torch's matrix products are MKL's, which keeps its AVX-512 kernels to Intel's processors. Its convolutions are
    oneDNN's, which has them on AMD's too: there, for more than a few images (``FEW``, ``FEW_ON_ONE_THREAD``), a product
    done as a 1x1 convolution takes half the time.
    """
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        intel_mac = sys.platform == "darwin" and platform.machine() == "x86_64"
        said = "GenuineIntel" if intel_mac else platform.processor()
    return next((maker for maker in ("GenuineIntel", "AuthenticAMD") if maker in said), "")


def check_evaluating(model: nn.Module) -> None:
    """Raise RuntimeError if ``model``, whose ``fuse()`` was called, is in training mode."""
    if model.training:
        raise RuntimeError("fuse() folds batch norms with their running statistics: call model.eval() first.")


def has_own_weights(layer: nn.Module) -> bool:
    """Whether a layer's weights are its own parameters, and its output is read by its callers alone.

    Pruning and norms of weights compute them anew at every call, and a forward hook sees, or changes, what comes out.
    """
    return "weight" in layer._parameters and not layer._forward_hooks


def is_closed(module: nn.Module, entered: Iterable[nn.Module] = ()) -> bool:
    """Whether one form for inference may stand for all of ``module``: nobody listens to it or to what is in it.

    ``entered``: modules in it whose forward pre-hooks the form takes over.
    """
    entered = set(entered)
    return not any(
        part._forward_hooks or hasattr(part, "parametrizations") or (part._forward_pre_hooks and part not in entered)
        for part in module.modules()
    )


def _in_a_graph() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """(B, C, H, W) convolved with ``weight`` (C', C, 1, 1): what ``PointwiseConv`` does."""
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, stride)
    else:  # TorchScript leaves this out
        if _in_a_graph() or x.shape[0] > FEW or processor() != "GenuineIntel":
            return F.conv2d(x, weight, bias, stride)
        if stride != (1, 1):
            x = x[:, :, :: stride[0], :: stride[1]]
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def tokenwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Tokens (B, N, C) or a map (B, H, W, C) times ``weight`` (C', C), and all else: what ``TokenLinear`` does."""
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:  # TorchScript leaves this out
        # A graph must not come to depend on the number of images: that is asked last.
        if _in_a_graph() or x.is_cuda or processor() != "AuthenticAMD" or x.dim() not in (3, 4):
            return F.linear(x, weight, bias)
        if x.shape[0] <= (FEW if torch.get_num_threads() > 1 else FEW_ON_ONE_THREAD):
            return F.linear(x, weight, bias)
        channels_last = (x.unsqueeze(2) if x.dim() == 3 else x).permute(0, 3, 1, 2)
        y = F.conv2d(channels_last, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
        return y.squeeze(2) if x.dim() == 3 else y


class TokenLinear(nn.Linear):
    """A linear layer that is a 1x1 convolution over its tokens where that is faster (``processor``).

    Exported and compiled graphs keep the linear layer.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "TokenLinear":
        """The same layer, with the same parameters."""
        tokenwise = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        tokenwise.weight, tokenwise.bias = linear.weight, linear.bias
        tokenwise._forward_pre_hooks.update(linear._forward_pre_hooks)
        return tokenwise.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C')."""
        return tokenwise(x, self.weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that, for inference on few images, is one matrix product over the positions of the map.

    The map is taken to be in ``channels_last``. On single images torch's convolution leaves that layout and returns to
    it; on more than a handful its kernels are the faster ones. Exported and compiled graphs keep the convolution: their
    engines choose kernels themselves.
    """

    @staticmethod
    def replaces(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether ``module`` is a convolution this one can stand for."""
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.groups == 1
            and module.padding in ("valid", (0, 0))
        )

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "PointwiseConv":
        """The same convolution, with the same parameters."""
        stride = (conv.stride[0], conv.stride[1])
        pointwise = cls(conv.in_channels, conv.out_channels, 1, stride, bias=False, device="meta")
        pointwise.weight, pointwise.bias = conv.weight, conv.bias
        pointwise._forward_pre_hooks.update(conv._forward_pre_hooks)  # a temporal shift is one
        return pointwise.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return pointwise(x, self.weight, self.bias, (self.stride[0], self.stride[1]))


def use_faster_products(module: Network) -> Network:
    """1x1 convolutions as ``PointwiseConv`` and linear layers as ``TokenLinear``, in place; return ``module``.

    Fast in ``channels_last``, right in any layout. Layers that something else computes the weights of, or listens to,
    stay.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Conv2d | nn.Linear) or not has_own_weights(child):
                continue
            if PointwiseConv.replaces(child):
                setattr(parent, name, PointwiseConv.of(child))
            elif type(child) is nn.Linear:
                setattr(parent, name, TokenLinear.of(child))
    return module
