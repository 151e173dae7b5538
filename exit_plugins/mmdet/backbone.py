"""Backbones for MMDetection: Dyn-Perceiver's feature branch, and plain timm models to compare it with."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

from ..timm import list_models
from ..timm._checkpoints import describe_keys, fetch_checkpoint, read_checkpoint
from ..timm._host import FeatureGetterNet, TimmModel
from ..timm.dynperceiver import checkpoint_filter_fn
from ..timm.weights import packaged_weights
from ._host import get_torch_safe_globals

__all__ = ["DynPerceiver", "TimmBackbone"]

_FIRST_STRIDE = 4  # level 0 of a detector's pyramid
_FEATURES = ("after_z2x", "before_z2x")


class _TimmFeatures(BaseModule):
    """A timm model that returns the feature maps of its stages and can be frozen and initialised MMDetection's way.

    The model's classifier, and whatever else the wanted maps do not need, is removed.

    ``init_cfg=dict(type="Pretrained", checkpoint=...)`` takes

    * a file: weights of the classification model, in its own layout or inside a training script's checkpoint (timm's
      ``train.py``, averaged weights first), safetensors or torch;
    * an ``http(s)://`` address of such a file;
    * ``timm://NAME``: the weights timm knows as ``NAME``, with or without a tag (``timm://regnety_016.tv2_in1k``);
    * ``package://NAME``: ImageNet weights from an installed package (``package://tf_efficientnet_lite0``, see
      ``exit_plugins.timm.weights``);
    * with ``prefix="backbone."``, a file of a detector with this backbone.

    Every weight of the backbone must be in it, with its shape, and nothing the classification model does not have.

    Args:
        model: The classification model to take the maps from.
        levels: Where the detector's levels lie in ``model.feature_info``.
        out_indices: Which of ``levels`` to return, ascending.
        frozen_stages: Freeze the stem (0) and the first n stages (n), weights and statistics; -1 for none.
        norm_eval: Keep every batch norm at its running statistics in training.
        init_cfg: See above; None keeps timm's random initialisation.
    """

    def __init__(
        self,
        model: TimmModel,
        levels: Sequence[int],
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        init_cfg: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(init_cfg)
        out_indices = _check_out_indices(out_indices, len(levels))
        if not -1 <= frozen_stages <= len(levels):
            raise ValueError(
                f"frozen_stages must be -1 (none), 0 (the stem) or up to {len(levels)} (stages), got {frozen_stages}."
            )
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._stage_modules = [model.feature_info[level]["module"] for level in levels]
        self.features = FeatureGetterNet(model, out_indices=tuple(levels[index] for index in out_indices))
        self.out_channels: tuple[int, ...] = tuple(self.features.feature_info.channels())
        self.out_strides: tuple[int, ...] = tuple(self.features.feature_info.reduction())
        self._freeze_stages()

    @property
    def model(self) -> TimmModel:
        """The timm model inside."""
        return self.features.model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, ``out_channels[i]``, H / ``out_strides[i]``, W / ``out_strides[i]``) of images (B, 3, H, W)."""
        return tuple(self.features(x))

    def train(self, mode: bool = True) -> "_TimmFeatures":
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for parameter in self.model.parameters(recurse=False):
            parameter.requires_grad = False
        stage = max(self.frozen_stages - 1, 0)
        for module in _modules_until(self.model, self._stage_modules[stage], inclusive=self.frozen_stages > 0):
            module.eval()
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names, strictly.

        Raises:
            ValueError: ``init_cfg`` is of another type, or the checkpoint does not fit: the message names the keys.
            FileNotFoundError: There is no such file.
        """
        if self.init_cfg and not self.is_init:  # type: ignore[has-type]  # a property of MMEngine's without types
            self._load_pretrained(**_check_init_cfg(self.init_cfg))
        self.is_init = True

    def _load_pretrained(self, checkpoint: str, prefix: str | None = None) -> None:
        reference = self._reference_model()
        state_dict = _read_weights(checkpoint)
        if prefix:
            # In a detector the weights lie under the name of the backbone and the names of the modules above.
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            state_dict = {k.removeprefix("features.model."): v for k, v in state_dict.items()}
            if not state_dict:
                raise ValueError(f"no key in {checkpoint} begins with prefix={prefix!r}.")
        else:
            state_dict = self._convert(state_dict, reference)
        own, known = self._expected(state_dict), reference.state_dict().keys()
        missing = [key for key in own if key not in state_dict]
        unexpected = [key for key in state_dict if key not in known]
        misshapen = [
            f"{key}: {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in state_dict and state_dict[key].shape != value.shape
        ]
        if missing or unexpected or misshapen:
            raise ValueError(
                f"{checkpoint} does not fit the backbone: {describe_keys('missing', missing)}; "
                f"{describe_keys('unexpected', unexpected)}; {describe_keys('differently shaped', misshapen)}. "
                "Check arch against what was trained."
            )
        self.model.load_state_dict({**self.model.state_dict(), **{key: state_dict[key] for key in own}})
        print_log(f"{type(self).__name__}: loaded all {len(own)} entries from {checkpoint}", logger="current")

    def _reference_model(self) -> TimmModel:
        """The whole classification model on the meta device, for its names and shapes."""
        raise NotImplementedError

    def _convert(self, state_dict: dict[str, Tensor], reference: TimmModel) -> dict[str, Tensor]:
        """A classification checkpoint in the layout of ``reference``."""
        return state_dict

    def _expected(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of the model the checkpoint ``state_dict``, in its layout, must hold: everything."""
        return self.model.state_dict()


class DynPerceiver(_TimmFeatures):
    """The feature branch of a Dyn-Perceiver, informed by its latents at every stage (the paper's section 4.4).

    It runs in full for every image, without early exits. Returned are the maps of ``out_indices`` among the four
    stages; their channels are ``out_channels``, their strides ``out_strides``: 4, 8, 16, 32 with RegNet-Y and ResNet,
    8, 16, 32, 32 with MobileNetV3.

    The checkpoint in ``init_cfg`` may be of this package, of a timm training run or in the authors' layout;
    ``timm://dynperceiver_regnety_800mf`` fetches the published weights of a model that has them. In training a batch
    norm that is not frozen needs more than one value per channel, as everywhere.

    ``arch="dynperceiver", model_args=dict(backbone=NAME)`` is Dyn-Perceiver over any timm network with four stages;
    the checkpoint may then hold the whole model or the plain network alone, and the latents' part starts anew.

    Args:
        arch: timm name of one of this package's Dyn-Perceivers, such as ``dynperceiver_regnety_1_6gf``.
        out_indices: Stages to return, from 0 to 3, ascending.
        features: ``after_z2x`` takes the maps after the cross-attention that follows each stage, ``before_z2x`` the
            output of its convolutions. The paper does not say which feed its detectors.
        last_z2x: Run the cross-attention after the last returned stage. Without it, that stage's map is the output of
            its convolutions and costs less. ``before_z2x`` never needs it.
        frozen_stages: Freeze the stem and latents (0) and the first n stages (n), weights and statistics; -1 for none.
        norm_eval: Keep every batch norm at its running statistics in training.
        with_cp: Recompute activations in the backward pass to save memory.
        model_args: Further arguments of the timm model, such as ``dict(drop_path_rate=0.1)``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``; None trains from random weights.

    Raises:
        ValueError: An argument is out of range; the message says what is expected.
    """

    def __init__(
        self,
        arch: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        features: str = "after_z2x",
        last_z2x: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        model_args: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        names = [name for name in list_models() if name.startswith("dynperceiver")]
        if arch not in names:
            raise ValueError(
                f"unknown Dyn-Perceiver {arch!r}{_suggestion(arch, names)}. Known are {', '.join(names)}; other timm "
                "models are exit_plugins.TimmBackbone."
            )
        if features not in _FEATURES:
            raise ValueError(f"features must be one of {', '.join(_FEATURES)}, got {features!r}.")
        model_args = dict(model_args or {})
        before_z2x = features == "before_z2x"
        model: TimmModel = timm.create_model(arch, num_classes=0, features_before_z2x=before_z2x, **model_args)
        if hasattr(model, "backbone") and frozen_stages >= 0:
            raise ValueError(
                "over a given network frozen_stages has no meaning, as the network is one part: freeze all of it by "
                "model_args=dict(freeze_backbone=True), or nothing by frozen_stages=-1."
            )
        super().__init__(model, range(len(model.feature_info)), out_indices, frozen_stages, norm_eval, init_cfg)
        if not before_z2x and not last_z2x:
            self.model.stages[-1].keep_convolutions()
        # Nothing reads the latents where the only stage left is its convolutions.
        self.model.latent.requires_grad_(self.model.latent.requires_grad and self.model.stages[0].z2x is not None)
        if with_cp:
            self.model.set_grad_checkpointing()
        self.arch = arch
        self._model_args = model_args

    def _reference_model(self) -> TimmModel:
        return timm.create_model(self.arch, num_classes=0, device="meta", **self._model_args)

    def _convert(self, state_dict: dict[str, Tensor], reference: TimmModel) -> dict[str, Tensor]:
        if not hasattr(reference, "backbone"):
            return checkpoint_filter_fn(state_dict, reference)
        if "latent" in state_dict:
            heads = ("heads.", "transfers.")
            return {key: value for key, value in state_dict.items() if not key.startswith(heads)}
        # Weights of the plain network, its classifier left out.
        names = reference.backbone.state_dict().keys()
        return {f"backbone.{key}": value for key, value in state_dict.items() if key in names}

    def _expected(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        own = super()._expected(state_dict)
        if hasattr(self.model, "backbone") and "latent" not in state_dict:
            return {key: value for key, value in own.items() if key.startswith("backbone.")}
        return own


class TimmBackbone(_TimmFeatures):
    """Any timm model that returns intermediate feature maps; the plain counterpart of :class:`DynPerceiver`.

    Levels are counted as MMDetection counts them: level 0 is the first map of stride 4 or more, whatever timm's own
    numbering, so that ``arch="regnety_016"`` stands in for a Dyn-Perceiver on RegNetY-1.6GF without another change.

    Args:
        arch: timm name, with or without a tag; the tag plays no part here, weights come with ``init_cfg``.
        out_indices: Levels to return, ascending.
        frozen_stages: Freeze what comes before level 0's stage (0) and the first n stages (n), weights and
            statistics; -1 for none.
        norm_eval: Keep every batch norm at its running statistics in training.
        with_cp: Recompute the stages' activations in the backward pass to save memory.
        model_args: Further arguments of the timm model.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``; None trains from random weights.

    Raises:
        ValueError: An argument is out of range; the message says what is expected.
    """

    def __init__(
        self,
        arch: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        model_args: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        if not timm.is_model(arch):
            raise ValueError(
                f"unknown timm model {arch!r}{_suggestion(arch, timm.list_models())}. timm.list_models('*PATTERN*') "
                "finds names."
            )
        model_args = dict(model_args or {})
        model: TimmModel = timm.create_model(arch, num_classes=0, **model_args)
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"timm's {arch} does not return intermediate feature maps (no forward_intermediates).")
        levels = [index for index, info in enumerate(model.feature_info) if info["reduction"] >= _FIRST_STRIDE]
        super().__init__(model, levels, out_indices, frozen_stages, norm_eval, init_cfg)
        if with_cp:
            for name in self._stage_modules[: max(self.out_indices) + 1]:
                owner, _, child = name.rpartition(".")
                parent = self.model.get_submodule(owner)
                setattr(parent, child, checkpoint_wrapper(getattr(parent, child)))
        self.arch = arch
        self._model_args = model_args

    def _reference_model(self) -> TimmModel:
        with torch.device("meta"):
            return timm.create_model(self.arch, **self._model_args)


def _check_out_indices(out_indices: Sequence[int], num_levels: int) -> tuple[int, ...]:
    out_indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    in_range = all(isinstance(index, int) and 0 <= index < num_levels for index in out_indices)
    if not out_indices or not in_range or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(
            f"out_indices must be ascending stages from 0 to {num_levels - 1}, each once, got {out_indices}."
        )
    return out_indices


def _check_init_cfg(init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(init_cfg, Mapping):
        if len(init_cfg) != 1:
            raise ValueError(f"init_cfg must be one dict, got {len(init_cfg)}: timm initialises what is not loaded.")
        (init_cfg,) = init_cfg
    kwargs = {key: value for key, value in init_cfg.items() if key not in ("type", "map_location")}
    kind = init_cfg.get("type")
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", kind)
    if kind not in ("Pretrained", "PretrainedInit"):
        raise ValueError(f"init_cfg must be of type 'Pretrained', got {kind!r}: timm initialises what is not loaded.")
    if not kwargs.get("checkpoint") or not kwargs.keys() <= {"checkpoint", "prefix"}:
        raise ValueError(f"init_cfg takes checkpoint and, optionally, prefix; got {', '.join(kwargs) or 'neither'}.")
    return kwargs


def _read_weights(source: str) -> dict[str, Tensor]:
    """State dict from a file, an address, ``timm://NAME`` or ``package://NAME``."""
    source = str(source)
    if source.startswith("package://"):
        return packaged_weights(source.removeprefix("package://"))["state_dict"]
    if source.startswith("timm://"):
        name = source.removeprefix("timm://")
        if not timm.is_model_pretrained(name):
            raise ValueError(
                f"no weights are published under the timm name {name!r}. Name a file of yours, "
                "init_cfg.checkpoint=PATH, or train from random weights: init_cfg=None, frozen_stages=-1, "
                "norm_eval=False."
            )
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    if source.startswith(("http://", "https://")):
        name = urlparse(source).path.rpartition("/")[2]
        if not name:
            raise ValueError(f"the address {source} does not end in a file name; download the file and give its path.")
        source = str(fetch_checkpoint(source, name))
    # Detectors' checkpoints hold MMEngine's own records beside the weights; the list is MMEngine's.
    with torch.serialization.safe_globals(get_torch_safe_globals()):
        return read_checkpoint(source)


def _modules_until(root: nn.Module, name: str, inclusive: bool) -> Iterator[nn.Module]:
    """Modules of ``root`` registered, and so run, before the submodule ``name``, and with ``inclusive`` it too."""
    head, _, rest = name.partition(".")
    for child_name, child in root.named_children():
        if child_name == head:
            if rest:
                yield from _modules_until(child, rest, inclusive)
            elif inclusive:
                yield child
            return
        yield child


def _suggestion(name: str, known: Sequence[str]) -> str:
    matches = get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
