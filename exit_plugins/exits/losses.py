"""Losses over the tuple of every exit's logits: weighted cross-entropy plus distillation from the last exit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .protocol import AnyModel, check_multi_exit

__all__ = ["LOSS_PRESETS", "ExitWeights", "MultiExitLoss", "own_preset"]


@dataclass(frozen=True)
class ExitWeights:
    """Weights of the cross-entropy ``ce`` and of the distillation from the last exit ``kl``, one of each per exit."""

    ce: tuple[float, ...]
    kl: tuple[float, ...]


def _paper(num_exits: int, alpha: float) -> ExitWeights:
    # Dyn-Perceiver, eq. 3: L_k = alpha * CE + (1 - alpha) * KL for k < K, L_K = CE.
    early = num_exits - 1
    return ExitWeights((alpha,) * early + (1.0,), (1.0 - alpha,) * early + (0.0,))


def _released(num_exits: int, alpha: float) -> ExitWeights:
    # The weights the public Dyn-Perceiver models were trained with: the two exits of the latent branch count half.
    # For other numbers of exits the last two stay at 1.
    early = num_exits - 1
    return ExitWeights((0.5,) * max(num_exits - 2, 0) + (1.0,) * min(num_exits, 2), (0.5,) * early + (0.0,))


def _plain_sum(num_exits: int, alpha: float) -> ExitWeights:
    return ExitWeights((1.0,) * num_exits, (0.0,) * num_exits)


LOSS_PRESETS = {
    "paper": _paper,
    "released": _released,
    "msdnet": _plain_sum,
    "dvt": _plain_sum,
    "chase": _plain_sum,
}


def own_preset(model: AnyModel) -> tuple[str, str]:
    """The preset to train ``model`` with where nothing is asked for, and in a few words why it is this one.

    It is the one of the paper that the model comes from, by the model's attribute ``exit_loss``; for a model that names
    none it is ``paper``.

    ValueError if the model names one that there is not.
    """
    name = type(model).__name__
    preset = getattr(model, "exit_loss", "")
    if not preset:
        return "paper", f"the default, as {name} names no loss of its own"
    if preset not in LOSS_PRESETS:
        raise ValueError(f"{name}.exit_loss is {preset!r}; expected one of {', '.join(LOSS_PRESETS)}.")
    return preset, f"what {name} is published with"


class MultiExitLoss(nn.Module):
    """Training loss of a multi-exit model.

    ``sum_k ce_k * CE(logits_k, target) + kl_k * KL(p_K || p_k)`` where the teacher, the last exit, is detached; the
    KL is summed over classes and averaged over the batch, at temperature 1.

    Args:
        num_exits: K, the length of the tuples it will be given.
        preset: ``paper`` (Dyn-Perceiver eq. 3), ``released`` (weights of the public Dyn-Perceiver models), ``msdnet``,
            ``dvt`` or ``chase`` (all three: unweighted sum of the cross-entropies). ``MultiExitLoss.for_model(model)``
            takes the one its architecture was published with.
        alpha: share of the cross-entropy in the early exits' loss; used by ``paper`` alone.
        label_smoothing: of hard targets; soft targets (mixup, cutmix) are taken as they are.
        weights: an ``ExitWeights`` of your own instead of a preset.
        criterion: takes the place of the cross-entropy: called with one exit's logits (B, C), float32, and the target,
            returns a scalar. A host's own loss (binary cross-entropy, Jensen-Shannon, ...) comes in here.

    Shapes: ``outputs`` a tuple of K tensors (B, C); ``target`` (B,) int64 or (B, C) probabilities. A plain tensor of
    logits, a model in evaluation mode say, gets its cross-entropy alone. Returns a scalar.
    """

    def __init__(
        self,
        num_exits: int,
        preset: str = "paper",
        alpha: float = 0.5,
        label_smoothing: float = 0.0,
        weights: ExitWeights | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if num_exits < 1:
            raise ValueError(f"num_exits must be at least 1, got {num_exits}.")
        if weights is None:
            if preset not in LOSS_PRESETS:
                raise ValueError(f"unknown loss preset {preset!r}; choose one of {', '.join(LOSS_PRESETS)}.")
            if not 0.0 <= alpha <= 1.0:
                raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
            weights = LOSS_PRESETS[preset](num_exits, alpha)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if criterion is not None and label_smoothing:
            raise ValueError(
                "label_smoothing belongs to the built-in cross-entropy; give it to your criterion instead."
            )
        if len(weights.ce) != num_exits or len(weights.kl) != num_exits:
            raise ValueError(f"weights for {len(weights.ce)} and {len(weights.kl)} exits do not fit {num_exits} exits.")
        self.num_exits = num_exits
        self.preset = preset
        self.weights = weights
        self.label_smoothing = label_smoothing
        self.criterion = criterion

    @classmethod
    def for_model(cls, model: AnyModel, preset: str | None = None, **kwargs: Any) -> "MultiExitLoss":
        """The loss for ``model``: ``preset``, or where that is None the one of the model's own paper.

        Args:
            model: a multi-exit model, unwrapped; its ``num_exits`` and ``exit_loss`` are read.
            preset, kwargs: as of ``MultiExitLoss``.

        Raises:
            TypeError: the model has no exits.
        """
        return cls(check_multi_exit(model).num_exits, own_preset(model)[0] if preset is None else preset, **kwargs)

    def extra_repr(self) -> str:
        return f"num_exits={self.num_exits}, ce={self.weights.ce}, kl={self.weights.kl}"

    def forward(self, outputs: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self._cross_entropy(outputs, target)
        if len(outputs) != self.num_exits:
            raise ValueError(
                f"the loss was made for {self.num_exits} exits and got {len(outputs)}; "
                f"use MultiExitLoss(num_exits={len(outputs)})."
            )
        teacher = outputs[-1].detach().float().log_softmax(-1)
        total = outputs[-1].new_zeros((), dtype=torch.float32)
        for logits, ce, kl in zip(outputs, self.weights.ce, self.weights.kl, strict=True):
            if ce:
                total = total + ce * self._cross_entropy(logits, target)
            if kl:
                student = logits.float().log_softmax(-1)
                total = total + kl * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return total

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.criterion is not None:
            return self.criterion(logits.float(), target)
        if target.ndim == 2:
            if target.shape != logits.shape:
                raise ValueError(f"soft targets {tuple(target.shape)} do not fit logits {tuple(logits.shape)}.")
            return -(target.float() * logits.float().log_softmax(-1)).sum(-1).mean()
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
