"""Everything of timm that is not its public face: what this wing imports of it, sets on its models, and puts itself in
the place of. Other modules take these names from here, so that a timm that has moved one is named by this file alone.
"""

from typing import Any, TypeAlias

from .._hosts import check_names

__all__ = [
    "SWAPPED",
    "DepthwiseSeparableConv",
    "FeatureGetterNet",
    "InvertedResidual",
    "SqueezeExcite",
    "TimmModel",
    "feature_take_indices",
    "generate_readme",
    "hf_split",
    "model_config",
    "model_traits",
    "registered_modules",
    "resolve_pretrained_source",
    "save_config_for_hf",
    "set_model_config",
    "set_model_traits",
    "update_model_args",
    "update_model_input_size",
]

# A model of timm's: an nn.Module with what timm's users rely on (num_classes, pretrained_cfg, feature_info, blocks), of
# which timm says no types; torch would have each of them be a Tensor or a Module.
TimmModel: TypeAlias = Any

# Names in timm's modules that a launcher puts its own in the place of while a script of timm's runs (``_scripts``).
SWAPPED = {
    "timm.models": ("create_model",),
    "timm.scheduler": ("create_scheduler_v2",),
    "timm.task": (
        "ClassificationTask",
        "MultiLabelClassificationTask",
        "LogitDistillationTask",
        "FeatureDistillationTask",
        "TokenDistillationTask",
    ),
    "timm.utils": ("accuracy", "get_outdir", "update_summary"),
}

# What is imported, subclassed or swapped, with the parameters that are passed by name.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "timm.models._builder._resolve_pretrained_source": ("pretrained_cfg",),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": (),
    "timm.models._efficientnet_blocks.InvertedResidual": (),
    "timm.models._efficientnet_blocks.SqueezeExcite": (),
    "timm.models._features.FeatureGetterNet": ("model", "out_indices"),
    "timm.models._features.feature_take_indices": ("num_features", "indices"),
    "timm.models._hub.generate_readme": ("model_card", "model_name"),
    "timm.models._hub.hf_split": ("hf_id",),
    "timm.models._hub.save_config_for_hf": ("model", "config_path", "model_config", "model_args"),
    "timm.models._input.update_model_args": ("model",),
    "timm.models._input.update_model_input_size": ("model",),
    "timm.models._registry._model_to_module": (),
    "timm.task.ClassificationEvaluator": ("device",),
    "timm.task.ClassificationTask": ("model", "criterion", "criterion_kwargs", "device", "dtype", "verbose"),
    "timm.task.ClassificationTask.compile": ("backend", "mode"),
    "timm.task.ClassificationTask.compile_ema": ("backend", "mode"),
    "timm.task.ClassificationTask.create_evaluator": (),
    "timm.task.ClassificationTask.forward": ("input", "target"),
    "timm.task.ClassificationTask.get_clip_parameters": ("exclude_head",),
    "timm.task.ClassificationTask.get_eval_model": (),
    "timm.task.ClassificationTask.get_trainable_module": (),
    "timm.task.ClassificationTask.prepare_distributed": ("device_ids",),
    "timm.task.ClassificationTask.setup_ema": (),
    "timm.utils.unwrap_model": ("model",),
    **{f"{module}.{name}": () for module, names in SWAPPED.items() for name in names},
}


def check_timm() -> None:
    """Raise ImportError if the installed timm lacks a name this wing relies on, saying which, and timm's version."""
    check_names("timm", "timm", "timm>=1.0.31,<1.1", RELIED_ON)


check_timm()

from timm.models import _registry  # noqa: E402
from timm.models._builder import _resolve_pretrained_source as resolve_pretrained_source  # noqa: E402
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite  # noqa: E402
from timm.models._features import FeatureGetterNet, feature_take_indices  # noqa: E402
from timm.models._hub import generate_readme, hf_split, save_config_for_hf  # noqa: E402
from timm.models._input import update_model_args, update_model_input_size  # noqa: E402


def registered_modules() -> dict[str, str]:
    """For each registered model, the last part of the name of the module that registered it."""
    return dict(_registry._model_to_module)


def model_config(model: TimmModel) -> dict[str, Any]:
    """The pretrained configuration in a model, the model's own to change; an empty one of a network that has none."""
    return getattr(model, "pretrained_cfg", None) or {}


def set_model_config(model: TimmModel, config: dict[str, Any]) -> None:
    """Give a model its pretrained configuration, under both of the names that timm reads."""
    model.pretrained_cfg = model.default_cfg = config


def model_traits(model: TimmModel) -> dict[str, Any]:
    """What timm remembers of a model's architecture beside its configuration (first convolution, fixed input size)."""
    return dict(getattr(model, "_traits", {}))


def set_model_traits(model: TimmModel, traits: dict[str, Any]) -> None:
    model._traits = traits
