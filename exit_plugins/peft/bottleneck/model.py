"""The bottleneck adapter's tuner."""

from ..tuner import AdapterModel
from .layer import NOT_MERGEABLE, BottleneckLayer

__all__ = ["BottleneckModel"]


class BottleneckModel(AdapterModel):
    """A model with bottleneck adapters; made by ``peft.get_peft_model(model, BottleneckConfig(...))``.

    Attributes:
        model: the adapted model.
        peft_config: the configurations by adapter name.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    # The MLP's output projection.
    target_module_mapping = {
        **dict.fromkeys(("vit", "deit", "dinov2", "beit"), ["fc2"]),
        **dict.fromkeys(("opt",), ["fc2"]),
        **dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), ["down_proj"]),
        **dict.fromkeys(("bert", "roberta", "deberta-v2"), ["output.dense"]),
        "gpt_neox": ["dense_4h_to_h"],
        "t5": ["wo"],
    }

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)
