"""The accuracy of every exit in timm's validation, whose model returns one tensor and whose metrics read one."""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.task import ClassificationEvaluator
from timm.utils import unwrap_model
from torch import Tensor, nn

__all__ = ["ExitRecorder", "MultiExitEvaluator", "ValidationLog"]

_logger = logging.getLogger(__name__)


@dataclass
class _Recorded:
    """What belongs to a validation batch's last logits: every exit's logits, and in which pass."""

    exits: tuple[Tensor, ...]
    evaluation: "_Evaluation"

    def of(self, output: Tensor, count: int) -> tuple[Tensor, ...] | None:
        """Every exit's logits of the first ``count`` samples; None if ``output`` is not the last exit's of them.

        Between model and metric a script may cast logits (mixed precision) or cut off the samples a loader repeats.
        """
        exits = tuple(logits[:count] for logits in self.exits)
        last = exits[-1].detach().to(output.device, torch.float32)
        if output.ndim != 2 or len(output) < count or last.shape != output[:count].shape:
            return None
        # The coarsest type they may have gone through is bfloat16, of 8 bits.
        same = torch.allclose(last, output[:count].detach().float(), rtol=2**-7, atol=1e-6, equal_nan=True)
        return (*exits[:-1], output[:count]) if same else None


class ExitRecorder(nn.Module):
    """Runs every exit and returns the last one's logits; all of them wait in ``ExitRecorder.latest`` for the metric.

    An attribute of the logits would be lost in any cast or slice. ``module`` is the name timm unwraps, so that
    checkpoints hold the model's own keys.
    """

    latest: ClassVar[_Recorded | None] = None

    def __init__(self, module: nn.Module, suffix: str = "") -> None:
        super().__init__()
        self.module = module
        self.suffix = suffix
        self.num_exits = unwrap_model(module).num_exits
        self.run = unwrap_model(module).forward_exits
        self.evaluation = _Evaluation(self.num_exits, suffix)

    def compile_exits(self, **kwargs: Any) -> "ExitRecorder":
        self.run = torch.compile(unwrap_model(self.module).forward_exits, **kwargs)
        return self

    def train(self, mode: bool = True) -> "ExitRecorder":
        # Scripts call eval() once before they go over the validation set: a new evaluation begins.
        if not mode:
            self.evaluation = _Evaluation(self.num_exits, self.suffix)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        exits = tuple(self.run(x))
        ExitRecorder.latest = _Recorded(exits, self.evaluation)
        return exits[-1]

    @classmethod
    def take(cls) -> _Recorded | None:
        """What the last forward pass of any recorder left, once."""
        recorded, cls.latest = cls.latest, None
        return recorded


class _Evaluation:
    """Correct predictions of every exit over one pass of a validation set."""

    def __init__(self, num_exits: int, suffix: str = "") -> None:
        self.suffix = suffix
        self.counts = torch.zeros(num_exits + 2, dtype=torch.int64)  # correct at exits 1 to K, samples, lost batches

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor] | None, target: Tensor, distributed: bool = False) -> None:
        """Add a batch: K tensors (B, C) and class indices (B,). None: they are not known, and the pass is lost."""
        counts = torch.zeros_like(self.counts, device=target.device)
        if logits is None:
            self._warn()
            counts[-1] = 1
        else:
            counts[:-2] = torch.stack([(exit.argmax(-1) == target).sum() for exit in logits])
            counts[-2] = len(target)
        if distributed:
            torch.distributed.all_reduce(counts)
        self.counts += counts.cpu()

    @property
    def whole(self) -> bool:
        """Whether every batch of the pass was counted."""
        return bool(self.counts[-2]) and not self.counts[-1]

    def metrics(self) -> "OrderedDict[str, float]":
        """``top1_exit1`` to ``top1_exitK`` in percent."""
        *correct, count, _ = self.counts.tolist()
        each = [100.0 * hits / count if self.whole else float("nan") for hits in correct]
        return OrderedDict((f"top1_exit{k}", value) for k, value in enumerate(each, start=1))

    def _warn(self) -> None:
        if not self.counts[-1]:
            _logger.warning(
                f"Test{self.suffix}: no accuracy per exit, since the logits that are measured are not as the "
                "evaluation model gave them (averaged over augmentations, or of another model)."
            )

    def log(self) -> None:
        exits = "  ".join(f"{k}: {value:.3f}" for k, value in enumerate(self.metrics().values(), start=1))
        _logger.info(f"Test{self.suffix}: Acc@1 of every exit  {exits}")


class MultiExitEvaluator(ClassificationEvaluator):
    """timm's evaluator, with ``top1_exit1`` ... ``top1_exitK`` (percent) among its metrics.

    Args:
        num_exits: K.
        kwargs: as timm's ``ClassificationEvaluator``.
    """

    def __init__(self, num_exits: int, **kwargs: Any) -> None:
        self.num_exits = num_exits
        super().__init__(**kwargs)
        exits = (f"top1_exit{k + 1}" for k in range(num_exits))
        self.metric_names = (*self.metric_names, *exits)  # type: ignore[assignment]  # timm has three, and says so

    def reset(self) -> None:
        super().reset()
        self.exits = _Evaluation(self.num_exits)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch's last logits (B, C), as the task's evaluation model returned them, and class indices (B,)."""
        recorded, before = ExitRecorder.take(), self.num_samples
        super().update(output, target)
        seen = self.num_samples - before
        if recorded is not None:
            self.exits.suffix = recorded.evaluation.suffix
        if seen:
            self.exits.update(None if recorded is None else recorded.of(output, seen), target[:seen])

    def compute(self, distributed: bool = False) -> "OrderedDict[str, float]":
        metrics = super().compute(distributed=distributed)
        exits = _Evaluation(self.num_exits, self.exits.suffix)
        exits.counts = self.exits.counts.to(self.device)
        if distributed:
            torch.distributed.all_reduce(exits.counts)
        if exits.whole:
            if not distributed or torch.distributed.get_rank() == 0:
                exits.log()
            metrics.update(exits.metrics())
        return metrics


class ValidationLog:
    """Per-exit accuracies for scripts that measure with ``timm.utils.accuracy`` and report by ``update_summary``."""

    def __init__(self, accuracy: Callable[..., Any], update_summary: Callable[..., Any]) -> None:
        self._accuracy = accuracy
        self._update_summary = update_summary
        self._evaluations: deque[_Evaluation] = deque(maxlen=2)  # the model's and its moving average's

    def accuracy(self, output: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorded = ExitRecorder.take() if target.ndim == 1 else None
        if recorded is not None:
            if not self._evaluations or self._evaluations[-1] is not recorded.evaluation:
                self._evaluations.append(recorded.evaluation)
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            recorded.evaluation.update(recorded.of(output, len(target)), target, distributed)
        return self._accuracy(output, target, *args, **kwargs)

    def update_summary(self, epoch: int, train_metrics: dict, eval_metrics: dict | None, *args: Any, **kw: Any) -> Any:
        for evaluation in self._evaluations:
            if evaluation.whole:
                evaluation.log()
        # A column that comes and goes would shift the others: of a pass that is not whole, NaN.
        if self._evaluations and eval_metrics is not None:
            eval_metrics.update(self._evaluations[-1].metrics())  # timm reports the moving average where there is one
        self._evaluations.clear()
        return self._update_summary(epoch, train_metrics, eval_metrics, *args, **kw)
