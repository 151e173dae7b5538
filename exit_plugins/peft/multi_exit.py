"""Early heads over a backbone somebody else wrote: how each family is cut into blocks, and what is made of it.

A new family is one subclass of ``Family`` with the four steps of its forward, registered by ``register_family``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm.models
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..exits import MultiExit

__all__ = ["DynOutput", "EarlyHead", "ExitModel", "Family", "MultiExitBackbone", "find_family", "register_family"]


class Family(ABC):
    """How the models of one family are cut into a chain of units (blocks, or stages), each of which may end in an exit.

    An instance belongs to no model: every method is given the model, adapters included, and calls its modules, so that
    whatever wraps them is in effect. The state between units is a pytree of tensors with the batch first.

    Attributes:
        name: what the family is called in messages.
        unit: ``"block"`` or ``"stage"``.
        interval: units per exit where nothing is said; None for a quarter of the units.
    """

    name: str
    unit = "block"
    interval: int | None = None

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether this family's forward is the model's."""

    def prepare(self, model: nn.Module) -> None:  # noqa: B027  most families have nothing to do
        """Change what would keep adapters from being called, without changing what the model computes."""

    @abstractmethod
    def units(self, model: nn.Module) -> list[str]:
        """Names of the units in the order they run."""

    def widths(self, model: nn.Module) -> list[int]:
        """Number of features behind each unit."""
        return [model.num_features] * len(self.units(model))

    def has_class_token(self, model: nn.Module) -> bool:
        """Whether ``features`` can be asked for the class token."""
        return False

    @abstractmethod
    def classifiers(self, model: nn.Module) -> list[str]:
        """Names of the linear layers that give the last exit's logits."""

    @abstractmethod
    def begin(self, model: nn.Module, x: Tensor) -> Any:
        """Images (B, C, H, W) to the state the first unit reads."""

    def run(self, model: nn.Module, index: int, state: Any) -> Any:
        """The state behind unit ``index``."""
        unit = model.get_submodule(self.units(model)[index])
        if self.training_checkpoints(model):
            return checkpoint(unit, state, use_reentrant=False)
        return unit(state)

    @staticmethod
    def training_checkpoints(model: nn.Module) -> bool:
        """Whether timm was told to trade computation for memory, and this is training."""
        return bool(getattr(model, "grad_checkpointing", False)) and model.training and torch.is_grad_enabled()

    @abstractmethod
    def features(self, model: nn.Module, state: Any, token: str) -> Tensor:
        """What an early head reads, (B, width): the class token (``"cls"``) or the mean over positions (``"mean"``)."""

    @abstractmethod
    def finish(self, model: nn.Module, state: Any) -> Tensor:
        """The last exit's logits (B, C), by the backbone's own norm and head."""


FAMILIES: list[Family] = []


def register_family(family: type[Family]) -> type[Family]:
    """Class decorator: make a family known to ``get_dyn_peft_model``. Families registered later are asked first."""
    FAMILIES.insert(0, family())
    return family


def find_family(model: nn.Module) -> Family:
    """The family of ``model``; TypeError naming the known ones, and how to add one, if there is none."""
    for family in FAMILIES:
        if family.accepts(model):
            return family
    known = "; ".join(sorted(family.name for family in FAMILIES))
    raise TypeError(
        f"{type(model).__name__} is of no family whose blocks are known. Known are: {known}. To add one, subclass "
        "exit_plugins.peft.multi_exit.Family (its docstrings say what each method returns) and decorate the subclass "
        "with register_family; nothing else changes."
    )


def _same_forward(model: nn.Module, cls: type, *names: str) -> bool:
    """Whether ``model`` is a ``cls`` that did not override the methods a family restates."""
    return isinstance(model, cls) and all(getattr(type(model), name) is getattr(cls, name) for name in names)


class _TimmFamily(Family):
    """Models whose last exit is timm's ``forward_head(norm(x))`` with the linear layer ``head``."""

    def units(self, model):
        return [f"blocks.{i}" for i in range(len(model.blocks))]

    def has_class_token(self, model):
        return model.cls_token is not None

    def classifiers(self, model):
        return ["head"]

    def features(self, model, state, token):
        return state[:, 0] if token == "cls" else state[:, model.num_prefix_tokens :].mean(1)

    def finish(self, model, state):
        return model.forward_head(model.norm(state))


@register_family
class TimmViT(_TimmFamily):
    name = "timm VisionTransformer (vit, deit, deit3, augreg, mae, moco-v3, dino, dinov2, clip, siglip)"

    def accepts(self, model):
        return _same_forward(model, timm.models.VisionTransformer, "forward", "forward_features")

    def classifiers(self, model):
        return ["head", "head_dist"] if hasattr(model, "head_dist") else ["head"]

    def begin(self, model, x):
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


@register_family
class TimmEva(_TimmFamily):
    """Rotary positions are the same for all samples of a batch: every unit computes them anew from the grid."""

    name = "timm Eva (eva, eva02, dinov3, rope vit, perception encoder)"

    def accepts(self, model):
        return _same_forward(model, timm.models.Eva, "forward", "forward_features")

    def prepare(self, model):
        if model.rope is not None and model.patch_drop is not None:
            raise ValueError(
                "patch dropout gives every sample rotary positions of its own, which early exits do not carry; create "
                "the model with patch_drop_rate=0."
            )
        for block in model.blocks:
            # With a fused bias timm reads qkv.weight and never calls qkv, so that an adapter around it has no effect.
            if getattr(block.attn, "qkv", None) is not None:
                block.attn.qkv_bias_separate = True

    def begin(self, model, x):
        x = model.patch_embed(x)
        # With inputs of any size, the grid is passed on as the shape of a leaf without elements.
        grid = x.new_empty((x.shape[0], 0, x.shape[1], x.shape[2])) if model.dynamic_img_size else None
        x, _ = model._pos_embed(x)
        x = model.norm_pre(x)
        return x if grid is None else (x, grid)

    def run(self, model, index, state):
        x, grid = state if isinstance(state, tuple) else (state, None)
        rope = None
        if model.rope is not None:
            if grid is not None:
                rope = model.rope.get_embed(shape=grid.shape[2:])
            elif hasattr(model.rope, "feat_shape"):
                rope = model.rope.get_embed()
            else:
                rope = model.rope.get_embed(shape=model.patch_embed.grid_size)
            if getattr(model, "rope_mixed", False):
                rope = rope[index]
        block = model.blocks[index]
        if self.training_checkpoints(model):
            x = checkpoint(block, x, rope=rope, use_reentrant=False)
        else:
            x = block(x, rope=rope)
        return x if grid is None else (x, grid)

    def features(self, model, state, token):
        return super().features(model, state[0] if isinstance(state, tuple) else state, token)

    def finish(self, model, state):
        return super().finish(model, state[0] if isinstance(state, tuple) else state)


class _TimmStages(Family):
    """Hierarchical models: every stage's end is an exit, read by its mean over positions."""

    unit = "stage"
    interval = 1

    def classifiers(self, model):
        return ["head.fc"]

    def widths(self, model):
        return [info["num_chs"] for info in model.feature_info]


@register_family
class TimmSwin(_TimmStages):
    name = "timm SwinTransformer (by stages)"

    def accepts(self, model):
        return _same_forward(model, timm.models.SwinTransformer, "forward", "forward_features", "forward_head")

    def units(self, model):
        return [f"layers.{i}" for i in range(len(model.layers))]

    def begin(self, model, x):
        return model.patch_embed(x)

    def features(self, model, state, token):
        return state.mean((1, 2))  # (B, H, W, C)

    def finish(self, model, state):
        return model.forward_head(model.norm(state))


@register_family
class TimmConvNeXt(_TimmStages):
    name = "timm ConvNeXt (by stages)"

    def accepts(self, model):
        return _same_forward(model, timm.models.ConvNeXt, "forward", "forward_features", "forward_head")

    def units(self, model):
        return [f"stages.{i}" for i in range(len(model.stages))]

    def begin(self, model, x):
        return model.stem(x)

    def features(self, model, state, token):
        return state.mean((2, 3))  # (B, C, H, W)

    def finish(self, model, state):
        return model.forward_head(model.norm_pre(state))


class _TransformersFamily(Family):
    """``XForImageClassification``: a body with embeddings and a list of layers, and a classifier."""

    classes: tuple[type, ...]
    layers = "layers"
    prefix_tokens = 1

    def accepts(self, model):
        return type(model) in self.classes

    @staticmethod
    def body(model: nn.Module) -> nn.Module:
        return getattr(model, model.base_model_prefix)

    def units(self, model):
        layers = f"{model.base_model_prefix}.{self.layers}"
        return [f"{layers}.{i}" for i in range(len(model.get_submodule(layers)))]

    def widths(self, model):
        return [model.config.hidden_size] * len(self.units(model))

    def has_class_token(self, model):
        return True

    def classifiers(self, model):
        return ["classifier"]

    def begin(self, model, x):
        embeddings = self.body(model).embeddings
        return embeddings(x.to(embeddings.patch_embeddings.projection.weight.dtype))

    def run(self, model, index, state):
        # The layers of transformers take care of gradient checkpointing themselves.
        return model.get_submodule(self.units(model)[index])(state)

    def features(self, model, state, token):
        return state[:, 0] if token == "cls" else state[:, self.prefix_tokens :].mean(1)

    def finish(self, model, state):
        return model.classifier(self.body(model).layernorm(state)[:, 0])


@register_family
class TransformersViT(_TransformersFamily):
    name = "transformers ViTForImageClassification"
    classes = (transformers.ViTForImageClassification,)


@register_family
class TransformersDeiT(_TransformersFamily):
    name = "transformers DeiTForImageClassification, DeiTForImageClassificationWithTeacher"
    classes = (transformers.DeiTForImageClassification, transformers.DeiTForImageClassificationWithTeacher)
    prefix_tokens = 2

    def classifiers(self, model):
        return ["classifier"] if hasattr(model, "classifier") else ["cls_classifier", "distillation_classifier"]

    def finish(self, model, state):
        if hasattr(model, "classifier"):
            return super().finish(model, state)
        x = self.body(model).layernorm(state)
        return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2


@register_family
class TransformersDinov2(_TransformersFamily):
    name = "transformers Dinov2ForImageClassification"
    classes = (transformers.Dinov2ForImageClassification,)
    layers = "encoder.layer"

    def finish(self, model, state):
        x = self.body(model).layernorm(state)
        return model.classifier(torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1))


@register_family
class TransformersBeit(_TransformersFamily):
    name = "transformers BeitForImageClassification"
    classes = (transformers.BeitForImageClassification,)

    def begin(self, model, x):
        if tuple(x.shape[2:]) != self._resolution(model):
            raise ValueError(
                f"this BEiT computes relative positions for images of {self._resolution(model)}, "
                f"got {tuple(x.shape[2:])}."
            )
        return super().begin(model, x)

    @staticmethod
    def _resolution(model: nn.Module) -> tuple[int, int]:
        size = model.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def run(self, model, index, state):
        body, mask, resolution = self.body(model), None, self._resolution(model)
        if body.shared_position_bias is not None:
            window = tuple(side // model.config.patch_size for side in resolution)
            mask = body.shared_position_bias(window, interpolate_pos_encoding=False, dim_size=state.shape[1])
        return body.layers[index](state, attention_mask=mask, resolution=resolution)

    def finish(self, model, state):
        body = self.body(model)
        return model.classifier(body.pooler(body.layernorm(state)))


class EarlyHead(nn.Module):
    """LayerNorm and a linear classifier, or an MLP of one hidden layer (GELU) if ``hidden`` is not 0.

    Input (B, width), output (B, num_classes), in the head's own precision.
    """

    def __init__(self, width: int, num_classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU()) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mlp(self.norm(x.to(self.norm.weight.dtype))))


@dataclass
class DynOutput(ModelOutput):
    """What a dynamic model returns to trainers of the transformers kind.

    Attributes:
        loss: scalar, if labels were given.
        logits: (B, C) of the last exit.
        exit_logits: (B, K, C) of all exits, shallow to deep.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None


class ExitModel(MultiExit):
    """The multi-exit protocol over a backbone with early heads; mixin of the model in training and of the merged one.

    A subclass gives ``backbone``, ``early_heads`` (K - 1 modules), ``family``, ``exit_after`` (how many units have run
    at each exit) and ``token``.
    """

    accepts_loss_kwargs = False  # transformers' Trainer would otherwise not divide the loss under accumulation
    main_input_name = "pixel_values"

    backbone: nn.Module
    early_heads: Sequence[nn.Module]
    family: Family
    exit_after: tuple[int, ...]
    token: str

    @property
    def num_exits(self) -> int:
        return len(self.exit_after)

    def begin_exits(self, x: Tensor) -> Any:
        return self.family.begin(self.backbone, x)

    def forward_exit(self, index: int, state: Any) -> tuple[Tensor, Any]:
        state = self.run_units(index, state)
        if index == self.num_exits - 1:
            return self.family.finish(self.backbone, state), state
        return self.early_heads[index](self.family.features(self.backbone, state, self.token)), state

    def run_units(self, index: int, state: Any) -> Any:
        """The state at exit ``index`` from the state at the exit before it."""
        for unit in range(self.exit_after[index - 1] if index else 0, self.exit_after[index]):
            state = self.family.run(self.backbone, unit, state)
        return state

    def exit_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """For images (B, C, H, W), what the head of each exit reads, (B, width); at the last exit before its norm."""
        state, features = self.begin_exits(x), []
        for index in range(self.num_exits):
            state = self.run_units(index, state)
            features.append(self.family.features(self.backbone, state, self.token))
        return tuple(features)

    def loss(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is for inference and has no training loss.")

    def forward(
        self, x: Tensor | None = None, labels: Tensor | None = None, *, pixel_values: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...] | DynOutput:
        """Called with images alone, as every multi-exit model; called as transformers models are, a ``DynOutput``.

        Args:
            x: images (B, C, H, W), by position: the tuple of all exits' logits in training, the last exit's in
                evaluation.
            labels: class indices (B,) or probabilities (B, C); with them the result is a ``DynOutput`` with the loss.
            pixel_values: the images by the name transformers' trainers use; the result is then a ``DynOutput``.
        """
        if (x is None) == (pixel_values is None):
            raise TypeError("give the images once, as the first argument or as pixel_values.")
        if pixel_values is not None and labels is None and self.training:
            raise ValueError(
                "training without labels: something took them away before the model could compute the loss of every "
                "exit. With transformers' Trainer that is label_smoothing_factor or compute_loss_func, either of which "
                "would train the last exit alone: use DynConfig(label_smoothing=...), or set `criterion` of the model."
            )
        outputs = self.forward_exits(x if pixel_values is None else pixel_values)
        if pixel_values is None and labels is None:
            return outputs if self.training else outputs[-1]
        loss = None if labels is None else self.loss(outputs, labels)
        return DynOutput(
            loss=loss, logits=outputs[-1], exit_logits=torch.stack([z.to(outputs[-1]) for z in outputs], 1)
        )


class MultiExitBackbone(ExitModel, nn.Module):
    """A backbone and its early heads as one plain multi-exit module, without any adapter of its own.

    What it does not have itself, it is asked of the backbone, as PEFT's wrappers do.
    """

    def __init__(self, backbone: nn.Module, early_heads: nn.ModuleList, exit_after: Sequence[int], token: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.early_heads = early_heads
        self.exit_after = tuple(exit_after)
        self.token = token
        self.family = find_family(backbone)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            return getattr(super().__getattr__("backbone"), name)
