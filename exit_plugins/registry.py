"""MMEngine's way in: with this module present, ``type="exit_plugins.DynPerceiver"`` works in any config as it is.

MMEngine imports ``{scope}.registry`` itself for a type written ``scope.Name``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

from .mmdet import DynPerceiver, TimmBackbone

__all__ = ["MODELS"]

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="exit_plugins")
for _backbone in (DynPerceiver, TimmBackbone):
    MODELS.register_module(module=_backbone)
