"""What reaching each exit costs: multiply-accumulates, parameters, and measured latency, all cumulative."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .meta import meta_copy
from .protocol import (
    AnyModel,
    check_input_size,
    check_multi_exit,
    evaluating,
    exit_device,
    in_precision_of,
    select_samples,
)

__all__ = [
    "ExitCosts",
    "SegmentTimes",
    "check_costs",
    "exit_costs",
    "exit_counts",
    "exit_latency",
    "mean_cost",
    "segment_times",
    "synchronizer",
]


@dataclass(frozen=True)
class ExitCosts:
    """Cumulative cost of stopping at each exit, earlier heads included.

    Attributes:
        macs: (K,) float64, multiply-accumulates of convolutions, linear layers and attention products for one sample;
            normalisation, pooling, activations and biases are not counted. The papers call these FLOPs.
        params: (K,) int64, parameters read on the way to the exit.
    """

    macs: NDArray[Any]
    params: NDArray[Any]


class _SeenParameters(TorchFunctionMode):
    """Collects the parameters that reach any torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter):
                self.seen[id(leaf)] = leaf.numel()
        return func(*args, **(kwargs or {}))


def exit_costs(model: AnyModel, input_size: Sequence[int] = (3, 224, 224)) -> ExitCosts:
    """Cost of every exit for one sample of ``input_size``: (channels, height, width), of clips with the frames first.

    The model is not run: a copy of it on the meta device is, one segment after the other, so even large models take
    moments and nothing about ``model`` changes.
    """
    model = check_multi_exit(model)
    check_input_size(model, input_size)
    shadow = meta_copy(model).eval()
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
    macs, params = [], []
    counter, parameters = FlopCounterMode(display=False), _SeenParameters()
    with torch.no_grad(), counter, parameters:
        state = shadow.begin_exits(torch.empty((1, *input_size), device="meta", dtype=dtype))
        for index in range(shadow.num_exits):
            _, state = shadow.forward_exit(index, state)
            macs.append(counter.get_total_flops() / 2)
            params.append(sum(parameters.seen.values()))
    return ExitCosts(macs=np.array(macs), params=np.array(params, dtype=np.int64))


@torch.inference_mode()
def exit_latency(model: AnyModel, x: Tensor, repeats: int = 20, warmup: int = 3) -> NDArray[Any]:
    """Measured seconds (K,) to reach each exit with the batch ``x``, cumulative; the median of ``repeats`` full runs.

    The segments are timed one after the other within each run, so a drift of the machine touches all alike.

    ValueError for no repeats or a negative warmup.
    """
    model = check_multi_exit(model)
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0, got {repeats} and {warmup}.")
    device = exit_device(model)
    synchronize = synchronizer(device)
    times = np.zeros((repeats, model.num_exits))
    x = in_precision_of(model, x.to(device))
    with evaluating(model):
        for run in range(-warmup, repeats):
            synchronize()
            start = time.perf_counter()
            state = model.begin_exits(x)
            for index in range(model.num_exits):
                _, state = model.forward_exit(index, state)
                synchronize()
                if run >= 0:
                    times[run, index] = time.perf_counter() - start
    segments = np.median(np.diff(times, axis=1, prepend=0.0), axis=0)
    return np.cumsum(segments)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits for what the device has been given to do, so that a clock sees it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


@dataclass(frozen=True)
class SegmentTimes:
    """Measured time of each segment, and of dropping samples before it, at several batch sizes.

    Attributes:
        sizes: (S,) batch sizes, increasing.
        segment: (K, S) seconds segment k takes on that many samples.
        gather: (K, S) seconds it takes to gather that many samples' state before segment k; zero for the first.
    """

    sizes: NDArray[Any]
    segment: NDArray[Any]
    gather: NDArray[Any]

    def pays(self, index: int, rows: int, waiting: int) -> bool:
        """Whether gathering the ``waiting`` of ``rows`` samples before segment ``index`` costs less than it saves."""
        saved = self._at(self.segment[index], rows) - self._at(self.segment[index], waiting)
        return bool(saved > self._at(self.gather[index], waiting))

    def _at(self, seconds: NDArray[Any], rows: int) -> float:
        """Interpolated between the sizes measured; beyond the largest, in proportion to it."""
        return float(np.interp(rows, self.sizes, seconds)) * max(rows / float(self.sizes[-1]), 1.0)


@torch.inference_mode()
def segment_times(model: AnyModel, x: Tensor, repeats: int = 7, warmup: int = 2) -> SegmentTimes:
    """Time every segment, and the gather before it, on 1, 1/4, 1/2, 3/4 and all of the images ``x`` (B, C, H, W).

    Medians of ``repeats`` runs, all sizes measured within each run so that a drift of the machine touches all alike.

    ValueError for no repeats, a negative warmup, or no images.
    """
    module = check_multi_exit(model)
    if repeats < 1 or warmup < 0 or x.shape[0] == 0:
        raise ValueError(f"expected repeats >= 1, warmup >= 0 and images, got {repeats}, {warmup}, {tuple(x.shape)}.")
    device = exit_device(module)
    synchronize = synchronizer(device)
    sizes = sorted({1, *(max(round(x.shape[0] * part), 1) for part in (0.25, 0.5, 0.75, 1.0))})
    segment = np.zeros((repeats, module.num_exits, len(sizes)))
    gather = np.zeros_like(segment)

    def timed(function: Callable[[], Any]) -> tuple[float, Any]:
        synchronize()
        start = time.perf_counter()
        result = function()
        synchronize()
        return time.perf_counter() - start, result

    x = in_precision_of(module, x.to(device))
    with evaluating(module):
        for run in range(-warmup, repeats):
            for column, size in enumerate(sizes):
                rows = torch.arange(size, device=device)
                images = x[:size]
                state = images
                for index in range(module.num_exits):
                    if index == 0:
                        seconds, (_, state) = timed(lambda: module.forward_exit(0, module.begin_exits(images)))  # noqa: B023
                    else:
                        copied, state = timed(lambda: select_samples(state, rows))  # noqa: B023
                        seconds, (_, state) = timed(lambda: module.forward_exit(index, state))  # noqa: B023
                        if run >= 0:
                            gather[run, index, column] = copied
                    if run >= 0:
                        segment[run, index, column] = seconds
    return SegmentTimes(np.array(sizes), np.median(segment, 0), np.median(gather, 0))


def check_costs(costs: Sequence[float] | NDArray[Any], num_exits: int) -> NDArray[Any]:
    """Cumulative costs (K,) as float64; ValueError unless they are K finite, positive numbers that do not fall.

    TypeError for what holds no numbers.
    """
    if not isinstance(costs, (np.ndarray, Sequence)) and hasattr(costs, "macs"):
        raise TypeError("costs are one number per exit; pass exit_costs(...).macs, or measured latencies.")
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (num_exits,):
        raise ValueError(f"expected the cumulative cost of each of {num_exits} exits, got shape {costs.shape}.")
    if not np.isfinite(costs).all() or not (costs > 0).all() or (np.diff(costs) < 0).any():
        raise ValueError(f"costs are cumulative: finite, positive and never falling; got {costs.tolist()}.")
    return costs


def exit_counts(exits: NDArray[Any], num_exits: int) -> NDArray[Any]:
    """How many samples (K,) left at each exit."""
    return np.bincount(exits, minlength=num_exits)


def mean_cost(counts: NDArray[Any], costs: NDArray[Any]) -> float:
    """Mean cost per sample of (K,) counts; between the first and the last exit's cost to the last bit."""
    extra = counts @ (costs - costs[0]) / max(counts.sum(), 1)
    return float(min(costs[0] + extra, costs[-1]))
