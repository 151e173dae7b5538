"""How a backbone somebody else wrote is cut into a chain of blocks or stages.

A new family is one subclass of ``Family`` with the four steps of its forward, registered by ``register_family``.
"""

from abc import ABC, abstractmethod
from typing import Any

import timm.models
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Family", "find_family", "register_family"]


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
        "exit_plugins.peft.families.Family (its docstrings say what each method returns) and decorate the subclass "
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
