"""``get_dyn_peft_model``: early exits over any PEFT method that wraps a vision transformer's linear layers."""

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict, load_peft_weights
from torch import nn

from .._modules import ModuleList
from ..exits.clips import over_clips
from ..exits.files import atomic_folder
from ._host import HostModel, NoMatchingPeftModuleError, is_tuner_layer, method_of
from .card import update_card
from .dyn_config import DynConfig
from .dyn_training import DynTraining, exit_criterion
from .families import Family, find_family
from .fitting import check_backbone, check_dilations, check_fresh, check_method, last_classifier, save_classifiers
from .folders import HUB_ARGUMENTS, check_base, check_keys, read_exits, reading_folder, write_exits
from .heads import EarlyHead, ExitHeads, widen_classifiers
from .multi_exit import MultiExitBackbone
from .precision import check_mergeable, halve_saved, single_saved
from .schedule import match_modes, set_dropout
from .timm_family import TimmFamily, fill_targets, uncalled_adapters

__all__ = ["DynConfig", "DynPeftModel", "get_dyn_peft_model"]


class DynPeftModel(DynTraining, PeftModel):
    """A ``PeftModel`` with early exits: made by ``get_dyn_peft_model`` or ``DynPeftModel.from_pretrained``.

    It is a ``MultiExit``: ``AdaptiveModel``, ``collect_exits``, ``exit_costs`` and the rest work on it as it is. Every
    adapter has early heads of its own; those of the active adapter are used. ``adapter_config.json`` and
    ``adapter_model.safetensors`` are what the plain ``PeftModel`` writes for the same backbone and can be read by it;
    exits and early heads stand beside them in ``dyn_config.json`` and ``dyn_heads.safetensors``.

    Attributes:
        exit_heads: early heads by adapter name.
        dyn_config: ``DynConfig`` by adapter name.
        exit_weights: (K,) weights of the exits' losses at the current progress of training.
        criterion: called with one exit's logits (B, C) and the labels; cross-entropy if left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        dyn_config: DynConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        dyn_config = dyn_config or DynConfig()
        check_fresh(model)
        family = find_family(model)
        check_method(peft_config)
        exit_after = check_backbone(model, family, dyn_config)
        family.prepare(model)
        widen_classifiers(model, family.classifiers(model), dyn_config.last_head_width)
        save_classifiers(peft_config, model, family.classifiers(model))
        if isinstance(family, TimmFamily):
            fill_targets(peft_config, model, family)
        try:
            super().__init__(model, peft_config, adapter_name, autocast_adapter_dtype, **kwargs)
        except NoMatchingPeftModuleError as error:
            unit = family.units(model)[0]
            names = [n for n, m in model.get_submodule(unit).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            targets = getattr(peft_config, "target_modules", None)
            raise ValueError(
                f"target_modules={targets} and the settings beside it name no module that can be "
                f"adapted in this {type(model).__name__}. Layers in {unit} are called: {', '.join(names)}."
            ) from error
        except (KeyError, IndexError, AttributeError, RuntimeError) as error:
            # Many methods find out while they build that layers are not what they are made for.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            targets = getattr(peft_config, "target_modules", None)
            raise ValueError(
                f"PEFT's {method_of(peft_config)} cannot adapt "
                f"{', '.join(sorted(targets)) if isinstance(targets, set | list) else targets} of this "
                f"{type(model).__name__}: it failed on them by {type(error).__name__}: {error}. Some methods are for "
                "linear layers only, or for layers that all have one shape: choose other target_modules."
            ) from error
        self._check_adapted(family)
        self.family = family
        self.dyn_config: dict[str, DynConfig] = {}
        self._exit_after: dict[str, tuple[int, ...]] = {}
        self.exit_heads = ExitHeads()
        self._begin_training()
        self._add_exits(adapter_name, dyn_config, exit_after, autocast_adapter_dtype)
        self._weigh_exits()
        if dyn_config.num_frames is not None:
            over_clips(self, dyn_config.num_frames, keep_forward=True)

    # The exits of the active adapter

    @property
    def backbone(self) -> HostModel:
        tuner: HostModel = self.base_model
        return tuner.model

    @property
    def _active(self) -> str:
        active = self.active_adapters
        if len(active) == 1:
            return active[0]
        raise ValueError(
            f"exits and the classifier belong to one adapter, and active are {list(active)}; call set_adapter(name)."
        )

    @property
    def early_heads(self) -> "ModuleList[EarlyHead]":
        return cast("ModuleList[EarlyHead]", self.exit_heads[self._active])

    @property
    def exit_after(self) -> tuple[int, ...]:
        return self._exit_after[self._active]

    @property
    def token(self) -> str:
        return self.dyn_config[self._active].token or ("cls" if self.family.has_class_token(self.backbone) else "mean")

    def _add_exits(self, adapter_name: str, config: DynConfig, exit_after: tuple[int, ...], single: bool) -> None:
        family, backbone = self.family, self.backbone
        config = copy.deepcopy(config)
        config.exit_interval = exit_after[0]
        reference = last_classifier(backbone, family)
        config.num_classes = reference.weight.shape[0]
        widths = family.widths(backbone)
        hidden = config.hidden_widths(len(exit_after))
        heads = nn.ModuleList(
            EarlyHead(widths[after - 1], config.num_classes, wide)
            for after, wide in zip(exit_after[:-1], hidden, strict=True)
        )
        if single:
            single_saved(backbone, adapter_name, family.classifiers(backbone))
        inference = self.peft_config[adapter_name].inference_mode
        heads.requires_grad_(adapter_name in self.active_adapters and not inference)
        self.exit_heads[adapter_name] = heads.to(reference.weight.device).train(self.training)
        self.dyn_config[adapter_name] = config
        self._cross_entropy[adapter_name] = exit_criterion(config)
        self._exit_after[adapter_name] = exit_after
        match_modes(backbone, self.training)
        set_dropout(backbone, adapter_name, family.units(backbone), config.dropout_shallow, config.dropout_deep)

    def _check_adapted(self, family: Family) -> None:
        """ValueError if adapters fail on a layer, or if the backbone reads its weights and never calls it."""
        check_dilations(self.backbone)
        if not isinstance(family, TimmFamily):
            return
        try:
            unused = uncalled_adapters(self.backbone, family.input_size)
        except Exception:  # what cannot be run without weights (quantised layers) is not checked
            return
        if unused:
            raise ValueError(
                f"{len(unused)} of the layers to adapt are never called, such as {unused[0]}: the backbone reads their "
                "weights itself, so that adapters around them have no effect. Leave them out of target_modules, or "
                "name them in exclude_modules."
            )

    def train(self, mode: bool = True) -> "DynPeftModel":
        """As in torch, but frozen batch norms go on as in evaluation: their statistics are not saved with adapters."""
        super().train(mode)
        if mode and "family" in self.__dict__:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not (
                    module.affine and module.weight.requires_grad
                ):
                    module.eval()
        return self

    def get_base_model(self) -> nn.Module:
        """The backbone with adapters and early heads, seen as one multi-exit module; nothing is copied."""
        if "exit_heads" not in self._modules:
            return super().get_base_model()
        return MultiExitBackbone(self.backbone, self.early_heads, self.exit_after, self.token, self.family)

    def __getattr__(self, name: str) -> Any:
        """What is missing here is PEFT's tuner's or the backbone's, as in ``PeftModel``, unless exits would be lost."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":
                raise
        tuner = self.base_model
        if name in vars(tuner) or name in tuner._modules or name in tuner._parameters or hasattr(type(tuner), name):
            return getattr(tuner, name)
        try:
            return self._of_backbone(name)
        except AttributeError:
            if name == "config":  # transformers' Trainer asks for it where it would smooth labels itself
                raise AttributeError(
                    f"{type(self.base_model.model).__name__} is no transformers model and has no config. If Trainer "
                    "asked for it because of label_smoothing_factor: that would train the last exit alone; use "
                    "DynConfig(label_smoothing=...) in its place."
                ) from None
            raise

    # Adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        dyn_config: DynConfig | None = None,
    ) -> None:
        """As ``PeftModel.add_adapter``; ``dyn_config`` says its exits, by default the active adapter's.

        Raises:
            ValueError: method, backbone, exits and frames do not fit, or the backbone never calls what would be
                adapted.
        """
        dyn_config = dyn_config or self.dyn_config[self._active]
        if dyn_config.num_frames != getattr(self, "num_frames", None):
            raise ValueError(
                f"the model takes {getattr(self, 'num_frames', None) or 'no'} frames and this adapter's num_frames is "
                f"{dyn_config.num_frames}; all adapters of one model take the same samples."
            )
        check_method(peft_config)
        exit_after = check_backbone(self.backbone, self.family, dyn_config)
        widen_classifiers(self.backbone, self.family.classifiers(self.backbone), dyn_config.last_head_width)
        save_classifiers(peft_config, self.backbone, self.family.classifiers(self.backbone))
        if isinstance(self.family, TimmFamily):
            fill_targets(peft_config, self.backbone, self.family)
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            self._check_adapted(self.family)
        except ValueError:
            super().delete_adapter(adapter_name)
            raise
        self._add_exits(adapter_name, dyn_config, exit_after, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """As ``PeftModel.set_adapter``: one adapter, and its exits, become the active ones."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, heads in self.exit_heads.items():
            heads.requires_grad_(name == adapter_name and not inference_mode)
        self._weigh_exits()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As ``PeftModel.set_requires_grad``, early heads included."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.exit_heads[name].requires_grad_(requires_grad)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises ValueError: each adapter has a classifier and early heads of its own, which do not add up."""
        raise ValueError(
            "adapters cannot be added up here: each has a classifier and early heads of its own, and a sum of heads is "
            "no head (PEFT refuses it for modules_to_save as well). Keep them apart and call set_adapter(name)."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """As ``PeftModel.delete_adapter``, early heads included."""
        super().delete_adapter(adapter_name)
        for table in (self.exit_heads, self.dyn_config, self._exit_after, self._cross_entropy):
            del table[adapter_name]
        if self.exit_heads:
            self.set_adapter(self._active)

    def _tuner_layers(self) -> list[HostModel]:
        return [module for module in self.backbone.modules() if is_tuner_layer(module)]

    def _check_merged(self, adapter_names: Sequence[str] | None) -> None:
        """ValueError for other adapters than the one whose classifier and early heads the merged model answers by."""
        if adapter_names is not None and list(adapter_names) != [self._active]:
            raise ValueError(
                f"adapter_names={list(adapter_names)}: an adapter is merged beneath its own classifier and early "
                f"heads, and active is {self._active}. Call set_adapter(name) first and leave adapter_names out."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As the tuner's ``merge_adapter``, for the active adapter; ``unmerge_adapter`` undoes it.

        ValueError if other adapters are named: classifier and early heads would remain the active one's.
        """
        self._check_merged(adapter_names)
        tuner: HostModel = self.base_model
        tuner.merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> MultiExitBackbone:
        """Fold the adapter into the backbone and return a plain multi-exit module, with nothing of PEFT left in it.

        ``adapter_names`` is there as PEFT has it; ValueError if it names others than the active adapter.
        """
        self._check_merged(adapter_names)
        heads, exit_after, token, training = self.early_heads, self.exit_after, self.token, self.training
        num_frames = self.dyn_config[self._active].num_frames
        check_mergeable(self.backbone, self.active_peft_config.peft_type.value)
        tuner: HostModel = self.base_model
        backbone = tuner.merge_and_unload(progressbar, safe_merge, adapter_names)
        halve_saved(backbone)
        merged = MultiExitBackbone(backbone, heads, exit_after, token, self.family).train(training)
        return over_clips(merged, num_frames, keep_forward=True) if num_frames else merged

    # Files

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        accuracies: Sequence[float] | None = None,
        dataset: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``PeftModel.save_pretrained``; exits and early heads are written beside each adapter.

        The folder is written whole or not at all; what else lies in it stays.

        Args:
            accuracies: for the model card, top-1 accuracy of every exit in percent.
            dataset: for the model card, what they were measured on.

        Raises:
            ValueError: ``save_directory`` is a file, or no adapter is left to save.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; name a folder.")
        if not self._tuner_layers():  # PEFT would write an empty file over the adapter that may lie there
            raise ValueError(
                "no adapter is left in this model: merge_and_unload() or unload() took them out of its backbone. Save "
                "what merge_and_unload() returned, or save the adapter before."
            )
        state_dict = kwargs.pop("state_dict", None)
        state_dict = self.state_dict() if state_dict is None else state_dict
        heads = {key: value for key, value in state_dict.items() if key.startswith("exit_heads.")}
        settings: dict[str, Any] = dict(
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            state_dict={key: value for key, value in state_dict.items() if key not in heads},
            **kwargs,
        )
        if not is_main_process:  # takes part in gathering what is spread over processes, and writes nothing
            super().save_pretrained(save_directory, **settings)
            return
        names = list(selected_adapters or self.peft_config)
        places = {name: "" if name == "default" else name for name in names}
        # Of the two files that weights may stand in, PEFT reads an old one before a new one.
        unused = WEIGHTS_NAME if safe_serialization else SAFETENSORS_WEIGHTS_NAME
        with atomic_folder(save_directory, without=[Path(place, unused) for place in places.values()]) as folder:
            card = Path(save_directory, "README.md")
            if card.exists():  # PEFT adds to the card that is there
                shutil.copy2(card, folder)
            super().save_pretrained(str(folder), **settings)
            update_card(folder, self, self.active_peft_config.peft_type.value, accuracies, dataset)
            for name, place in places.items():
                prefix = f"exit_heads.{name}."
                tensors = {k.removeprefix(prefix): v for k, v in heads.items() if k.startswith(prefix)}
                write_exits(folder / place, self.backbone, "adapter", asdict(self.dyn_config[name]), tensors)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "DynPeftModel":
        """Read what ``save_pretrained`` wrote, from a folder or the Hugging Face hub, over the same backbone ``model``.

        Raises:
            ValueError: the folder holds no exits, or they, or the adapter, do not fit ``model``; missing and unexpected
                entries are named.
        """
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        record, _ = read_exits(model_id, "adapter", **hub)
        check_base(model_id, record, model)
        with reading_folder(model_id):
            dyn_config = _config_of(record)
            config = config or PeftConfig.from_pretrained(str(model_id), **hub)
            config.inference_mode = not is_trainable
            dyn = cls(model, config, adapter_name, dyn_config, autocast_adapter_dtype=autocast_adapter_dtype)
            dyn.load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                low_cpu_mem_usage=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )
        return dyn

    def load_adapter(
        self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``PeftModel.load_adapter``, early heads included; strict, as ``from_pretrained`` is."""
        with reading_folder(model_id):
            return self._load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)

    def _load_adapter(
        self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool, *args: Any, **kwargs: Any
    ) -> Any:
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        record, heads = read_exits(model_id, "adapter", **hub)
        check_base(model_id, record, self.backbone)
        dyn_config = _config_of(record)
        saved = set(load_peft_weights(str(model_id), device="cpu", **hub))
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(str(model_id), **hub)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, dyn_config=dyn_config)
            if is_trainable:
                self.set_requires_grad(adapter_name)
        try:
            state = {key: value for key, value in self.state_dict().items() if not key.startswith("exit_heads.")}
            expected = set(get_peft_model_state_dict(self, state, adapter_name, save_embedding_layers=False))
            check_keys(f"the adapter in {model_id}", saved, expected)
            own = self.exit_heads[adapter_name].state_dict()
            check_keys(f"the early heads in {model_id}", set(heads), set(own))
            wrong = [k for k in heads if heads[k].shape != own[k].shape]
            if wrong:
                shapes = ", ".join(f"{k}: {tuple(heads[k].shape)} for {tuple(own[k].shape)}" for k in wrong)
                raise ValueError(f"the early heads in {model_id} have other shapes than the model's: {shapes}.")
        except ValueError:
            if new:
                self.delete_adapter(adapter_name)
            raise
        with self.exit_heads.apart():
            result = super().load_adapter(str(model_id), adapter_name, is_trainable, *args, **kwargs)
        self.exit_heads[adapter_name].load_state_dict(heads)
        return result


def get_dyn_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    dyn_config: DynConfig | None = None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    num_frames: int | None = None,
) -> DynPeftModel:
    """Adapt a pretrained classifier by any PEFT method and give it early exits (Dyn-Adapter, arXiv:2407.14302).

    Args:
        model: Any timm classification model that can be traced, or a transformers ViT, DeiT, DINOv2 or BEiT for image
            classification, whose classifier has the task's number of classes. It is changed in place and its weights
            are frozen; the classifier is trained along, in a copy that is saved with the adapter.
        peft_config: ``RepAdapterConfig``, ``BottleneckConfig``, ``peft.LoraConfig`` or of another PEFT method that
            wraps linear layers or convolutions. It is copied. Over a timm model ``target_modules`` may be left out: the
            layers that are usual for the method and the layout are then adapted, and printed.
        dyn_config: Exits and training; ``DynConfig()`` if left out.
        adapter_name: Name of the adapter.
        autocast_adapter_dtype: Keep adapters of a half-precision model in single precision.
        num_frames: Samples are clips (B, T, C, H, W) of so many frames, seen as one batch of images, and each exit
            answers with the mean over them (table 7 takes 8 frames and does not say how the backbone sees them).
            A transformers VideoMAE takes clips by itself, as joint tokens of two frames.

    Raises:
        TypeError: the model is neither timm's nor of a known family, or the method wraps no layers.
        ValueError: the model cannot be cut, the interval does not divide the depth, the classifier has another number
            of classes, no module is called as ``target_modules`` says, or the model never calls one that is.
    """
    if num_frames is not None:
        dyn_config = replace(dyn_config or DynConfig(), num_frames=num_frames)
    return DynPeftModel(
        model,
        copy.deepcopy(peft_config),
        adapter_name,
        dyn_config,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def _config_of(record: dict[str, Any]) -> DynConfig:
    known = {field.name for field in fields(DynConfig)}
    return DynConfig(**{key: value for key, value in record.items() if key in known})
