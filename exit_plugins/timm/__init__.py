"""The timm wing. Importing it registers every architecture: each module here that registers a model with timm."""

import re
from importlib import import_module
from pkgutil import get_data, iter_modules

import timm

if [int(part) for part in re.findall(r"\d+", timm.__version__)[:3]] < [1, 0, 31]:
    raise ImportError(
        f"exit_plugins needs timm 1.0.31 or newer and found {timm.__version__} in {timm.__path__[0]}. If that is a "
        "checkout of timm, which hides the installed one where it is the current folder or the script's: run from "
        'another folder, or by `python -m exit_plugins.timm.train`; else pip install "timm>=1.0.31,<1.1".'
    )

from ._cards import load_from_hf, model_card, save_for_hf
from ._host import registered_modules
from ._shipped import list_shipped, shipped_card, shipped_policy

__all__ = [
    "ARCHITECTURES",
    "list_models",
    "list_shipped",
    "load_from_hf",
    "model_card",
    "save_for_hf",
    "shipped_card",
    "shipped_policy",
]


def _registers_models(name: str) -> bool:
    """Whether a module here registers a model, as its source says: most of the others need not be run for that."""
    source = get_data(__name__, f"{name}.py")
    return source is not None and re.search(rb"@register_model\b|\bregister_model\(", source) is not None


ARCHITECTURES = sorted(
    module.name for module in iter_modules(__path__) if module.name[0] != "_" and _registers_models(module.name)
)
for _name in ARCHITECTURES:
    import_module(f"{__name__}.{_name}")


_OF_CLIPS = {"video"}


def list_models(clips: bool | None = None) -> list[str]:
    """Names of the timm models this package registers, sorted; with ``clips`` those whose samples are clips, or not."""
    modules = {m for m in ARCHITECTURES if clips is None or (m in _OF_CLIPS) == clips}
    return sorted(name for name, module in registered_modules().items() if module in modules)
