"""The MMDetection wing: Dyn-Perceiver, and any plain timm model beside it, as detection backbones.

Importing it checks that mmcv has its compiled operators, because MMDetection does not say how to get them.
"""

from ._host import check_mmcv_operators  # first: what is missing is said before anything is imported  # isort: skip
from .backbone import DynPerceiver, TimmBackbone

__all__ = ["DynPerceiver", "TimmBackbone", "check_mmcv_operators"]
