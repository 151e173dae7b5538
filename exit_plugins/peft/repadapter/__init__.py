"""RepAdapter as a PEFT method: PeftType REPADAPTER."""

from peft.utils import register_peft_method

from .config import RepAdapterConfig
from .layer import RepAdapterLayer
from .model import RepAdapterModel

__all__ = ["RepAdapterConfig", "RepAdapterLayer", "RepAdapterModel"]

register_peft_method(name="repadapter", config_cls=RepAdapterConfig, model_cls=RepAdapterModel)
