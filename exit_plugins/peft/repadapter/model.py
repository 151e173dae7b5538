"""The RepAdapter tuner."""

from typing import Any

from .._host import LORA_TARGETS
from ..tuner import AdapterModel
from .layer import RepAdapterLayer

__all__ = ["RepAdapterModel"]

# Names under which query, key and value projections stand side by side in the attention of known libraries.
_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("to_q", "to_k", "to_v"))


class RepAdapterModel(AdapterModel):
    """A model adapted by RepAdapter; made by ``peft.get_peft_model(model, RepAdapterConfig(...))``.

    Attributes:
        model: the adapted model.
        peft_config: the configurations by adapter name.
    """

    prefix = "repadapter_"
    tuner_layer_cls = RepAdapterLayer
    target_module_mapping: dict[str, Any] = {
        **LORA_TARGETS,
        **dict.fromkeys(("vit", "deit", "dinov2", "beit"), ["q_proj", "k_proj", "v_proj", "fc1"]),
    }

    def _after_update(self, config, adapter_name, layer, target_name, parent) -> None:
        if not config.share_qkv:
            return
        for names in _QKV:
            if target_name not in names:
                continue
            for name in names:
                source = getattr(parent, name, None)
                if name == target_name or not isinstance(source, RepAdapterLayer):
                    continue
                if adapter_name in source.repadapter_A and source.in_features == layer.in_features:
                    layer.share(adapter_name, source)
                    return
