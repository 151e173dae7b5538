"""What dynamic adapters ask of a PEFT method and of a backbone before either is touched."""

import warnings
from typing import Any

from peft import PeftConfig
from torch import nn

from ._host import AuxiliaryTrainingWrapper, BaseTunerLayer, HostModel, method_of
from .dyn_config import DynConfig
from .family import Family

__all__ = [
    "check_backbone",
    "check_dilations",
    "check_fresh",
    "check_method",
    "check_problem",
    "last_classifier",
    "save_classifiers",
]

# PEFT methods that are registered as the others are and cannot adapt an image classifier, and why.
_UNFIT = {
    "POLY": "it needs task_ids with every call",
    "SHADOW": "it runs a copy of a language model's decoder beside the model",
    "TRAINABLE_TOKENS": "it trains token embeddings",
    "XLORA": "it mixes LoRA adapters that were saved before, for a language model",
}


def last_classifier(model: HostModel, family: Family) -> HostModel:
    """The layer that gives the last exit's logits; what stands there, if it is none."""
    found = model.get_submodule(family.classifiers(model)[0])
    if isinstance(found, AuxiliaryTrainingWrapper):
        found = next(iter(found.modules_to_save.values()))
    if isinstance(found, nn.Linear | nn.Conv2d):
        return found
    return [found, *(m for m in found.modules() if isinstance(m, nn.Linear | nn.Conv2d))][-1]


def check_method(config: PeftConfig) -> None:
    """TypeError if the method cannot adapt the layers of an image classifier, ValueError if it is told it is none."""
    method = method_of(config)
    reason = _UNFIT.get(method)
    if config.is_prompt_learning or config.is_adaption_prompt or not hasattr(config, "modules_to_save"):
        reason = reason or "it does not wrap layers of the backbone"
    if reason:
        raise TypeError(
            f"{method} cannot adapt an image classifier: {reason}. Choose a method that wraps its layers, such as "
            "LoRA, RepAdapter or Bottleneck."
        )
    if config.task_type is not None:
        raise ValueError(f"task_type={config.task_type} is for language models; leave it out.")


def check_fresh(model: nn.Module) -> None:
    """ValueError if ``model`` holds adapters already: new ones would be saved without those they were trained over."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise ValueError(
                f"this {type(model).__name__} holds adapters already ({name} is a {type(module).__name__}), which "
                "would act on beneath the new ones and not be saved with them. Give a network without adapters: make "
                "it anew, or take them out by unload() of the model they were made with. A further adapter is added by "
                "add_adapter(name, config) of the adapted model."
            )


def check_problem(model: HostModel) -> None:
    """ValueError if a transformers configuration says that labels are no classes, one an image."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"the backbone's config says problem_type={problem!r}, and early exits are trained by cross-entropy over "
            "classes that exclude each other. Set config.problem_type to 'single_label_classification' if that is what "
            "the labels are; otherwise give the model a loss of its own: model.criterion = ..., called with one exit's "
            "logits (B, C) and the labels."
        )


def check_backbone(model: HostModel, family: Family, config: DynConfig) -> tuple[int, ...]:
    """Where exits stand in ``model``, if ``config`` fits it.

    ValueError, which says what to create instead, if it does not.
    """
    found = last_classifier(model, family)
    if not hasattr(found, "weight"):
        raise ValueError(
            f"{type(model).__name__} has no classifier, which is the last exit's head: create it with num_classes "
            f"(num_labels in transformers){f' = {config.num_classes}' if config.num_classes else ''}."
        )
    if config.num_classes is not None and found.weight.shape[0] != config.num_classes:
        raise ValueError(
            f"the backbone's classifier has {found.weight.shape[0]} classes and DynConfig says {config.num_classes}: "
            f"create the backbone for the task (num_classes={config.num_classes} in timm.create_model, num_labels in "
            f"transformers), or call reset_classifier({config.num_classes}) of a timm model. All adapters of one "
            "backbone have its number of classes."
        )
    if config.token == "cls" and not family.has_class_token(model):
        raise ValueError(f"this {type(model).__name__} has no class token; use token='mean' or leave token out.")
    exit_after = config.exit_after(family, len(family.units(model)))
    config.hidden_widths(len(exit_after))
    return exit_after


def check_dilations(model: HostModel) -> None:
    """ValueError if a method's part of an adapted convolution lacks its dilation, as PEFT builds LoRA's."""
    for name, layer in model.named_modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if not isinstance(base, nn.Conv2d) or base.kernel_size == (1, 1):
            continue
        for part in layer.modules():
            alike = isinstance(part, nn.Conv2d) and part.kernel_size == base.kernel_size
            if alike and part.dilation != base.dilation:
                raise ValueError(
                    f"the adapter of {name} cannot run: PEFT builds it without the dilation {base.dilation} of that "
                    "convolution. Leave it out of target_modules, or name it in exclude_modules."
                )


def save_classifiers(config: Any, model: HostModel, names: list[str]) -> None:
    """Have the classifiers trained and saved along, as PEFT's ``modules_to_save``."""
    # PEFT goes by the ends of names.
    ends = tuple(names)
    others = [name for name, _ in model.named_modules() if name.endswith(ends) and not name.startswith(ends)]
    if others:
        warnings.warn(
            f"PEFT trains the classifier {', '.join(names)} in full, and with it every module whose name ends so: "
            f"{', '.join(others)}.",
            stacklevel=4,
        )
    config.modules_to_save = [
        *(config.modules_to_save or []),
        *(n for n in names if n not in (config.modules_to_save or [])),
    ]
