"""What the tuners of this wing share: the common fields of a config, and how a layer is wrapped."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ._host import BaseTuner, BaseTunerLayer, HostModel, get_pattern_key

__all__ = ["AdapterConfig", "AdapterLayer", "AdapterModel"]


@dataclass
class AdapterConfig(PeftConfig):
    """Fields common to RepAdapter and Bottleneck.

    Args:
        r: Width of the adapter's hidden layer.
        target_modules: Names of the modules to adapt: a list of names or endings of names, or one regular expression
            matched against the whole name. May be left out on transformers models this package knows.
        exclude_modules: Names that are left alone, given in the same way.
        dropout: Dropout probability between the two projections.
        rank_pattern: Other ``r`` for the modules whose name ends in, or matches, the key.
        dropout_pattern: Other ``dropout``, in the same way.
        layers_to_transform: Indices of the blocks to adapt; all if left out.
        layers_pattern: Name of the list of blocks; needed with ``layers_to_transform`` where nothing stands in front
            of that list, as in timm models (``"blocks"``).
        bias: Which biases of the base model are trained along: ``"none"``, ``"all"`` or those of the adapted modules.
        modules_to_save: Modules trained in full and saved with the adapter, a new classifier say.
        init_weights: ``True`` for the method's own initialisation; ``False`` makes adapters that act from the start.
    """

    r: int = field(default=8, metadata={"help": "Width of the adapter's hidden layer."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, or one regular expression."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave alone, or one regular expression."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability between the two projections."})
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or pattern to another r."})
    dropout_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or pattern to other dropout."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all if left out."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that layers_to_transform counts in."}
    )
    bias: str = field(default="none", metadata={"help": "Biases of the base model that are trained along."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    init_weights: bool = field(default=True, metadata={"help": "The method's own initialisation."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and not (
            self.layers_to_transform is None and self.layers_pattern is None
        ):
            raise ValueError(
                "layers_to_transform and layers_pattern select among module names given as a list; with a regular "
                "expression as target_modules, say in it which layers are meant."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices of the layers it names.")
        for rank in (self.r, *self.rank_pattern.values()):
            if rank < 1:
                raise ValueError(f"an adapter's width r must be at least 1, got {rank}.")
        for probability in (self.dropout, *self.dropout_pattern.values()):
            if not 0.0 <= probability < 1.0:
                raise ValueError(f"an adapter's dropout must lie in [0, 1), got {probability}.")

    def of_layer(self, name: str) -> dict[str, Any]:
        """The settings that may differ from layer to layer, for the module called ``name``."""
        return {
            "r": self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r),
            "dropout": self.dropout_pattern.get(get_pattern_key(list(self.dropout_pattern), name), self.dropout),
        }


class AdapterLayer(BaseTunerLayer):
    """Beginning of a tuner layer around an ``nn.Linear`` or an ``nn.Conv2d`` with a 1 x 1 kernel."""

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.r: dict[str, int] = {}
        base = self.get_base_layer()
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        elif isinstance(base, nn.Conv2d):
            if base.kernel_size != (1, 1) or base.groups != 1 or base.padding not in ((0, 0), "valid"):
                raise TypeError(
                    f"an adapter acts on every position alone: expected a 1 x 1 convolution without groups or padding, "
                    f"got {base}. Leave it out of target_modules (or name it in exclude_modules)."
                )
            self.in_features, self.out_features = base.in_channels, base.out_channels
        else:
            raise TypeError(f"expected nn.Linear or a 1 x 1 nn.Conv2d as target module, got {type(base).__name__}.")

    @property
    def channels_first(self) -> bool:
        """Whether features stand in dimension 1 (convolutions) and not in the last."""
        return isinstance(self.get_base_layer(), nn.Conv2d)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Linear map of the features of ``x``, wherever they stand; weight (out, in)."""
        if self.channels_first:
            return nn.functional.conv2d(x, weight[..., None, None], bias)
        return nn.functional.linear(x, weight, bias)


class AdapterModel(BaseTuner):
    """Beginning of a tuner: wraps every target in the tuner's layer class, or adds a further adapter to one."""

    tuner_layer_cls: Any  # an nn.Module and an AdapterLayer, with the method's own ``update_layer``

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: HostModel,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        config, settings = peft_config, peft_config.of_layer(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config, **settings)
            self._after_update(config, adapter_name, target, target_name, parent)
            return
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.update_layer(adapter_name, config, **settings)
        self._after_update(config, adapter_name, layer, target_name, parent)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _after_update(self, config, adapter_name, layer, target_name, parent) -> None:
        """Called once a layer has been given the adapter; ``layer`` may not yet stand in ``parent``."""

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's own assumes that whatever is put back has a weight of its own, which a saved head made of several
        # modules has not.
        setattr(parent, child_name, new_module)
        if isinstance(new_module, self.tuner_layer_cls):
            reference = next(iter(child.parameters()), None)
            if reference is not None and reference.device.type != "meta":
                for name, module in new_module.named_children():
                    if name.startswith(self.prefix) and not any(p.is_meta for p in module.parameters()):
                        module.to(reference.device)


def xavier_linear(in_features: int, out_features: int, bias_std: float = 0.0) -> nn.Linear:
    """Linear layer with Xavier-uniform weight and zero or slightly normal bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.bias.normal_(0.0, bias_std) if bias_std else layer.bias.zero_()
    return layer
