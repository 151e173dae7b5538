"""The multi-exit protocol over a backbone somebody else wrote and early heads, and what hosts' trainers ask of it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .._modules import ModuleList
from ..exits import MultiExit
from ..exits.clips import frames_of
from ..exits.protocol import map_state
from ._host import AuxiliaryTrainingWrapper, HostModel
from .family import Family
from .heads import EarlyHead, WideClassifier
from .hub import PushesToHub

__all__ = ["DynOutput", "ExitModel"]

# Methods of a backbone that mean the same for the model with exits. Every other one would act on the backbone alone
# (write it, count it, give it other classes, cut blocks off) and silently leave the early heads out.
_SHARED_METHODS = {
    *("forward_features", "forward_head", "forward_intermediates", "get_classifier", "get_intermediate_layers"),
    *("get_input_embeddings", "get_output_embeddings", "tie_weights", "floating_point_ops", "can_generate"),
    *("enable_input_require_grads", "disable_input_require_grads", "set_attn_implementation", "set_input_size"),
}


@dataclass
class DynOutput(ModelOutput):
    """What a dynamic model returns to trainers of the transformers kind.

    Attributes:
        loss: scalar, if labels were given.
        logits: (B, C) of the last exit.
        exit_logits: (B, K, C) of all exits, shallow to deep. In evaluation it is an attribute but no item, unless the
            model's ``predict_exits`` is set: trainers collect the items, and users' metrics expect one array of logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None


if TYPE_CHECKING:

    class _Module(MultiExit, nn.Module):
        """What the class below is mixed into."""

else:
    _Module = MultiExit


class ExitModel(PushesToHub, _Module):
    """The multi-exit protocol over a backbone with early heads; mixin of the model in training and of the merged one.

    A subclass gives ``backbone``, ``early_heads`` (K - 1 modules), ``family``, ``exit_after`` (how many units have run
    at each exit) and ``token``.
    """

    accepts_loss_kwargs = False  # transformers' Trainer would otherwise not divide the loss under accumulation
    main_input_name = "pixel_values"
    predict_exits = False  # whether trainers collect the logits of all exits in evaluation, see DynOutput

    family: Family

    if TYPE_CHECKING:  # of attributes, or of what the active adapter has

        @property
        def backbone(self) -> HostModel: ...

        @property
        def early_heads(self) -> ModuleList[EarlyHead]: ...

        @property
        def exit_after(self) -> tuple[int, ...]: ...

        @property
        def token(self) -> str: ...

    @property
    def num_exits(self) -> int:  # type: ignore[override]  # what the exits say: other models keep it, none takes it
        return len(self.exit_after)

    @property
    def sample_ndim(self) -> int:  # type: ignore[override]  # the same
        return self.family.sample_ndim

    @property
    def last_head_width(self) -> int:
        """Hidden width of the last exit's head, 0 for a linear one."""
        classifier = self.backbone.get_submodule(self.family.classifiers(self.backbone)[0])
        if isinstance(classifier, AuxiliaryTrainingWrapper):  # PEFT's, around what is trained in full
            classifier = classifier.original_module
        return classifier.in_features if isinstance(classifier, WideClassifier) else 0

    def begin_exits(self, x: Tensor) -> Any:
        return self.family.begin(self.backbone, x)

    def forward_exit(self, index: int, state: Any) -> tuple[Tensor, Any]:
        output, state = self.run_units(index, state)
        if index == self.num_exits - 1:
            return self.family.finish(self.backbone, state), state
        return self.early_heads[index](self._features(index, output)), state

    def run_units(self, index: int, state: Any) -> tuple[Any, Any]:
        """What the last unit before exit ``index`` returns and the state there, from the state at the exit before."""
        output = None
        for unit in range(self.exit_after[index - 1] if index else 0, self.exit_after[index]):
            output, state = self.family.run(self.backbone, unit, state)
        return output, state

    def _features(self, index: int, output: Any) -> Tensor:
        return self.family.features(self.backbone, self.exit_after[index] - 1, output, self.token)

    def exit_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """For images (B, C, H, W), what the head of each exit reads, (B, width); at the last exit before its norm.

        For clips of ``num_frames`` images (B, T, C, H, W) it is (B, T, width): a head reads every frame by itself, and
        the mean is over what it says.
        """
        frames = self.__dict__.get("num_frames")  # not a backbone's own, which reads its frames together
        state, features = self.begin_exits(x), []
        if frames:
            state = map_state(frames_of, state)
        for index in range(self.num_exits):
            output, state = self.run_units(index, state)
            found = self._features(index, output)
            features.append(found.reshape(-1, frames, found.shape[-1]) if frames else found)
        return tuple(features)

    def loss(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is for inference and has no training loss.")

    def forward(
        self, x: Tensor | None = None, labels: Tensor | None = None, *, pixel_values: Tensor | None = None
    ) -> Any:
        """Called with images alone, as every multi-exit model; called as transformers models are, a ``DynOutput``.

        Args:
            x: images (B, C, H, W), by position: the tuple of all exits' logits in training, the last exit's in
                evaluation.
            labels: class indices (B,) or probabilities (B, C); with them the result is a ``DynOutput`` with the loss.
            pixel_values: the images by the name transformers' trainers use; the result is then a ``DynOutput``.

        Raises:
            TypeError: the images are given twice, or not at all.
            ValueError: training by name without labels, which would leave the early exits out.
        """
        images = x if pixel_values is None else pixel_values
        if images is None or (x is not None and pixel_values is not None):
            raise TypeError("give the images once, as the first argument or as pixel_values.")
        if pixel_values is not None and labels is None and self.training:
            raise ValueError(
                "training without labels: something took them away before the model could compute the loss of every "
                "exit. With transformers' Trainer that is label_smoothing_factor or compute_loss_func, either of which "
                "would train the last exit alone: use DynConfig(label_smoothing=...), or set `criterion` of the model."
            )
        outputs = self.forward_exits(images)
        if pixel_values is None and labels is None:
            return outputs if self.training else outputs[-1]
        loss = None if labels is None else self.loss(outputs, labels)
        exit_logits = torch.stack([z.to(outputs[-1]) for z in outputs], 1)
        if self.training or self.predict_exits:
            return DynOutput(loss=loss, logits=outputs[-1], exit_logits=exit_logits)
        output = DynOutput(loss=loss, logits=outputs[-1])
        object.__setattr__(output, "exit_logits", exit_logits)  # past ModelOutput's, which would make it an item
        return output

    # What the hosts' trainers ask of a model, answered for backbone and early heads together

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Trade computation for memory in the backbone's blocks, as transformers' ``TrainingArguments`` ask for it.

        Early heads are small and are always kept. timm's models take no settings; transformers' take theirs.

        ValueError for settings a timm backbone does not have.
        """
        backbone = self.backbone
        if hasattr(backbone, "set_grad_checkpointing"):
            default = {"use_reentrant": False, "every_n_layers": 1, "offload": False}
            given = default | (activation_checkpointing_kwargs or {}) | kwargs
            asked = {name: value for name, value in given.items() if name not in default or value != default[name]}
            if asked:
                raise ValueError(
                    f"a timm backbone checkpoints every block, without reentrance, and takes no settings; got {asked}."
                )
            backbone.set_grad_checkpointing(True)
        elif hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs
            )
        else:  # older versions of transformers
            backbone.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs
            )

    def activation_checkpointing_disable(self) -> None:
        """Undo ``activation_checkpointing_enable``."""
        backbone = self.backbone
        if hasattr(backbone, "set_grad_checkpointing"):
            backbone.set_grad_checkpointing(False)
        elif hasattr(backbone, "activation_checkpointing_disable"):
            backbone.activation_checkpointing_disable()
        else:
            backbone.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """``activation_checkpointing_enable`` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """``activation_checkpointing_disable`` by its older name."""
        self.activation_checkpointing_disable()

    def num_parameters(self, only_trainable: bool = False, **kwargs: Any) -> int:
        """Number of parameters, early heads included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters that timm leaves without weight decay, as they are called here."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        place = next(name for name, module in self.named_modules() if module is self.backbone)
        return {f"{place}.{name}" for name in names}

    def _of_backbone(self, name: str) -> Any:
        """An attribute of the backbone, unless it is a method that would leave the exits out."""
        value = getattr(self.backbone, name)
        if name.startswith("_") or name in _SHARED_METHODS or not inspect.ismethod(value):
            return value
        raise AttributeError(
            f"{name}() is a method of the backbone, a {type(self.backbone).__name__}, and knows nothing of the exits: "
            f"{_INSTEAD.get(name, 'early heads would be left out')}. Where the backbone alone is meant, call "
            f"model.backbone.{name}()."
        )


# What to do in place of a method of the backbone.
_INSTEAD = {
    "reset_classifier": "it would change the last exit's classes alone; create the backbone with the task's classes",
    "prune_intermediate_layers": "it would take away blocks that exits stand behind",
    "group_matcher": "its patterns are for the backbone's names",
    "get_memory_footprint": "early heads would not be counted; num_parameters() counts them",
}
