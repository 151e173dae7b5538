"""AdaptiveModel: runs a multi-exit model under a policy; what lies deeper never runs for a sample that has left."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .confidence import confidence
from .policy import ExitPolicy
from .protocol import check_multi_exit, select_samples

__all__ = ["AdaptiveModel", "ExitOutput"]


class ExitOutput(NamedTuple):
    """Answer of an adaptive run: logits (B, C), exit_index (B,) int64 and confidence (B,) float32 at that exit."""

    logits: Tensor
    exit_index: Tensor
    confidence: Tensor


class AdaptiveModel(nn.Module):
    """Runs segment after segment; after each exit the samples that are sure enough leave and the rest go on.

    Args:
        model: a multi-exit module; it is put in evaluation mode.
        policy: thresholds for it, checked against the model.

    ``forward(images (B, C, H, W))`` returns an ExitOutput in the order of the batch; an empty batch returns an empty
    one. Samples whose confidence is NaN never leave early; those whose logits are NaN at the last exit are reported
    by a RuntimeWarning.
    """

    def __init__(self, model: nn.Module, policy: ExitPolicy) -> None:
        super().__init__()
        check_multi_exit(model)
        policy.check_model(model)
        self.model = model.eval()
        self.policy = policy

    def train(self, mode: bool = True) -> "AdaptiveModel":
        if mode:
            raise RuntimeError("AdaptiveModel only runs inference; train the model inside it.")
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> ExitOutput:
        if images.ndim != 4:
            raise ValueError(f"expected images (B, C, H, W), got shape {tuple(images.shape)}.")
        if images.shape[0] == 0:
            return self._empty(images)
        state = self.model.begin_exits(images)
        batch, device = images.shape[0], images.device
        position = torch.arange(batch, device=device)  # where each row of the state stands in the batch
        exit_index = torch.zeros(batch, dtype=torch.int64, device=device)
        found = torch.zeros(batch, dtype=torch.float32, device=device)
        answer: Tensor | None = None
        last = self.policy.num_exits - 1
        for index in range(last + 1):
            logits, state = self.model.forward_exit(index, state)
            sure = confidence(logits, self.policy.measure, float(self.policy.temperatures[index])).float()
            if answer is None:
                answer = logits.new_empty((batch, logits.shape[1]))
            if index == last:
                leaving = staying = None
                count = 0
            else:
                leaves = sure >= float(self.policy.thresholds[index])
                staying = (~leaves).nonzero()[:, 0]  # the one synchronisation of this exit
                count = len(staying)
                if count == len(position):
                    continue
                leaving = leaves.nonzero()[:, 0] if count else None
            rows = position if leaving is None else position[leaving]
            answer[rows] = logits if leaving is None else logits[leaving]
            found[rows] = sure if leaving is None else sure[leaving]
            exit_index[rows] = index
            if not count:
                break
            position = position[staying]
            state = select_samples(state, staying)
        if torch.isnan(found).any():
            warnings.warn(
                f"{int(torch.isnan(found).sum())} of {batch} samples have NaN logits at the last exit; look for NaN "
                "or infinite values in those images or in the weights.",
                RuntimeWarning,
                stacklevel=2,
            )
        return ExitOutput(answer, exit_index, found)

    def _empty(self, images: Tensor) -> ExitOutput:
        num_classes = getattr(self.model, "num_classes", 0) or 0
        return ExitOutput(
            images.new_empty((0, num_classes)),
            torch.empty(0, dtype=torch.int64, device=images.device),
            torch.empty(0, device=images.device),
        )
