"""Base models in half precision or quantised: what is trained stays in single precision, and what cannot be merged."""

from functools import partial
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from ..exits.meta import is_quantised
from ._host import BaseTunerLayer, ModulesToSaveWrapper

__all__ = ["check_mergeable", "halve_saved", "single_saved"]

_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_HALF = (torch.float16, torch.bfloat16)


def check_mergeable(model: nn.Module, method: str) -> None:
    """TypeError naming the first layer of ``model``, quantised or standardised, that an adapter cannot be merged into.

    PEFT has layers of its own for some methods over some quantised layers, which merge after dequantising: those pass.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            if "base_layer" in layer._modules:  # timm's DLA
                raise TypeError(
                    f"{method} cannot be merged into this {type(layer).__name__}: it has a part called base_layer, "
                    "by which PEFT tells adapted layers from others. Use the adapted model as it is."
                )
            continue
        base = layer.get_base_layer()
        if isinstance(base, _STANDARDISED):
            raise TypeError(
                f"{method} cannot be merged into {name}: a {type(base).__name__} standardises its weight at every "
                "call, the merged one as well, and would compute something else. Use the adapted model as it is."
            )
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or not is_quantised(weight):
            continue
        # The ordinary layers of a method stand in its module called layer; torchao's may lack what merging needs.
        made_for_it = not type(layer).__module__.endswith(".layer")
        if not made_for_it or getattr(layer, "get_apply_tensor_subclass", True) is None:
            raise TypeError(
                f"{method} cannot be merged into a quantised layer, and {name} is one "
                f"({type(weight.detach()).__name__}, {weight.dtype}): load the base model unquantised to merge, or use "
                "the adapted model as it is."
            )


def single_saved(model: nn.Module, adapter_name: str, classifiers: list[str]) -> None:
    """Keep the modules that are trained in full for the adapter in single precision in a half-precision model.

    PEFT does so with adapters and leaves these in half precision, in which AdamW's epsilon vanishes and float16 turns
    to NaN within a step. Inputs are cast on the way in; outputs on the way out too, but for the classifiers', whose
    logits stay in single precision.
    """
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in wrapper.modules_to_save:
            continue
        module = wrapper.modules_to_save[adapter_name]
        half = {p.dtype for p in module.parameters()} & set(_HALF)
        if half:
            dtype = half.pop()
            module.float()
            module.register_forward_pre_hook(partial(_cast_inputs, back_to=dtype), with_kwargs=True)
            if name not in classifiers:
                module.register_forward_hook(partial(_cast_output, dtype=dtype))


def halve_saved(model: nn.Module) -> None:
    """Undo ``single_saved`` in a model whose adapters are merged: all is in the base model's precision again."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and hook.func is _cast_inputs:
                module.to(hook.keywords["back_to"])
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, partial) and hook.func is _cast_output:
                del module._forward_hooks[key]


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict, back_to: torch.dtype) -> tuple[tuple, dict]:
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _cast_output(module: nn.Module, args: tuple, output: Any, dtype: torch.dtype) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output
