"""The RepAdapter layer: a linear bottleneck in front of a linear layer, foldable into it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..._modules import ModuleDict
from ...exits.meta import is_quantised
from .._host import HostModel, check_adapters_to_merge
from ..tuner import AdapterLayer, xavier_linear
from .config import RepAdapterConfig

__all__ = ["RepAdapterLayer"]


class RepAdapterLayer(nn.Module, AdapterLayer):
    """``base_layer(x + sum_i s_i * (B_i dropout(A_i x + a_i) + b_i))`` over the active adapters i.

    ``repadapter_A[name]`` is a Linear(d, r). ``repadapter_B[name]`` holds weight (d, r / groups) and bias (d,): row k
    belongs to group ``k // (d / groups)`` and sees only that group's hidden units, as a grouped 1 x 1 convolution does.
    The sum over adapters makes merging independent of its order.
    """

    adapter_layer_names = ("repadapter_A", "repadapter_B")
    other_param_names = ("repadapter_dropout", "r", "groups", "scaling", "initial_scaling", "repadapter_source")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        AdapterLayer.__init__(self, base_layer, adapter_name)
        self.repadapter_A: ModuleDict[nn.Linear] = ModuleDict()
        self.repadapter_B: ModuleDict[nn.Linear] = ModuleDict()
        self.repadapter_dropout = nn.ModuleDict()
        self.groups: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        # The layer whose adapter this one uses, where query, key and value share one. A dictionary does not register
        # it as a submodule: the adapter is counted, saved and moved once.
        self.repadapter_source: dict[str, RepAdapterLayer] = {}
        self._merged: dict[str, tuple[Tensor, Tensor]] = {}  # adapter -> (W U, W c), enough to take it out again
        self._bias_added = False

    def update_layer(self, adapter_name: str, config: RepAdapterConfig, r: int, dropout: float, scale: float) -> None:
        """Give the layer the adapter ``adapter_name``, replacing one of that name.

        ValueError if ``config.groups`` does not divide the layer's input features.
        """
        if self.in_features % config.groups:
            raise ValueError(
                f"groups={config.groups} does not divide the {self.in_features} input features of "
                f"{self.get_base_layer()}; choose groups that do, or leave the layer out of target_modules."
            )
        self.repadapter_source.pop(adapter_name, None)
        self.r[adapter_name] = r
        self.groups[adapter_name] = config.groups
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = scale
        self.repadapter_dropout[adapter_name] = nn.Dropout(dropout)
        self.repadapter_A[adapter_name] = xavier_linear(self.in_features, r)
        up = xavier_linear(r // config.groups, self.in_features)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        self.repadapter_B[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def share(self, adapter_name: str, source: "RepAdapterLayer") -> None:
        """Use the adapter of ``source``, which reads the same input, in place of an own one.

        ValueError if the two adapters are not of one shape and scale.
        """
        mine, theirs = (
            (layer.in_features, layer.r[adapter_name], layer.scaling[adapter_name]) for layer in (self, source)
        )
        if mine != theirs:
            raise ValueError(
                f"query, key and value share one adapter but differ in (input features, r, scale): {theirs} and "
                f"{mine}. Give them the same patterns, or set share_qkv=False."
            )
        for name in ("repadapter_A", "repadapter_B", "repadapter_dropout", "r", "groups", "scaling", "initial_scaling"):
            getattr(self, name).pop(adapter_name)
        self.repadapter_source[adapter_name] = source

    def _holder(self, adapter_name: str) -> "RepAdapterLayer | None":
        holder = self.repadapter_source.get(adapter_name, self)
        return holder if adapter_name in holder.repadapter_A else None

    def _maps(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the adapter ``x -> U (V x + v) + u``: V (r, d), v (r,), U (d, r), u (d,), the scale inside U and u."""
        holder = self.repadapter_source.get(adapter_name, self)
        down, up, scale = (
            holder.repadapter_A[adapter_name],
            holder.repadapter_B[adapter_name],
            holder.scaling[adapter_name],
        )
        # One dense product over all groups is faster than a product per group at these widths.
        dense = torch.block_diag(*up.weight.chunk(holder.groups[adapter_name]))
        return down.weight, down.bias, scale * dense, scale * up.bias

    def adapt(self, x: Tensor) -> Tensor:
        """``x`` as the base layer sees it, adapters included; same shape and type."""
        delta = None
        for name in self.active_adapters:
            holder = self._holder(name)
            if holder is None:
                continue
            down, down_bias, up, up_bias = self._maps(name)
            hidden = self.project(self._cast_input_dtype(x, down.dtype), down, down_bias)
            term = self.project(holder.repadapter_dropout[name](hidden), up, up_bias)
            delta = term if delta is None else delta + term
        return x if delta is None else x + delta.to(x.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            x = self.adapt(x)
        return self.base_layer(x, *args, **kwargs)

    def _weight(self) -> Tensor:
        """The base layer's weight (out, d) without anything merged, in at least single precision."""
        base: HostModel = self.get_base_layer()
        weight: Tensor = base.weight.detach()
        if is_quantised(weight):
            raise TypeError(
                "RepAdapter cannot be merged into a quantised layer; load the base model unquantised to merge."
            )
        weight = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        for name, (wide, _) in self._merged.items():
            weight = weight - wide @ self._maps(name)[0].to(weight)
        return weight

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging adds to the base layer's weight, in that weight's shape (RepAdapter eq. 10: W M)."""
        return self._delta(adapter_name)[0]

    def _delta(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        weight = self._weight()
        down, down_bias, up, up_bias = (t.detach().to(weight) for t in self._maps(adapter_name))
        wide = weight @ up
        base: HostModel = self.get_base_layer()
        delta = (wide @ down).reshape(base.weight.shape)
        return delta, wide, wide @ down_bias + weight @ up_bias

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer: W' = W (I + U V), b' = b + W (U v + u).

        A layer without bias gets one. ``safe_merge`` raises ValueError and changes nothing if the result is not finite.
        """
        base: HostModel = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if self._holder(name) is None:
                continue
            delta, wide, shift = self._delta(name)
            weight = (base.weight.to(delta.dtype) + delta).to(base.weight.dtype)
            bias = (shift if base.bias is None else base.bias.to(shift.dtype) + shift).to(base.weight.dtype)
            if safe_merge and not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise ValueError(
                    f"merging the adapter {name!r} gives weights that are not finite; it seems to be broken."
                )
            base.weight.data = weight
            if base.bias is None:
                base.bias = nn.Parameter(bias, requires_grad=False)
                self._bias_added = True
            else:
                base.bias.data = bias
            self._merged[name] = (wide, shift)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged adapter out again, up to the rounding of the base layer's type."""
        base: HostModel = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            wide, shift = self._merged.pop(name)
            wide, shift = wide.to(base.weight.device), shift.to(base.weight.device)
            delta = (wide @ self._maps(name)[0].to(wide)).reshape(base.weight.shape)
            base.weight.data = (base.weight.to(delta.dtype) - delta).to(base.weight.dtype)
            base.bias.data = (base.bias.to(shift.dtype) - shift).to(base.bias.dtype)
        if self._bias_added:
            base.bias = None
            self._bias_added = False

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to ``scale`` times the configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters by ``scale``."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of the active adapters by ``scale``, or set it back to the configured one."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def __repr__(self) -> str:
        return "repadapter." + super().__repr__()
