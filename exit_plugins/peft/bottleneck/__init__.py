"""The bottleneck adapter as a PEFT method: PeftType BOTTLENECK."""

from peft.utils import register_peft_method

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
