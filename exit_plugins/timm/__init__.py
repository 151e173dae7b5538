"""The timm wing. Importing it registers every architecture: each module here that is not shared machinery is one."""

from importlib import import_module
from pkgutil import iter_modules

from ._cards import model_card, save_for_hf

__all__ = ["ARCHITECTURES", "list_models", "model_card", "save_for_hf"]

_SHARED = {"data", "layers", "train"}

ARCHITECTURES = sorted(m.name for m in iter_modules(__path__) if m.name not in _SHARED and not m.name.startswith("_"))
for _name in ARCHITECTURES:
    import_module(f"{__name__}.{_name}")


def list_models() -> list[str]:
    """Names of the timm models this package registers, sorted."""
    from timm.models import _registry

    return sorted(name for name, module in _registry._model_to_module.items() if module in ARCHITECTURES)
