"""Everything of PEFT that is not its documented face: what this wing imports of it, overrides, and adds to it.

Other modules take these names from here, so that a PEFT that has moved one is named by this file alone. Of transformers
no private name is used: its models are cut by calling their own modules (``transformers_family``).
"""

from typing import Any, TypeAlias

from .._hosts import check_names

__all__ = [
    "LORA_TARGETS",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "HostModel",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "add_peft_type",
    "check_adapters_to_merge",
    "get_pattern_key",
    "is_tuner_layer",
    "method_of",
]

# A model or layer of timm's, transformers' or PEFT's: an nn.Module with what its host's users rely on (config,
# num_features, qkv), of which the hosts say no types; torch would have each of them be a Tensor or a Module.
HostModel: TypeAlias = Any

# What is imported, subclassed, overridden or added to, with the parameters that are passed or taken by name.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "peft.PeftModel": ("model", "peft_config", "adapter_name", "autocast_adapter_dtype"),
    "peft.PeftModel.add_adapter": ("adapter_name", "peft_config", "low_cpu_mem_usage", "autocast_adapter_dtype"),
    "peft.PeftModel.delete_adapter": ("adapter_name",),
    "peft.PeftModel.get_base_model": (),
    "peft.PeftModel.load_adapter": ("model_id", "adapter_name", "is_trainable"),
    "peft.PeftModel.save_pretrained": (
        *("save_directory", "safe_serialization", "selected_adapters", "is_main_process"),
    ),
    "peft.PeftModel.set_adapter": ("adapter_name", "inference_mode"),
    "peft.PeftModel.set_requires_grad": ("adapter_names", "requires_grad"),
    "peft.PeftType._member_map_": (),
    "peft.PeftType._member_names_": (),
    "peft.PeftType._value2member_map_": (),
    "peft.tuners.tuners_utils.BaseTuner": (),
    "peft.tuners.tuners_utils.BaseTuner._create_and_replace": (
        *("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
    ),
    "peft.tuners.tuners_utils.BaseTuner._replace_module": ("parent", "child_name", "new_module", "child"),
    "peft.tuners.tuners_utils.BaseTunerLayer": (),
    "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter": (),
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters": (),
    "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer": (),
    "peft.tuners.tuners_utils.BaseTunerLayer.merged_adapters": (),
    "peft.tuners.tuners_utils.check_adapters_to_merge": ("module", "adapter_names"),
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": (),
    "peft.utils.error.NoMatchingPeftModuleError": (),
    "peft.utils.get_peft_model_state_dict": ("model", "state_dict", "adapter_name", "save_embedding_layers"),
    "peft.utils.other.AuxiliaryTrainingWrapper": (),
    "peft.utils.other.AuxiliaryTrainingWrapper.adapter_state_dict": ("adapter_name",),
    "peft.utils.other.AuxiliaryTrainingWrapper.adapter_state_dict_load_map": ("adapter_name",),
    "peft.utils.other.ModulesToSaveWrapper": (),
    "peft.utils.other.ModulesToSaveWrapper.adapter_state_dict": ("adapter_name", "state_dict"),
    "peft.utils.other.get_pattern_key": ("pattern_keys", "key_to_match"),
}


def check_peft() -> None:
    """Raise ImportError if the installed PEFT lacks a name this wing relies on, saying which, and PEFT's version."""
    check_names("peft", "peft", "peft>=0.21,<0.22", RELIED_ON)


check_peft()

from peft import PeftConfig, PeftType  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge  # noqa: E402
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS  # noqa: E402
from peft.utils.error import NoMatchingPeftModuleError  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key  # noqa: E402


def is_tuner_layer(module: object) -> bool:
    """Whether a module is one of PEFT's layers around a layer: modules all, which PEFT's class does not say."""
    return isinstance(module, BaseTunerLayer)


def method_of(config: PeftConfig) -> str:
    """Name of the method that a configuration is of, as PEFT's enumeration has it."""
    kind: Any = config.peft_type  # a member once the configuration is made
    return kind.value


def add_peft_type(name: str) -> PeftType:
    """The member ``name`` of PEFT's enumeration of methods, added if PEFT does not have it.

    PEFT looks up every method in this enumeration and offers no way to extend it. The member made here is a full one
    (``.value``, pickling, copying, JSON), which a plain string would not be.
    """
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)  # EnumType refuses to set a member by name
    return PeftType[name]
