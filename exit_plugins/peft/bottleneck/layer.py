"""The bottleneck adapter layer: a small residual MLP behind a linear layer."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..._modules import ModuleDict
from ..tuner import AdapterLayer, xavier_linear
from .config import BottleneckConfig

__all__ = ["BottleneckLayer"]


class BottleneckLayer(nn.Module, AdapterLayer):
    """``h + sum_i W2_i dropout(GELU(W1_i h))`` over the active adapters i, where ``h = base_layer(x)``."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "r")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        AdapterLayer.__init__(self, base_layer, adapter_name)
        self.bottleneck_down: ModuleDict[nn.Linear] = ModuleDict()
        self.bottleneck_up: ModuleDict[nn.Linear] = ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: BottleneckConfig, r: int, dropout: float) -> None:
        """Give the layer the adapter ``adapter_name``, replacing one of that name."""
        self.r[adapter_name] = r
        bias_std = 1e-6 if config.init_weights else 0.02
        self.bottleneck_down[adapter_name] = xavier_linear(self.out_features, r, bias_std)
        self.bottleneck_up[adapter_name] = xavier_linear(r, self.out_features, bias_std)
        self.bottleneck_dropout[adapter_name] = nn.Dropout(dropout)
        if config.init == "identity" and config.init_weights:
            nn.init.zeros_(self.bottleneck_up[adapter_name].weight)
            nn.init.zeros_(self.bottleneck_up[adapter_name].bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return h
        result = h
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            hidden = F.gelu(self.project(self._cast_input_dtype(h, down.weight.dtype), down.weight, down.bias))
            delta = self.project(self.bottleneck_dropout[name](hidden), up.weight, up.bias)
            result = result + delta.to(h.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises ValueError: there is nothing to merge a non-linear adapter into."""
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Always raises ValueError, as ``merge`` does."""
        raise ValueError(NOT_MERGEABLE)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


NOT_MERGEABLE = (
    "a bottleneck adapter is not linear and cannot be merged into the base model. Use the model as it is, call "
    "unload() to get the base model back, or train LoRA or RepAdapter, which can be merged."
)
