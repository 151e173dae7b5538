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
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import timm
import timm.scheduler
import timm.task
import timm.utils
import torch
from timm.task import ClassificationEvaluator, ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..exits import MultiExitLoss
from ..exits.protocol import is_multi_exit
from ._exit_metrics import ExitRecorder, MultiExitEvaluator, ValidationLog
from ._host import SWAPPED
from ._loss_options import ExitLossOptions, add_loss_arguments, config_values, options_of, write_options
from ._progress import follow_updates
from ._scripts import Names, check_script, put_in_place, run_script

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ExitLossOptions", "MultiExitEvaluator", "MultiExitTask", "main"]

_logger = logging.getLogger(__name__)


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
        self.eval_model = ExitRecorder(model)
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

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "Self":
        """Wrap the model in DistributedDataParallel; on the CPU, where DDP refuses device ids, without them."""
        if self._needs_progress:  # some parameters learn later than others
            ddp_kwargs.setdefault("find_unused_parameters", True)
        super().prepare_distributed(None if self.device.type == "cpu" else device_ids, **ddp_kwargs)
        return self

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create timm's moving average of the model."""
        ema = super().setup_ema(*args, **kwargs)
        if self.multi_exit:
            self.eval_model_ema = ExitRecorder(ema, " (EMA)")
        return ema

    def compile(  # type: ignore[override]  # timm's, which is not torch's
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the training step's model and the evaluation of all exits."""
        if not self.multi_exit:
            return super().compile(backend, mode, **compile_kwargs)
        recorder = cast(ExitRecorder, self.eval_model)
        super().compile(backend, mode, **compile_kwargs)
        self.eval_model = recorder.compile_exits(backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def compile_ema(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module | None:
        """Compile the evaluation of the moving average, if there is one."""
        if not (self.multi_exit and self.has_ema()):
            return super().compile_ema(backend, mode, **compile_kwargs)
        recorder = cast(ExitRecorder, self.eval_model_ema)
        return recorder.compile_exits(backend=backend, mode=mode, **compile_kwargs)

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


def _refusing_exits(task: Any) -> type[nn.Module]:
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


def _training_names(options: ExitLossOptions) -> Names:
    """What stands where, by module, while a training script runs."""
    chosen: dict[str, Any] = {"exit_loss": options.preset, "exit_loss_alpha": options.alpha}
    chosen |= {"exit_loss_ce": options.ce, "exit_loss_kl": options.kl}

    tasks: list[MultiExitTask] = []
    make_scheduler = timm.scheduler.create_scheduler_v2

    class Task(MultiExitTask):
        exit_loss_options = options

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tasks.append(self)
            if self.multi_exit:
                chosen.update(options_of(self.exit_loss, options))

    def create_scheduler_v2(*args: Any, **kwargs: Any) -> Any:
        scheduler, epochs = make_scheduler(*args, **kwargs)
        for task in tasks:
            task.follow(scheduler, epochs, kwargs.get("updates_per_epoch", 0))
        return scheduler, epochs

    Task.__name__ = Task.__qualname__ = "MultiExitTask"
    log = ValidationLog(timm.utils.accuracy, timm.utils.update_summary)
    make_folder = timm.utils.get_outdir

    def get_outdir(*args: Any, **kwargs: Any) -> str:
        folder = make_folder(*args, **kwargs)
        write_options(chosen, folder)
        return folder

    others = [name for name in SWAPPED["timm.task"] if name != "ClassificationTask"]
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


def _inference_names() -> Names:
    """What stands where while a script without a training task runs (validate.py, benchmark.py, inference.py)."""
    make = timm.models.create_model

    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        model = make(*args, **kwargs)
        has_exits: bool = is_multi_exit(model)
        # TorchScript would try to compile the hook.
        if has_exits and not kwargs.get("scriptable"):
            model.register_forward_hook(_average_exits)
        return model

    return {"timm.models": {"create_model": create_model}}


def _average_exits(module: nn.Module, args: tuple, output: Any) -> Any:
    """In training, the mean of the exits' logits: benchmark.py would take the first of a tuple and drop the rest,
    and so report a step whose backward pass ends at exit 1."""
    return torch.stack(output).mean(0) if module.training and isinstance(output, tuple) else output


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
    add_loss_arguments(parser)
    return parser


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
    run_script(ours.script, theirs, _training_names(options) if trains else _inference_names())
    return 0


def _config_options(argv: Sequence[str]) -> ExitLossOptions:
    """Our options in the YAML file of the script's ``--config``."""
    path, values = config_values(argv)
    try:
        return ExitLossOptions.read(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _device_modules(argv: Sequence[str]) -> Sequence[str]:
    """What a script is told to import, on its command line or in its YAML file; none where it is no timm script."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device-modules", nargs="*")
    try:
        return parser.parse_known_args(argv)[0].device_modules or config_values(argv)[1].get("device_modules") or ()
    except (OSError, ValueError):  # another program's -c is no YAML file
        return ()


def _as_device_module() -> None:
    """When train.py imports this module for its ``--device-modules``, put our names where it has already taken timm's.

    Whether it does so is read where the script reads it, from its command line and its YAML file; then the script is
    the process's main module, and imports before it builds anything. Any other import changes nothing.
    """
    script, argv = vars(sys.modules["__main__"]), sys.argv[1:]
    if script.get("__file__") in (None, __file__) or __name__ not in _device_modules(argv):
        return
    names = _training_names(_config_options(argv).check())
    if script.get("ClassificationTask") is not ClassificationTask:
        check_script(script["__file__"])
    put_in_place(names, script)


_as_device_module()

if __name__ == "__main__":
    # By its real name, so that there is one MultiExitTask in the process, not __main__'s and another.
    from exit_plugins.timm.train import main as run

    sys.exit(run())
