"""MMEngine's way in: with this module present, ``type="exit_plugins.DynPerceiver"`` works in any config as it is.

MMEngine imports ``{scope}.registry`` for a type written ``scope.Name``, and the registry its ``locations`` when a name
is looked up in it.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

__all__ = ["MODELS"]

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="exit_plugins", locations=["exit_plugins.mmdet"])
