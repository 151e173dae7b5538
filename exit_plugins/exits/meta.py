"""A network without weights, for questions that only shapes answer."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .protocol import AnyModel

__all__ = ["is_quantised", "meta_copy"]

Model = TypeVar("Model", bound=AnyModel)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight, of any shape, is of integers, or of a class that stands for quantised values (torchao's)."""
    data = weight.detach()
    return not data.is_floating_point() or type(data) is not Tensor and type(data).__name__ != "DTensor"


def meta_copy(model: Model) -> Model:
    """A copy of ``model`` on the meta device, without gradients; nothing is copied but the modules.

    Quantised linear layers, which may not run there, become plain ones of the same shape.
    """
    memo: dict[int, Any] = {}
    dtype = next(
        (p.dtype for p in model.parameters() if p.is_floating_point() and not is_quantised(p)),
        torch.get_default_dtype(),
    )
    replaced: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, Tensor) and is_quantised(weight):
            plain = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta", dtype=dtype
            )
            memo[id(module)] = plain.train(module.training)
            replaced |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in replaced:
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    # Without gradients, or a view of a parameter trips the flop counter's backward hooks even under no_grad.
    shadow = copy.deepcopy(model, memo)
    shadow.requires_grad_(False)
    return shadow
