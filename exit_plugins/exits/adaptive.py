"""AdaptiveModel: runs a multi-exit model under a policy; what lies deeper never runs for a sample that has left."""

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compiled import CompiledSegments
from .confidence import confidence
from .costs import SegmentTimes, segment_times
from .deprecation import warn_old
from .policy import ExitPolicy
from .protocol import AnyModel, MultiExitModule, in_precision_of, sample_dimensions, select_samples

__all__ = ["AdaptiveModel", "ExitOutput"]


class ExitOutput(NamedTuple):
    """Answer of an adaptive run: logits (B, C), exit_index (B,) int64 and confidence (B,) float32 at that exit.

    Logits are float32, or float64 where the model computes in it.
    """

    logits: Tensor
    exit_index: Tensor
    confidence: Tensor


class Plan(NamedTuple):
    """What a call runs under from beginning to end, whatever is set meanwhile."""

    policy: ExitPolicy
    measure: str
    exits: tuple[tuple[float, float], ...]  # threshold and temperature of every exit
    last: int

    @classmethod
    def of(cls, policy: ExitPolicy) -> "Plan":
        exits = zip(policy.thresholds.tolist(), policy.temperatures.tolist(), strict=True)
        return cls(policy, policy.measure, tuple(exits), policy.last_exit)


# CUDA graphs read and write memory of their own: one call at a time.
_GRAPHS = threading.RLock()
_REFRESHING = threading.RLock()
_ADDRESS, _VERSION, _TRAINING = Tensor.data_ptr, attrgetter("_version"), attrgetter("training")


class _Watch:
    """Whether weights have been moved, or others put in their place, since it was made, or ``written``; quick enough
    for every call.

    It holds on to the tensors, so that no other can have come to lie at the address of one that is gone.
    """

    def __init__(self, model: MultiExitModule, written: bool) -> None:
        self.model = model
        tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
        # Scripted modules have no dictionaries, and no tensor in them can be replaced by another.
        self.places = [(table, name) for table in tables if isinstance(table, dict) for name in table]
        self.tensors = [table[name] for table, name in self.places]
        self.read = [tensor for tensor in (*model.parameters(), *model.buffers()) if _counts_versions(tensor)]
        self.counted = self.read if written else []
        self.marks = self._marks()

    def _marks(self) -> tuple[Any, ...]:
        kind = (self.model.num_exits, getattr(self.model, "num_classes", None))
        return (*kind, *map(_ADDRESS, self.read), *map(_VERSION, self.counted))

    def changed(self) -> bool:
        now = (table.get(name) for table, name in self.places)
        return not all(map(is_, now, self.tensors)) or self._marks() != self.marks


class AdaptiveModel(nn.Module):
    """Runs segment after segment; after each exit the samples that are sure enough leave and the rest go on.

    Args:
        model: a multi-exit module; it is put in evaluation mode. Put in training mode later, its copy answers on in
            evaluation mode; where there is none (``fuse``), a call is a RuntimeError until it is in evaluation again.
        policy: thresholds for it, checked against the model.
        compile: compile every segment, once for all batch sizes (and CUDA graphs on a GPU), see
            ``exits.compiled.CompiledSegments``. Compilation happens on first use.
        fuse: run a copy of the model made for inference: norms folded into the layers beside them where the model has
            a ``fuse()``, weights in channels_last. The copy gives the same logits up to rounding (1e-5 of their
            scale), so that a sample may leave elsewhere only where its confidence is that near to a threshold. It
            takes the memory of the weights once more; ``model`` itself stays as it is. By default (None) models that
            have a ``fuse()`` run in it; True copies any model and fails where that fails; False runs ``model`` itself.
        dtype: run in mixed precision of this type (``torch.bfloat16``, ``torch.float16``), as under torch.autocast.

    ``forward(images (B, C, H, W))``, or clips (B, T, C, H, W) where the model takes them, returns an ExitOutput in the
    order of the batch; an empty batch returns an empty one. Images are taken to the precision of the model's weights.
    Samples whose confidence is NaN never leave early; those whose logits are NaN at the last exit are reported by a
    RuntimeWarning.

    When the weights change (training goes on, ``load_state_dict``, ``to``, another tensor in a parameter's or buffer's
    place), the copy is made anew at the next call: every call looks at which tensors there are, and at the version
    counter and the address of each. Without a copy, segments are compiled anew for tensors that moved or are new. What
    bypasses all three, writing through ``tensor.data`` or putting other modules in place, is not seen: call ``refresh``
    then. The look takes some tenths of a millisecond, as the tensors of ``model`` lie in no cache. A model that was
    built under ``torch.inference_mode()``, as a server builds its own, keeps no version counters: of it only other
    tensors in place are seen, and whoever writes to its weights after all, by ``load_state_dict`` or ``to``, calls
    ``refresh``.

    Copies (``copy.deepcopy``, pickle) run weights of their own.

    Samples that left are dropped at every exit, or, once ``time_segments`` has timed them, wherever that costs less
    than it saves. There is one device synchronisation per exit and one gather per leaf of the state.
    """

    runner: MultiExitModule

    def __init__(
        self,
        model: AnyModel,
        policy: ExitPolicy,
        *,
        compile: bool = False,
        fuse: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checked = policy.check_model(model)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"mixed precision runs in torch.bfloat16 or torch.float16, got {dtype}.")
        self.model = checked
        self.compiles = compile
        self.fused = callable(getattr(checked, "fuse", None)) if fuse is None else fuse
        self.refresh()
        self._plan = Plan.of(policy)
        self.dtype = None if dtype is torch.float32 else dtype
        self.times: SegmentTimes | None = None
        self.eval()

    @property
    def policy(self) -> ExitPolicy:
        """The policy in use; another may be set at any time, by any thread, and holds from the next call on."""
        return self._plan.policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        policy.check_model(self.model)
        self._plan = Plan.of(policy)  # one assignment, read once a call

    @property
    def mode(self) -> str:
        """How segments run: ``plain``, ``fused`` or ``compiled``, and the mixed precision; of exports their runtime."""
        form = "compiled" if self.compiles else "fused" if self.fused else str(getattr(self.model, "mode", "plain"))
        return form if self.dtype is None else f"{form}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def plan(self) -> Plan:
        """What a call that begins now runs under to its end, whatever policy is set meanwhile."""
        return self._plan

    def train(self, mode: bool = True) -> "AdaptiveModel":
        if mode:
            raise RuntimeError("AdaptiveModel only runs inference; train the model inside it.")
        return super().train(False)

    def time_segments(self, images: Tensor, repeats: int = 7) -> SegmentTimes:
        """Time the segments on parts of ``images``, a batch as it will come, and drop samples only where that pays.

        Returns the times, which ``times`` keeps; setting that to None drops at every exit again.
        """
        with self.running(images.device):
            self.times = segment_times(self.runner, self.checked(images), repeats)
        return self.times

    def measure(self, images: Tensor, repeats: int = 7) -> SegmentTimes:
        """The old name of ``time_segments``; a policy's ``measure`` is its confidence."""
        warn_old("AdaptiveModel.measure", "call time_segments")
        return self.time_segments(images, repeats)

    def refresh(self) -> None:
        """Make the form that runs from the weights as they are now; calls do so when they see that those changed."""
        with _REFRESHING, torch.inference_mode(False), torch.no_grad():
            # Before the copy, so that what is written meanwhile is seen. CUDA graphs read weights where they lay, and
            # what runs uncompiled reads those there are.
            watch = _Watch(self.model, written=self.fused) if self.fused or self.compiles else None
            form = inference_copy(self.model) if self.fused else self.model
            # Not registered as a submodule: its weights are the model's, and must not appear twice in a state dict.
            self.__dict__["runner"] = CompiledSegments(form) if self.compiles else form
            self._run_as_they_are = [] if self.fused else [*self.model.modules()]
            self._watch = watch  # last: no other thread takes the runner for the new one before it is there

    def __getstate__(self) -> dict[str, Any]:
        made = ("runner", "_watch", "_run_as_they_are")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.refresh()

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Where segments of the ``runner`` are run on ``device``: of the weights as they are, in their precision.

        CUDA graphs run in one thread at a time.
        """
        if self._watch is not None and self._watch.changed():
            with _REFRESHING:
                if self._watch.changed():  # no other thread was faster
                    self.refresh()
        if any(map(_TRAINING, self._run_as_they_are)):
            raise RuntimeError(
                "the model is in training mode, in which dropout and the statistics of the batch would change its "
                "answers and its norms; call eval() on it first, or give fuse=True for a copy that stays in evaluation."
            )
        graphs = device.type == "cuda" and isinstance(self.runner, CompiledSegments)
        precision = torch.autocast(device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        with precision, _GRAPHS if graphs else contextlib.nullcontext():
            yield

    @torch.inference_mode()
    def forward(self, images: Tensor) -> ExitOutput:
        images, plan = self.checked(images), self.plan
        with self.running(images.device):
            return self._run_one(images, plan) if len(images) == 1 else self._run(images, plan)

    def _run_one(self, images: Tensor, plan: Plan) -> ExitOutput:
        """A single sample needs no gathers: it goes on or it is done."""
        state = self.runner.begin_exits(images)
        last = plan.last
        for index, (threshold, temperature) in enumerate(plan.exits):
            logits, state = self.runner.forward_exit(index, state)
            sure = confidence(logits, plan.measure, temperature).float()
            if index == last or float(sure) >= threshold:  # the one synchronisation of this exit
                break
        if index == last:
            self.report_nan(sure)
        return ExitOutput(self.result(logits), torch.full((1,), index, device=images.device), sure)

    def _run(self, images: Tensor, plan: Plan) -> ExitOutput:
        batch, device = images.shape[0], images.device
        if batch == 0:
            num_classes = int(getattr(self.model, "num_classes", 0) or 0)
            return ExitOutput(
                torch.empty((0, num_classes), dtype=_result_dtype(images), device=device),
                torch.empty(0, dtype=torch.int64, device=device),
                torch.empty(0, device=device),
            )
        # Every waiting sample is answered at every exit; the last answer it gets is the one at its own. Samples that
        # left but are still carried along answer into one row too many.
        answers = images.new_empty(0)  # made at the first exit, which knows the number of classes
        sures = torch.empty(batch + 1, device=device)
        exits = torch.empty(batch + 1, dtype=torch.int64, device=device)
        position = torch.arange(batch, device=device)  # the row each sample of the state answers into
        waiting = torch.ones(batch, dtype=torch.bool, device=device)
        count = batch
        state = self.runner.begin_exits(images)
        last, times = plan.last, self.times
        for index, (threshold, temperature) in enumerate(plan.exits):
            logits, state = self.runner.forward_exit(index, state)
            sure = confidence(logits, plan.measure, temperature).float()
            if index == 0:
                answers = torch.empty((batch + 1, logits.shape[1]), dtype=_result_dtype(logits), device=device)
            answers.index_copy_(0, position, logits.to(answers.dtype))
            sures.index_copy_(0, position, sure)
            exits.index_fill_(0, position, index)
            if index == last:
                break
            waiting &= ~(sure >= threshold)
            keep = waiting.nonzero()[:, 0]  # the one synchronisation of this exit
            if len(keep) == 0:
                break
            if len(keep) == count:
                continue
            count = len(keep)
            if times is None or times.pays(index + 1, len(position), count):
                state = select_samples(state, keep)
                position = position.index_select(0, keep)
                waiting = torch.ones(count, dtype=torch.bool, device=device)
            else:
                position = torch.where(waiting, position, batch)
        if index == last:
            self.report_nan(sures[:batch])
        return ExitOutput(answers[:batch], exits[:batch], sures[:batch])

    def checked(self, images: Tensor) -> Tensor:
        """``images`` in the precision of the weights; ValueError unless they are a batch the model reads."""
        dimensions = sample_dimensions(self.model)
        if images.ndim != 1 + len(dimensions):
            kind = "images" if len(dimensions) == 3 else "samples"
            raise ValueError(f"expected {kind} (batch, {', '.join(dimensions)}), got shape {tuple(images.shape)}.")
        return in_precision_of(self.model, images)

    def result(self, logits: Tensor) -> Tensor:
        """``logits`` as they are given to the user.

        A copy where they are the runner's own memory (CUDA graphs), which the next image overwrites.
        """
        return logits.to(_result_dtype(logits), copy=isinstance(self.runner, CompiledSegments))

    def report_nan(self, sures: Tensor) -> None:
        """Warn of samples whose confidence (B,) at the last exit is NaN."""
        count = int(sures.isnan().sum())
        if count:
            warnings.warn(
                f"{count} of {len(sures)} samples have NaN logits at the last exit; look for NaN or infinite values in "
                "those images or in the weights.",
                RuntimeWarning,
                stacklevel=4,
            )


def _counts_versions(tensor: Tensor) -> bool:
    try:
        return tensor._version >= 0
    # It was made under inference mode, which ``is_inference`` does not tell of a parameter that has been moved since.
    except RuntimeError:
        return False


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inference_copy(model: MultiExitModule) -> MultiExitModule:
    """A copy of ``model`` that computes the same faster and cannot be trained."""
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    fuse = getattr(fused, "fuse", None)
    if callable(fuse):
        fuse()
    return fused.to(memory_format=torch.channels_last)
