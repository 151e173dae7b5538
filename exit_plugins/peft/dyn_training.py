"""What a dynamic model learns from: the exits' losses, weighted by how far training is, and a masked gradient."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..exits import MultiExitLoss
from .dyn_config import DynConfig
from .exit_model import ExitModel
from .fitting import check_problem, last_classifier
from .schedule import GradientMask, exit_weights

__all__ = ["DynTraining", "exit_criterion"]


def exit_criterion(config: DynConfig) -> MultiExitLoss:
    """The loss of one exit where the user gives none: cross-entropy."""
    return MultiExitLoss(1, "chase", label_smoothing=config.label_smoothing)


class DynTraining(ExitModel):
    """Mixin of the model in training: its loss (Dyn-Adapter eq. 5), and what leads it through a training.

    A subclass gives ``dyn_config``, by adapter name, and ``_active``, the adapter whose exits are in use; it calls
    ``_begin_training`` before it makes its first exits and ``_weigh_exits`` when others become the active ones.
    """

    dyn_config: dict[str, DynConfig]
    exit_weights: Tensor

    def _begin_training(self) -> None:
        self._cross_entropy: dict[str, MultiExitLoss] = {}
        self._own_criterion: Callable[[Tensor, Tensor], Tensor] | None = None
        self.register_buffer("exit_weights", torch.zeros(0), persistent=False)
        self.progress = 0.0
        # Whether somebody sets the progress, has attached the mask; steps seen while one of them is missing.
        self._led, self._masked, self._steps_seen = False, False, 0

    @property
    def _active(self) -> str:
        raise NotImplementedError

    def set_progress(self, progress: float) -> None:
        """Set the weights of the exits' losses for the share of training done, in [0, 1]."""
        self._led = True
        self._weigh_exits(progress)

    def _weigh_exits(self, progress: float | None = None) -> None:
        progress = self.progress if progress is None else progress
        config = self.dyn_config[self._active]
        values = exit_weights(self.num_exits, progress, config.lambda_shallow, config.lambda_deep)
        weights = torch.tensor(values, device=last_classifier(self.backbone, self.family).weight.device)
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

        Raises:
            ValueError: these are not the logits of all exits, or the backbone's configuration asks for another loss
                than cross-entropy and the model has no ``criterion`` for it.
        """
        if isinstance(outputs, Tensor) or len(outputs) != self.num_exits:
            raise ValueError(
                f"expected the logits of all {self.num_exits} exits, as the model returns them in training mode or "
                f"forward_exits does; got {'one tensor' if isinstance(outputs, Tensor) else len(outputs)}."
            )
        if self._own_criterion is None:
            check_problem(self.backbone)
        led = self._led and self._masked
        if self.training and not led and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._notice_unled_training()
        criterion = self.criterion
        losses = torch.stack([criterion(logits, target) for logits in outputs])
        return (self.exit_weights.to(losses) * losses).sum()

    def _notice_unled_training(self) -> None:
        """Warn at the second step of a training that nobody tells how far it is."""
        self._steps_seen += 1
        config, missing = self.dyn_config[self._active], []
        if not self._led and any(start != end for start, end in (config.lambda_shallow, config.lambda_deep)):
            weights = [round(weight, 2) for weight in self.exit_weights.tolist()]
            missing.append(f"its exits keep the weights they start with, {weights}")
        if not self._masked and config.mask is not None and config.mask_share:
            missing.append("no entry of the gradient is masked")
        if self._steps_seen == 2 and missing:
            warnings.warn(
                f"this model is in training and nobody leads it: {', and '.join(missing)}. With transformers' Trainer "
                "give it callbacks=[DynTrainerCallback()] (in exit_plugins.peft); in another loop call "
                "attach_mask(optimizer) before it and set_progress(step / total) at every step. If this is meant, say "
                "so in DynConfig: equal ends of lambda_shallow and of lambda_deep, mask=None.",
                stacklevel=3,
            )

    def attach_mask(self, optimizer: Optimizer) -> GradientMask | None:
        """Let the gradient mask of the active adapter act on ``optimizer``; None if the configuration has no mask."""
        self._masked = True
        config = self.dyn_config[self._active]
        if config.mask is None or not config.mask_share:
            return None
        chosen = []
        for name, parameter in self.named_parameters():
            is_head = name.startswith("exit_heads.") or ".modules_to_save." in name
            if parameter.requires_grad and config.mask_scope in ("all", "heads" if is_head else "adapters"):
                chosen.append(parameter)
        return GradientMask(chosen, config.mask_share, config.mask, config.mask_seed).attach(optimizer)
