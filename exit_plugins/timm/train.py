"""Training by timm's own scripts, unmodified.

The first door runs any of timm's scripts with every model of this package registered::

    python -m exit_plugins.timm.train PATH/TO/train.py --model dynperceiver_regnety_400mf --data-dir DATA ...
    torchrun --nproc_per_node 2 -m exit_plugins.timm.train PATH/TO/train.py ...

Every architecture is trained with its own paper's loss unless ``--exit-loss`` or its companions ask for another. These
options are ours; they may stand in the YAML file of timm's ``--config`` too (``exit_loss: released``; the command line
comes first), and what was used goes into ``exit_args.yaml`` beside timm's ``args.yaml``. The rest is the script's.

``train.py`` gets ``MultiExitTask`` in the place of ``timm.task.ClassificationTask``; validate.py, benchmark.py and
inference.py run as they are. The second door needs no launcher: ``python train.py --device-modules
exit_plugins.timm.train ...`` takes the options from the YAML file alone.
"""

import argparse
import ast
import logging
import os
import runpy
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pkgutil import resolve_name
from typing import Any, ClassVar

import timm
import torch
import yaml
from torch import Tensor, nn

from .._version import __version__
from ..exits import MultiExitLoss
from ..exits.files import atomic_write
from ..exits.losses import LOSS_PRESETS, ExitWeights, own_preset
from ._progress import follow_updates

__all__ = ["ExitLossOptions", "MultiExitEvaluator", "MultiExitTask", "main"]

_logger = logging.getLogger(__name__)

# What this module takes from timm or puts itself in the place of.
_RELIED_ON = {
    "timm.task": (
        "ClassificationTask",
        "ClassificationEvaluator",
        "MultiLabelClassificationTask",
        "LogitDistillationTask",
        "FeatureDistillationTask",
        "TokenDistillationTask",
    ),
    "timm.task.ClassificationTask": (
        "compile",
        "compile_ema",
        "create_evaluator",
        "forward",
        "get_clip_parameters",
        "get_eval_model",
        "get_trainable_module",
        "prepare_distributed",
        "setup_ema",
    ),
    "timm.scheduler": ("create_scheduler_v2",),
    "timm.utils": ("accuracy", "get_outdir", "unwrap_model", "update_summary"),
    "timm.models": ("create_model",),
}


def check_timm() -> None:
    """Raise ImportError if the installed timm lacks a name this module relies on, saying which."""
    for owner, names in _RELIED_ON.items():
        for name in names:
            if not _exists(f"{owner}.{name}"):
                raise ImportError(
                    f"training by timm's scripts relies on {owner}.{name}, which timm {timm.__version__} lacks; "
                    'it is known to work with timm 1.0.31: pip install "timm>=1.0.31,<1.1".'
                )


def _exists(path: str) -> bool:
    """Whether there is a module, class or attribute of this dotted name."""
    try:
        resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


check_timm()

from timm.task import ClassificationEvaluator, ClassificationTask  # noqa: E402
from timm.utils import unwrap_model  # noqa: E402


def is_multi_exit(model: nn.Module) -> bool:
    """Whether ``model`` (unwrapped) has exits to train."""
    return all(hasattr(model, name) for name in ("num_exits", "begin_exits", "forward_exit"))


@dataclass(frozen=True)
class ExitLossOptions:
    """How the exits are weighted; see ``exit_plugins.MultiExitLoss``.

    Attributes:
        preset: name of a preset, or None for the one of the model's own paper.
        alpha: of the preset ``paper``.
        ce, kl: weights of the classification and of the distillation term, one per exit, in the preset's place.
    """

    preset: str | None = None
    alpha: float | None = None
    ce: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None

    @property
    def explicit(self) -> bool:
        """Whether anything was asked for."""
        return self != ExitLossOptions()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ExitLossOptions":
        """The options among the keys of a YAML file: ``exit_loss``, ``exit_loss_alpha``, ``_ce`` and ``_kl``.

        The weights are lists or, as on the command line, numbers between commas. What ``exit_args.yaml`` holds is read
        as it is, so that it can be a ``--config`` itself.

        Raises:
            ValueError: a key begins with ``exit`` and is none of ours, or a value makes no sense.
        """
        known = {
            "exit_loss": ("preset", _preset),
            "exit_loss_alpha": ("alpha", _share),
            "exit_loss_ce": ("ce", _weights),
            "exit_loss_kl": ("kl", _weights),
        }
        given: dict[str, Any] = {}
        for key, value in values.items():
            if not str(key).startswith(("exit_", "exit-")) or key in _WRITTEN_ALONG:
                continue
            if key not in known:
                raise ValueError(f"unknown key {key!r}; those of the exits are {', '.join(known)}.")
            name, parse = known[key]
            try:
                given[name] = None if value is None else parse(value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{key}: {error}.") from None
        return cls(**given)

    def over(self, others: "ExitLossOptions") -> "ExitLossOptions":
        """These options, and those of ``others`` where nothing is said here.

        A preset replaces whatever ``others`` weigh the exits by: its own weights would be none of theirs.
        """
        if self.preset is not None:
            return self
        return ExitLossOptions(**asdict(others) | {k: v for k, v in asdict(self).items() if v is not None})

    def check(self) -> "ExitLossOptions":
        """These options; ValueError where they contradict each other."""
        if self.alpha is not None and self.preset not in (None, "paper"):
            raise ValueError(f"exit_loss_alpha belongs to the preset paper, not to {self.preset}.")
        return self

    def loss(self, model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> MultiExitLoss:
        """The loss for a multi-exit ``model``, with the host's ``criterion`` at every exit."""
        preset = self.preset or own_preset(model)[0]
        if self.alpha is not None and preset != "paper":
            raise ValueError(
                f"--exit-loss-alpha belongs to the preset paper, and {type(model).__name__} is trained with {preset}: "
                "leave it out, or say --exit-loss paper."
            )
        num_exits = int(model.num_exits)
        loss = MultiExitLoss(num_exits, preset, 0.5 if self.alpha is None else self.alpha, criterion=criterion)
        if self.ce is None and self.kl is None:
            return loss
        weights = ExitWeights(
            loss.weights.ce if self.ce is None else self.ce, loss.weights.kl if self.kl is None else self.kl
        )
        for name, given in zip(("ce", "kl"), (weights.ce, weights.kl), strict=True):
            if len(given) != num_exits:
                raise ValueError(
                    f"--exit-loss-{name} has {len(given)} weights and the model {num_exits} exits; give one per exit."
                )
        for index, pair in enumerate(zip(weights.ce, weights.kl, strict=True)):
            if not any(pair):
                raise ValueError(f"exit {index + 1} has no weight in the loss and would never be trained.")
        return MultiExitLoss(num_exits, preset, weights=weights, criterion=criterion)

    def reason(self, model: nn.Module) -> str:
        """Which preset ``loss(model)`` takes and why, in words for a log."""
        preset, why = (self.preset, "as asked for") if self.preset else own_preset(model)
        weighed = [f"exit_loss_{name}" for name in ("ce", "kl") if getattr(self, name) is not None]
        return f"{preset}, {why}" + (f", with {' and '.join(weighed)} as asked for" if weighed else "")


class MultiExitTask(ClassificationTask):
    """timm's classification task for models with exits; a model without exits is trained as timm does.

    The loss is a ``MultiExitLoss`` with timm's criterion (label smoothing, mixup, BCE, ...) at every exit. The
    evaluation model returns the last exit's logits, as validation expects, and makes the others known to
    ``create_evaluator()`` and to the launcher's log.

    Args:
        model: a multi-exit model, or any classifier.
        criterion, criterion_kwargs, device, dtype, verbose: as in timm's ``ClassificationTask``.
        exit_loss: how the exits are weighted: ``ExitLossOptions``, by default the model's own, or a ``MultiExitLoss``
            of yours, which then computes the whole loss.

    Raises:
        TypeError: exits were weighted for a model that has none, or that torch.jit.script reduced to its last exit.
        ValueError: the loss is for another number of exits than the model's.
    """

    exit_loss_options = ExitLossOptions()

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        exit_loss: MultiExitLoss | ExitLossOptions | None = None,
    ) -> None:
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        if exit_loss is None:
            exit_loss = self.exit_loss_options
        inner = unwrap_model(model)
        self.multi_exit = is_multi_exit(inner)
        if not self.multi_exit:
            self._check_single_exit(inner, exit_loss)
            return
        reason = "given to the task"
        if isinstance(exit_loss, ExitLossOptions):
            reason = exit_loss.reason(inner)
            exit_loss = exit_loss.loss(inner, self.criterion)
        if exit_loss.num_exits != inner.num_exits:
            raise ValueError(
                f"the loss was made for {exit_loss.num_exits} exits and {type(inner).__name__} has {inner.num_exits}; "
                f"use MultiExitLoss(num_exits={inner.num_exits})."
            )
        self.exit_loss = exit_loss.to(self.device)
        # TrainingTask.get_eval_model() finds this name; so does compile().
        self.eval_model = _ExitRecorder(model)
        if self.verbose:
            _logger.info(f"Training {inner.num_exits} exits: loss {reason}: {self.exit_loss.extra_repr()}")
            own = getattr(inner, "own_drop_rate", None)
            if own is not None and inner.drop_rate != own:
                _logger.info(
                    f"Training with dropout {inner.drop_rate}, and {type(inner).__name__}'s own is {own}; timm's "
                    f"script passes --drop 0.0 where nothing is said, so say --drop {own} for it."
                )

    @staticmethod
    def _check_single_exit(model: nn.Module, exit_loss: MultiExitLoss | ExitLossOptions) -> None:
        if isinstance(model, torch.jit.ScriptModule) and hasattr(model, "num_exits"):
            raise TypeError(
                "torch.jit.script keeps only the last exit of a multi-exit model, so the others would never be "
                "trained; train without --torchscript (--torchcompile works)."
            )
        if isinstance(exit_loss, MultiExitLoss) or exit_loss.explicit:
            raise TypeError(
                f"{type(model).__name__} has no exits, so the exit loss does not apply: leave it out, or choose a "
                "model of exit_plugins.timm.list_models()."
            )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and last exit's logits of a batch: ``{"loss": (), "output": (B, C)}``."""
        if not self.multi_exit:
            return super().forward(input, target)
        if self._needs_progress and unwrap_model(self.trainable_module).progress is None:
            raise RuntimeError(
                "what learns of this model depends on how far training is, and nobody says so: call follow(scheduler, "
                "...) of this task once, or model.set_progress(share) at every step."
            )
        outputs = self.trainable_module(input)
        return {
            "loss": self.exit_loss(outputs, target),
            "output": outputs if isinstance(outputs, Tensor) else outputs[-1],
        }

    @property
    def _needs_progress(self) -> bool:
        return self.multi_exit and getattr(unwrap_model(self.trainable_module), "needs_progress", False)

    def follow(self, scheduler: Any, epochs: int, updates_per_epoch: int) -> None:
        """Tell a model that needs it (``heads_first``) how far training is, whenever timm's ``scheduler`` learns of it.

        Call it once, when the optimizer has been made; other models are left alone. The launcher does.

        Args:
            scheduler, epochs: what ``timm.scheduler.create_scheduler_v2`` returned.
            updates_per_epoch: steps of the optimizer in an epoch.

        Raises:
            ValueError: there is no schedule to follow.
        """
        if not self._needs_progress:
            return
        if scheduler is None or not updates_per_epoch:
            raise ValueError("without a learning-rate schedule there is no progress to follow; choose one by --sched.")
        model, total = unwrap_model(self.trainable_module), epochs * updates_per_epoch
        follow_updates(scheduler, updates_per_epoch, lambda done: model.set_progress(min(done / total, 1.0)))

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter] | Iterator[nn.Parameter]:
        """Parameters to clip; with ``exclude_head`` (AGC) all but those of every exit's classifier."""
        if not (self.multi_exit and exclude_head):
            return super().get_clip_parameters(exclude_head)
        model = unwrap_model(self.get_trainable_module())
        heads = {id(p) for head in _modules(model.get_classifier()) for p in head.parameters()}
        return [p for p in model.parameters() if id(p) not in heads]

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "MultiExitTask":
        """Wrap the model in DistributedDataParallel; on the CPU, where DDP refuses device ids, without them."""
        if self._needs_progress:  # some parameters learn later than others
            ddp_kwargs.setdefault("find_unused_parameters", True)
        return super().prepare_distributed(None if self.device.type == "cpu" else device_ids, **ddp_kwargs)

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create timm's moving average of the model."""
        ema = super().setup_ema(*args, **kwargs)
        if self.multi_exit:
            self.eval_model_ema = _ExitRecorder(ema, " (EMA)")
        return ema

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the training step's model and the evaluation of all exits."""
        if not self.multi_exit:
            return super().compile(backend, mode, **compile_kwargs)
        recorder = self.eval_model
        super().compile(backend, mode, **compile_kwargs)
        self.eval_model = recorder.compile_exits(backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def compile_ema(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module | None:
        """Compile the evaluation of the moving average, if there is one."""
        if not (self.multi_exit and self.has_ema()):
            return super().compile_ema(backend, mode, **compile_kwargs)
        return self.eval_model_ema.compile_exits(backend=backend, mode=mode, **compile_kwargs)

    def create_evaluator(self, **kwargs: Any) -> ClassificationEvaluator:
        """Evaluator that also reports the accuracy of every exit."""
        if not self.multi_exit:
            return super().create_evaluator(**kwargs)
        return MultiExitEvaluator(unwrap_model(self.trainable_module).num_exits, device=self.device, **kwargs)


def _modules(classifier: Any) -> tuple[nn.Module, ...]:
    """The modules of whatever ``get_classifier()`` returned."""
    if isinstance(classifier, nn.Module):
        return (classifier,)
    return tuple(m for m in (classifier or ()) if isinstance(m, nn.Module))


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


class _ExitRecorder(nn.Module):
    """Runs every exit and returns the last one's logits; all of them wait in ``_ExitRecorder.latest`` for the metric.

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

    def compile_exits(self, **kwargs: Any) -> "_ExitRecorder":
        self.run = torch.compile(unwrap_model(self.module).forward_exits, **kwargs)
        return self

    def train(self, mode: bool = True) -> "_ExitRecorder":
        # Scripts call eval() once before they go over the validation set: a new evaluation begins.
        if not mode:
            self.evaluation = _Evaluation(self.num_exits, self.suffix)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        exits = tuple(self.run(x))
        _ExitRecorder.latest = _Recorded(exits, self.evaluation)
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
        self.metric_names = (*self.metric_names, *(f"top1_exit{k + 1}" for k in range(num_exits)))

    def reset(self) -> None:
        super().reset()
        self.exits = _Evaluation(self.num_exits)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch's last logits (B, C), as the task's evaluation model returned them, and class indices (B,)."""
        recorded, before = _ExitRecorder.take(), self.num_samples
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


class _ValidationLog:
    """Per-exit accuracies for scripts that measure with ``timm.utils.accuracy`` and report by ``update_summary``."""

    def __init__(self, accuracy: Callable[..., Any], update_summary: Callable[..., Any]) -> None:
        self._accuracy = accuracy
        self._update_summary = update_summary
        self._evaluations: deque[_Evaluation] = deque(maxlen=2)  # the model's and its moving average's

    def accuracy(self, output: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorded = _ExitRecorder.take() if target.ndim == 1 else None
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


def _refusing_exits(task: type[nn.Module]) -> type[nn.Module]:
    """``task`` for models with one output; a multi-exit model would crash it in the first step."""

    class OneOutputTask(task):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            for model in (*args[:1], kwargs.get("student_model"), kwargs.get("model")):
                if isinstance(model, nn.Module) and is_multi_exit(unwrap_model(model)):
                    raise TypeError(
                        f"timm's {task.__name__} trains models with one output, and {type(model).__name__} has "
                        f"{model.num_exits} exits; the exits learn from the last one by --exit-loss instead."
                    )
            super().__init__(*args, **kwargs)

    OneOutputTask.__name__ = OneOutputTask.__qualname__ = task.__name__
    return OneOutputTask


def _training_names(options: ExitLossOptions) -> dict[str, dict[str, Any]]:
    """What stands where, by module, while a training script runs."""
    import timm.scheduler
    import timm.task
    import timm.utils

    chosen = {"exit_loss": options.preset, "exit_loss_alpha": options.alpha}
    chosen |= {"exit_loss_ce": options.ce, "exit_loss_kl": options.kl}

    tasks: list[MultiExitTask] = []
    make_scheduler = timm.scheduler.create_scheduler_v2

    class Task(MultiExitTask):
        exit_loss_options = options

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tasks.append(self)
            if self.multi_exit:
                chosen.update(_as_options(self.exit_loss, options))

    def create_scheduler_v2(*args: Any, **kwargs: Any) -> Any:
        scheduler, epochs = make_scheduler(*args, **kwargs)
        for task in tasks:
            task.follow(scheduler, epochs, kwargs.get("updates_per_epoch", 0))
        return scheduler, epochs

    Task.__name__ = Task.__qualname__ = "MultiExitTask"
    log = _ValidationLog(timm.utils.accuracy, timm.utils.update_summary)
    make_folder = timm.utils.get_outdir

    def get_outdir(*args: Any, **kwargs: Any) -> str:
        folder = make_folder(*args, **kwargs)
        _write_options(chosen, folder)
        return folder

    others = [n for n in _RELIED_ON["timm.task"] if n.endswith("Task") and n != "ClassificationTask"]
    return {
        "timm.task": {
            "ClassificationTask": Task,
            **{name: _refusing_exits(getattr(timm.task, name)) for name in others},
        },
        "timm.scheduler": {"create_scheduler_v2": create_scheduler_v2},
        "timm.utils": {
            "accuracy": log.accuracy,
            "update_summary": log.update_summary,
            "get_outdir": get_outdir,
        },
    }


def _inference_names() -> dict[str, dict[str, Any]]:
    """What stands where while a script without a training task runs (validate.py, benchmark.py, inference.py)."""
    make = timm.models.create_model

    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        model = make(*args, **kwargs)
        # TorchScript would try to compile the hook.
        if is_multi_exit(model) and not kwargs.get("scriptable"):
            model.register_forward_hook(_average_exits)
        return model

    return {"timm.models": {"create_model": create_model}}


def _average_exits(module: nn.Module, args: tuple, output: Any) -> Any:
    """In training, the mean of the exits' logits: benchmark.py would take the first of a tuple and drop the rest,
    and so report a step whose backward pass ends at exit 1."""
    return torch.stack(output).mean(0) if module.training and isinstance(output, tuple) else output


_WRITTEN_ALONG = ("exit_plugins", "timm")  # versions, in exit_args.yaml


def _as_options(loss: MultiExitLoss, options: ExitLossOptions) -> dict[str, Any]:
    """What ``loss`` weighs the exits by, as the options that ask for the same again."""
    alpha = (0.5 if options.alpha is None else options.alpha) if loss.preset == "paper" else None
    stored = {"exit_loss": loss.preset, "exit_loss_alpha": alpha}
    return stored | {"exit_loss_ce": loss.weights.ce, "exit_loss_kl": loss.weights.kl}


def _write_options(stored: dict[str, Any], folder: str) -> None:
    stored = stored | dict(zip(_WRITTEN_ALONG, (__version__, timm.__version__), strict=True))
    with atomic_write(os.path.join(folder, "exit_args.yaml")) as file:
        yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}, file, sort_keys=False)


@contextmanager
def _in_place(names: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Put ``names`` into their modules for the time of the block."""
    saved = [(import_module(module), name) for module, swaps in names.items() for name in swaps]
    saved = [(module, name, getattr(module, name)) for module, name in saved]
    try:
        for module, name, _ in saved:
            setattr(module, name, names[module.__name__][name])
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


def check_script(path: str) -> bool:
    """Whether the script trains; raise an error if it does not fit the installed timm.

    Raises:
        FileNotFoundError, ValueError: there is no such script, or it is not Python.
        ImportError: it takes a name from timm that the installed timm lacks, or trains in a way of its own.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no script at {path!r}: give the path of timm's train.py (or validate.py, ...) first.")
    with open(path, encoding="utf-8") as file:
        try:
            tree = ast.parse(file.read(), path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path} is not a Python script: {error or 'it is nested too deeply'}") from None
    if all(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call) for node in tree.body):
        # JSON reads as an expression, and running it would do nothing and say so by success.
        raise ValueError(f"{path} is not a Python script: nothing in it does anything; give timm's train.py first.")
    advice = f"take it from timm's repository at the version installed, {timm.__version__}."
    taken: set[str] = set()
    # Imports inside a try are the script's own affair.
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "timm" and not node.level:
            for name in (alias.name for alias in node.names if alias.name != "*"):
                if not _exists(f"{node.module}.{name}"):
                    raise ImportError(
                        f"{path} needs {node.module}.{name}, which timm {timm.__version__} lacks: {advice}"
                    )
                taken.add(name)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "train_one_epoch" in functions and "ClassificationTask" not in taken:
        raise ImportError(
            f"{path} does not train through timm.task.ClassificationTask, so it cannot train several exits: {advice}"
        )
    return "ClassificationTask" in taken


def _preset(text: Any) -> str:
    if not isinstance(text, str) or text not in LOSS_PRESETS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(LOSS_PRESETS)}, got {text!r}")
    return text


def _weights(text: Any) -> tuple[float, ...]:
    try:
        parts = text.split(",") if isinstance(text, str) else text if isinstance(text, (list, tuple)) else (text,)
        return tuple(float(weight) for weight in parts)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected numbers between commas, one per exit, got {text!r}") from None


def _share(text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exit_plugins.timm.train",
        usage="%(prog)s PATH/TO/train.py [--exit-loss ...] [options of the script]",
        description="Run one of timm's scripts, unmodified, on models with early exits. Options not listed here are "
        "the script's own; give it --help after its path to see them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("script", help="timm's train.py, validate.py, benchmark.py or inference.py")
    parser.add_argument(
        "--exit-loss", choices=tuple(LOSS_PRESETS), help="weights of the exits (default: the model's own)"
    )
    parser.add_argument("--exit-loss-alpha", type=_share, metavar="A", help="of the preset paper (default: 0.5)")
    parser.add_argument("--exit-loss-ce", type=_weights, metavar="W,W,...", help="classification weight of every exit")
    parser.add_argument("--exit-loss-kl", type=_weights, metavar="W,W,...", help="distillation weight of every exit")
    return parser


def _config_options(argv: Sequence[str]) -> ExitLossOptions:
    """Our options in the YAML file that ``argv`` names for the script's ``--config``, found as the script finds it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-c", "--config", default="")
    path = parser.parse_known_args(argv)[0].config
    if not path:
        return ExitLossOptions()
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options: expected lines of the form 'name: value'.")
    try:
        return ExitLossOptions.read(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a timm script on this package's models: ``[script, our options, the script's options]``.

    A usage error or a script that does not fit ends the process with status 2 before anything is trained.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    ours, theirs = parser.parse_known_args(argv)
    options = ExitLossOptions(ours.exit_loss, ours.exit_loss_alpha, ours.exit_loss_ce, ours.exit_loss_kl)
    try:
        trains = check_script(ours.script)
        options = options.over(_config_options(theirs) if trains else ExitLossOptions()).check()
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    if options.explicit and not trains:
        parser.error(f"{ours.script} does not train, so --exit-loss and its companions do not apply.")
    saved = sys.argv
    sys.argv = [ours.script, *theirs]
    try:
        with _in_place(_training_names(options) if trains else _inference_names()):
            runpy.run_path(ours.script, run_name="__main__")
    finally:
        sys.argv = saved
    return 0


def _as_device_module() -> None:
    """When train.py imports this module for its ``--device-modules``, put our names where it has already taken timm's.

    It does so in the frame of its ``main``, before it builds anything; any other import changes nothing.
    """
    frame = sys._getframe(1)
    while frame is not None:
        args = frame.f_locals.get("args")
        if frame.f_globals.get("__name__") == "__main__" and __name__ in (getattr(args, "device_modules", None) or ()):
            break
        frame = frame.f_back
    else:
        return
    names = _training_names(ExitLossOptions.read(vars(args)).check())  # timm keeps unknown keys of a YAML file there
    if frame.f_globals.get("ClassificationTask") is not ClassificationTask:
        check_script(frame.f_globals.get("__file__", ""))
    for module, swaps in names.items():
        for name, value in swaps.items():
            original = getattr(import_module(module), name)
            if frame.f_globals.get(name) is original:
                frame.f_globals[name] = value
            setattr(import_module(module), name, value)


_as_device_module()

if __name__ == "__main__":
    # By its real name, so that there is one MultiExitTask in the process, not __main__'s and another.
    from exit_plugins.timm.train import main as run

    sys.exit(run())
