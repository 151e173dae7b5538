"""Which family a backbone is of: the door to ``family``, and to those of transformers and timm."""

import transformers

from . import transformers_family  # noqa: F401  registers its families
from ._host import HostModel
from .family import FAMILIES, Family, register_family
from .timm_family import TimmFamily, is_timm

__all__ = ["Family", "find_family", "register_family"]


def find_family(model: HostModel) -> Family:
    """How ``model`` is cut: by a registered family, or, for timm's classification models, by tracing it.

    Raises:
        TypeError: neither; the known families are named, and how to add one.
        ValueError: a timm model that cannot be cut; the message says why.
    """
    for family in FAMILIES:
        if family.accepts(model):
            return family
    if isinstance(model, transformers.TimmWrapperForImageClassification):
        return TimmFamily(model, "timm_model")
    if is_timm(model):
        return TimmFamily(model)
    known = "; ".join(("any timm classification model", *sorted(family.name for family in FAMILIES)))
    raise TypeError(
        f"{type(model).__name__} is of no family whose blocks are known. Known are: {known}. To add one, subclass "
        "exit_plugins.peft.families.Family (its docstrings say what each method returns) and decorate the subclass "
        "with register_family; nothing else changes."
    )
