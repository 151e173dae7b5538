"""``get_dyn_peft_model``: early exits over any PEFT method that wraps a vision transformer's linear layers."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from ..exits import MultiExitLoss
from ..exits.files import atomic_write
from .multi_exit import EarlyHead, ExitModel, Family, MultiExitBackbone, find_family
from .schedule import GradientMask, exit_weights, set_dropout

__all__ = ["DynConfig", "DynPeftModel", "get_dyn_peft_model"]

CONFIG_NAME = "dyn_config.json"
HEADS_NAME = "dyn_heads.safetensors"
FORMAT = 1
_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


@dataclass
class DynConfig:
    """Early heads and training of Dyn-Adapter. The defaults are the paper's, for ViT-B of 12 blocks.

    Args:
        exit_interval: Blocks per exit, T; it divides the number of blocks. Left out: a quarter of them, and for
            hierarchical models one stage.
        num_classes: Classes of the task; what the backbone's classifier must have. Left out: what it has.
        token: What early heads read: ``"cls"``, the class token, or ``"mean"``, the mean of the patch tokens. Left out:
            the class token where there is one.
        head_widths: Hidden width of each early head from the front, 0 for a linear one; heads beyond are linear. Left
            out: the shallow half of the exits gets MLPs, from 96 wide down to 48 (section 3.2, "Head Balance").
        lambda_shallow, lambda_deep: First and last weight of the losses of the shallow and of the deep exits
            (section 3.2, "Adaptive Prioritization"). Equal ends switch the schedule off.
        dropout_shallow, dropout_deep: Dropout of adapters in the first half of the blocks and in the second (section
            3.3). None leaves the adapter's own.
        mask: ``"gradient"`` or ``"update"`` (eq. 8; see ``GradientMask``), or None for none.
        mask_share: Share p_m of the entries that a step leaves out.
        mask_scope: What is masked: ``"all"``, ``"adapters"`` or ``"heads"``.
        mask_seed: Seed of the masks.
        label_smoothing: Of the loss at every exit.
    """

    exit_interval: int | None = None
    num_classes: int | None = None
    token: str | None = None
    head_widths: Sequence[int] | None = None
    lambda_shallow: tuple[float, float] = (0.1, 0.5)
    lambda_deep: tuple[float, float] = (1.0, 0.5)
    dropout_shallow: float | None = 0.5
    dropout_deep: float | None = 0.1
    mask: str | None = "gradient"
    mask_share: float = 0.1
    mask_scope: str = "all"
    mask_seed: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.token not in (None, "cls", "mean"):
            raise ValueError(f"unknown token {self.token!r}; choose cls or mean, or leave it out.")
        if self.mask not in (None, "gradient", "update"):
            raise ValueError(f"unknown mask {self.mask!r}; choose gradient or update, or None for no mask.")
        if self.mask_scope not in ("all", "adapters", "heads"):
            raise ValueError(f"unknown mask_scope {self.mask_scope!r}; choose all, adapters or heads.")
        for name in ("dropout_shallow", "dropout_deep", "mask_share", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {value}.")
        for name in ("lambda_shallow", "lambda_deep"):
            pair = tuple(float(value) for value in getattr(self, name))
            if len(pair) != 2 or min(pair) < 0:
                raise ValueError(f"{name} is a pair of weights that are not negative, first and last; got {pair}.")
            setattr(self, name, pair)
        if self.head_widths is not None:
            self.head_widths = tuple(int(width) for width in self.head_widths)
            if any(width < 0 for width in self.head_widths):
                raise ValueError(f"head_widths are hidden widths, or 0 for a linear head; got {self.head_widths}.")

    def exit_after(self, family: Family, units: int) -> tuple[int, ...]:
        """How many of the backbone's ``units`` have run at each exit."""
        interval = self.exit_interval or family.interval or max(units // 4, 1)
        if interval < 1 or units % interval or units == interval:
            fitting = [d for d in range(1, units) if units % d == 0]
            raise ValueError(
                f"exit_interval={interval} does not cut {units} {family.unit}s of {family.name} into two or more equal "
                f"parts; choose one of {fitting}."
            )
        return tuple(range(interval, units + 1, interval))

    def hidden_widths(self, num_exits: int) -> list[int]:
        """Hidden width of each of the ``num_exits - 1`` early heads, 0 for linear ones."""
        early, widths = num_exits - 1, self.head_widths
        if widths is None:
            heavy = num_exits // 2
            widths = [round(96 - 48 * index / max(heavy - 1, 1)) for index in range(min(heavy, early))]
        if len(widths) > early:
            raise ValueError(f"{len(widths)} head_widths were given for {early} early heads.")
        return [*widths, *[0] * (early - len(widths))]


class DynPeftModel(ExitModel, PeftModel):
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
        **kwargs: Any,
    ) -> None:
        dyn_config = dyn_config or DynConfig()
        family = find_family(model)
        if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
            raise TypeError(
                f"{peft_config.peft_type.value} does not wrap layers of the backbone; choose a method that does, such "
                "as LoRA, RepAdapter or Bottleneck."
            )
        if peft_config.task_type is not None:
            raise ValueError(f"task_type={peft_config.task_type} is for language models; leave it out.")
        exit_after = _check_backbone(model, family, dyn_config)
        family.prepare(model)
        _save_classifiers(peft_config, family.classifiers(model))
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        except NoMatchingPeftModuleError as error:
            unit = family.units(model)[0]
            names = [n for n, m in model.get_submodule(unit).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            raise ValueError(
                f"target_modules={peft_config.target_modules} and the settings beside it name no module that can be "
                f"adapted in this {type(model).__name__}. Layers in {unit} are called: {', '.join(names)}."
            ) from error
        self.family = family
        self.dyn_config: dict[str, DynConfig] = {}
        self._exit_after: dict[str, tuple[int, ...]] = {}
        self._cross_entropy: dict[str, MultiExitLoss] = {}
        self._own_criterion: Callable[[Tensor, Tensor], Tensor] | None = None
        self.exit_heads = nn.ModuleDict()
        self.register_buffer("exit_weights", torch.zeros(0), persistent=False)
        self.progress = 0.0
        self._add_exits(adapter_name, dyn_config, exit_after)
        self.set_progress(0.0)

    # The exits of the active adapter

    @property
    def backbone(self) -> nn.Module:
        return self.base_model.model

    @property
    def _active(self) -> str:
        active = self.active_adapter
        if isinstance(active, str):
            return active
        raise ValueError(f"exits belong to one adapter, and active are {list(active)}; call set_adapter(name).")

    @property
    def early_heads(self) -> nn.ModuleList:
        return self.exit_heads[self._active]

    @property
    def exit_after(self) -> tuple[int, ...]:
        return self._exit_after[self._active]

    @property
    def token(self) -> str:
        return self.dyn_config[self._active].token or ("cls" if self.family.has_class_token(self.backbone) else "mean")

    def _add_exits(self, adapter_name: str, config: DynConfig, exit_after: tuple[int, ...]) -> None:
        family, backbone = self.family, self.backbone
        config = copy.deepcopy(config)
        config.exit_interval = exit_after[0]
        reference = _classifier(backbone, family)
        config.num_classes = reference.weight.shape[0]
        widths = family.widths(backbone)
        hidden = config.hidden_widths(len(exit_after))
        heads = nn.ModuleList(
            EarlyHead(widths[after - 1], config.num_classes, wide)
            for after, wide in zip(exit_after[:-1], hidden, strict=True)
        )
        inference = self.peft_config[adapter_name].inference_mode
        heads.requires_grad_(adapter_name in self.active_adapters and not inference)
        self.exit_heads[adapter_name] = heads.to(reference.weight.device).train(self.training)
        self.dyn_config[adapter_name] = config
        self._cross_entropy[adapter_name] = MultiExitLoss(1, "chase", label_smoothing=config.label_smoothing)
        self._exit_after[adapter_name] = exit_after
        set_dropout(backbone, adapter_name, family.units(backbone), config.dropout_shallow, config.dropout_deep)

    def get_base_model(self) -> nn.Module:
        """The backbone with adapters and early heads, seen as one multi-exit module; nothing is copied."""
        if "exit_heads" not in self._modules:
            return super().get_base_model()
        return MultiExitBackbone(self.backbone, self.early_heads, self.exit_after, self.token)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "config":  # transformers' Trainer asks for it where it would smooth labels itself
                raise AttributeError(
                    f"{type(self.base_model.model).__name__} is no transformers model and has no config. If Trainer "
                    "asked for it because of label_smoothing_factor: that would train the last exit alone; use "
                    "DynConfig(label_smoothing=...) in its place."
                ) from None
            raise

    # Training

    def set_progress(self, progress: float) -> None:
        """Set the weights of the exits' losses for the share of training done, in [0, 1]."""
        config = self.dyn_config[self._active]
        weights = exit_weights(self.num_exits, progress, config.lambda_shallow, config.lambda_deep)
        weights = torch.tensor(weights, device=_classifier(self.backbone, self.family).weight.device)
        if self.exit_weights.shape == weights.shape:
            self.exit_weights.copy_(weights)  # in place: compiled steps and CUDA graphs hold on to the buffer
        else:
            self.exit_weights = weights
        self.progress = progress

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self._own_criterion or self._cross_entropy[self._active]

    @criterion.setter
    def criterion(self, criterion: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.__dict__["_own_criterion"] = criterion

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "criterion":  # torch would make a criterion that is a module a part of the model
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def loss(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        """Dyn-Adapter eq. 5: the exits' losses weighted by lambda, a plain sum; a scalar.

        Args:
            outputs: what the model returns in training, K tensors (B, C).
            target: class indices (B,) or probabilities (B, C).
        """
        if isinstance(outputs, Tensor) or len(outputs) != self.num_exits:
            raise ValueError(
                f"expected the logits of all {self.num_exits} exits, as the model returns them in training mode or "
                f"forward_exits does; got {'one tensor' if isinstance(outputs, Tensor) else len(outputs)}."
            )
        criterion = self.criterion
        losses = torch.stack([criterion(logits, target) for logits in outputs])
        return (self.exit_weights.to(losses) * losses).sum()

    def attach_mask(self, optimizer: Optimizer) -> GradientMask | None:
        """Let the gradient mask of the active adapter act on ``optimizer``; None if the configuration has no mask."""
        config = self.dyn_config[self._active]
        if config.mask is None or not config.mask_share:
            return None
        chosen = []
        for name, parameter in self.named_parameters():
            is_head = name.startswith("exit_heads.") or ".modules_to_save." in name
            if parameter.requires_grad and config.mask_scope in ("all", "heads" if is_head else "adapters"):
                chosen.append(parameter)
        return GradientMask(chosen, config.mask_share, config.mask, config.mask_seed).attach(optimizer)

    # Adapters

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, *args: Any, dyn_config: DynConfig | None = None, **kwargs: Any
    ) -> None:
        """As ``PeftModel.add_adapter``; ``dyn_config`` says its exits, by default the active adapter's."""
        dyn_config = dyn_config or self.dyn_config[self._active]
        exit_after = _check_backbone(self.backbone, self.family, dyn_config, classifier=False)
        _save_classifiers(peft_config, self.family.classifiers(self.backbone))
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        self._add_exits(adapter_name, dyn_config, exit_after)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """As ``PeftModel.set_adapter``: one adapter, and its exits, become the active ones."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, heads in self.exit_heads.items():
            heads.requires_grad_(name == adapter_name and not inference_mode)
        self.set_progress(self.progress)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As ``PeftModel.set_requires_grad``, early heads included."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.exit_heads[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """As ``PeftModel.delete_adapter``, early heads included."""
        super().delete_adapter(adapter_name)
        for table in (self.exit_heads, self.dyn_config, self._exit_after, self._cross_entropy):
            del table[adapter_name]
        if self.exit_heads:
            self.set_adapter(self._active)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> MultiExitBackbone:
        """Fold the adapter into the backbone and return a plain multi-exit module, with nothing of PEFT left in it."""
        heads, exit_after, token, training = self.early_heads, self.exit_after, self.token, self.training
        backbone = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)
        return MultiExitBackbone(backbone, heads, exit_after, token).train(training)

    # Files

    def save_pretrained(
        self,
        save_directory: str,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As ``PeftModel.save_pretrained``; exits and early heads are written beside each adapter."""
        state_dict = kwargs.pop("state_dict", None)
        state_dict = self.state_dict() if state_dict is None else state_dict
        heads = {key: value for key, value in state_dict.items() if key.startswith("exit_heads.")}
        super().save_pretrained(
            save_directory,
            selected_adapters=selected_adapters,
            is_main_process=is_main_process,
            state_dict={key: value for key, value in state_dict.items() if key not in heads},
            **kwargs,
        )
        if not is_main_process:
            return
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory, "" if name == "default" else name)
            prefix = f"exit_heads.{name}."
            tensors = {
                k.removeprefix(prefix): v.detach().contiguous() for k, v in heads.items() if k.startswith(prefix)
            }
            with atomic_write(folder / HEADS_NAME, "wb") as file:
                file.write(save(tensors, metadata={"format": "pt"}))
            record = {
                "format": FORMAT,
                "base_model_class": type(self.backbone).__name__,
                "base_model_name": _name_of(self.backbone),
                **asdict(self.dyn_config[name]),
            }
            with atomic_write(folder / CONFIG_NAME) as file:
                json.dump(record, file, indent=2)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> "DynPeftModel":
        """Read what ``save_pretrained`` wrote, from a folder or the Hugging Face hub, over the same backbone ``model``.

        Raises:
            ValueError: the folder holds no exits, or they, or the adapter, do not fit ``model``; missing and unexpected
                entries are named.
        """
        hub = {key: value for key, value in kwargs.items() if key in _HUB_ARGUMENTS}
        dyn_config, _ = _read_exits(model_id, type(model).__name__, **hub)
        config = config or PeftConfig.from_pretrained(str(model_id), **hub)
        config.inference_mode = not is_trainable
        dyn = cls(model, config, adapter_name, dyn_config, autocast_adapter_dtype=autocast_adapter_dtype)
        dyn.load_adapter(
            model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, **kwargs
        )
        return dyn

    def load_adapter(
        self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """As ``PeftModel.load_adapter``, early heads included; strict, as ``from_pretrained`` is."""
        hub = {key: value for key, value in kwargs.items() if key in _HUB_ARGUMENTS}
        dyn_config, heads = _read_exits(model_id, type(self.backbone).__name__, **hub)
        saved = set(load_peft_weights(str(model_id), device="cpu", **hub))
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(str(model_id), **hub)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, dyn_config=dyn_config)
            if is_trainable:
                self.set_requires_grad(adapter_name)
        try:
            expected = set(get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False))
            _check_keys(f"the adapter in {model_id}", saved, expected)
            own = self.exit_heads[adapter_name].state_dict()
            _check_keys(f"the early heads in {model_id}", set(heads), set(own))
            wrong = [k for k in heads if heads[k].shape != own[k].shape]
            if wrong:
                shapes = ", ".join(f"{k}: {tuple(heads[k].shape)} for {tuple(own[k].shape)}" for k in wrong)
                raise ValueError(f"the early heads in {model_id} have other shapes than the model's: {shapes}.")
        except ValueError:
            if new:
                self.delete_adapter(adapter_name)
            raise
        result = super().load_adapter(str(model_id), adapter_name, is_trainable=is_trainable, **kwargs)
        self.exit_heads[adapter_name].load_state_dict(heads)
        return result


def get_dyn_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    dyn_config: DynConfig | None = None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> DynPeftModel:
    """Adapt a pretrained classifier by any PEFT method and give it early exits (Dyn-Adapter, arXiv:2407.14302).

    Args:
        model: A timm VisionTransformer, Eva, SwinTransformer or ConvNeXt, or a transformers ViT, DeiT, DINOv2 or BEiT
            for image classification, whose classifier has the task's number of classes. It is changed in place and its
            weights are frozen; the classifier is trained along, in a copy that is saved with the adapter.
        peft_config: ``RepAdapterConfig``, ``BottleneckConfig``, ``peft.LoraConfig`` or of another PEFT method that
            wraps linear layers. It is copied.
        dyn_config: Exits and training; the paper's settings if left out.
        adapter_name: Name of the adapter.
        autocast_adapter_dtype: Keep adapters of a half-precision model in single precision.

    Raises:
        TypeError: no family's forward is the model's, or the method wraps no layers.
        ValueError: the interval does not divide the depth, the classifier has another number of classes, or no module
            is called as ``target_modules`` says.
    """
    return DynPeftModel(
        model,
        copy.deepcopy(peft_config),
        adapter_name,
        dyn_config,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def _classifier(model: nn.Module, family: Family) -> nn.Module:
    return model.get_submodule(family.classifiers(model)[0])


def _check_backbone(model: nn.Module, family: Family, config: DynConfig, classifier: bool = True) -> tuple[int, ...]:
    """Where exits stand in ``model``, if ``config`` fits it."""
    if classifier:
        found = _classifier(model, family)
        if not hasattr(found, "weight"):
            raise ValueError(
                f"{type(model).__name__} has no classifier, which is the last exit's head: create it with num_classes "
                f"(num_labels in transformers){f' = {config.num_classes}' if config.num_classes else ''}."
            )
        if config.num_classes is not None and found.weight.shape[0] != config.num_classes:
            raise ValueError(
                f"the backbone's classifier has {found.weight.shape[0]} classes and DynConfig says "
                f"{config.num_classes}: create the backbone for the task (num_classes={config.num_classes} in "
                f"timm.create_model, num_labels in transformers), or call reset_classifier({config.num_classes}) of a "
                "timm model."
            )
    if config.token == "cls" and not family.has_class_token(model):
        raise ValueError(f"this {type(model).__name__} has no class token; use token='mean' or leave token out.")
    exit_after = config.exit_after(family, len(family.units(model)))
    config.hidden_widths(len(exit_after))
    return exit_after


def _save_classifiers(config: PeftConfig, names: list[str]) -> None:
    """Have the classifiers trained and saved along, as PEFT's ``modules_to_save``."""
    config.modules_to_save = [
        *(config.modules_to_save or []),
        *(n for n in names if n not in (config.modules_to_save or [])),
    ]


def _name_of(model: nn.Module) -> str | None:
    if hasattr(model, "pretrained_cfg"):
        return (model.pretrained_cfg or {}).get("architecture")
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _check_keys(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise ValueError(
            f"{what} do not fit the model. Missing: {sorted(expected - found) or 'none'}. "
            f"Unexpected: {sorted(found - expected) or 'none'}."
        )


def _read_exits(model_id: str | os.PathLike, base_class: str, **hub: Any) -> tuple[DynConfig, dict[str, Tensor]]:
    """Configuration and early heads of a saved adapter; ``base_class`` is what they are to be used over."""
    paths = []
    for name in (CONFIG_NAME, HEADS_NAME):
        if os.path.isdir(model_id):
            path = Path(model_id, hub.get("subfolder") or "", name)
            if not path.exists():
                raise ValueError(
                    f"{model_id} has no {name}, and so no exits. For an adapter without exits use "
                    "PeftModel.from_pretrained."
                )
        else:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(str(model_id), name, **hub)
        paths.append(path)
    record = json.loads(Path(paths[0]).read_text())
    if record.get("format") != FORMAT:
        raise ValueError(f"{paths[0]} has format {record.get('format')}, and this version reads format {FORMAT}.")
    saved_class = record.get("base_model_class")
    if saved_class != base_class:
        raise ValueError(
            f"{model_id} was trained over a {saved_class} ({record.get('base_model_name')}) and was given "
            f"a {base_class}."
        )
    known = {field.name for field in fields(DynConfig)}
    return DynConfig(**{key: value for key, value in record.items() if key in known}), load_file(paths[1])
