"""Latency as the cost: what adaptive calls take, measured through them, and thresholds for a mean time.

Where some samples leave a batch the others go on as a smaller one, whose time per sample is higher. So what it takes to
reach an exit depends on how many get there, and with that on the thresholds that are sought.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from .adaptive import AdaptiveModel
from .costs import SegmentTimes, synchronizer
from .policy import ExitPolicy
from .protocol import select_samples
from .table import ExitTable, check_not_empty
from .thresholds import solve_thresholds

__all__ = ["LatencyProfile", "exit_shares_of", "processor_name", "profile_latency", "solve_latency"]

# A share below which nobody gets to an exit.
_NOBODY = 1e-9
# No clock tells less than this, and no cost is zero.
_TICK = 1e-9
# Rounds from each end; costs that move by less than this share have settled. Ours: two to four rounds are usual.
_ROUNDS = 8
_SETTLED = 1e-3
# Of thresholds from which thresholds are sought.
_NOBODY_EARLY, _EVERYBODY_FIRST = np.inf, -np.inf


@dataclass(frozen=True)
class LatencyProfile(SegmentTimes):
    """Measured time of adaptive calls on batches of up to ``batch_size`` samples.

    Attributes:
        sizes: (S,) batch sizes, increasing; the last is the size that batches come in.
        segment: (K, S) seconds that segment k on so many samples adds to a call, deciding who leaves after it included;
            for the first segment all else that a call does too.
        gather: (K, S) seconds it takes to gather so many samples' state before segment k; zero for the first.
        measured: what policies keep of it, in plain JSON values: ``batch_size``, and the ``mode``, ``threads``,
            ``device``, ``processor`` and version of ``torch`` it was measured with.
    """

    measured: dict[str, Any]

    @property
    def num_exits(self) -> int:
        return len(self.segment)

    @property
    def batch_size(self) -> int:
        return int(self.sizes[-1])

    def full_batches(self) -> NDArray[np.float64]:
        """Cumulative seconds (K,) per sample to each exit where all of a batch leave together."""
        return np.cumsum(self.segment[:, -1]) / self.batch_size

    def costs(self, shares: NDArray[Any]) -> NDArray[np.float64]:
        """Cumulative seconds (K,) per sample to each exit where ``shares`` (K,) of all samples leave at the exits.

        Samples are taken to come in random order, so how many of a batch get to an exit is binomial, and
        ``shares @ costs`` is the expected time per sample.

        ValueError unless there is one share per exit and they add up to 1.
        """
        reach, seconds, slopes = self._segments(shares)
        # A single sample that gets where nobody else does is there alone.
        each = np.where(reach > _NOBODY, seconds / np.maximum(reach, _NOBODY), slopes)
        return np.cumsum(each) / self.batch_size

    def marginal_costs(self, shares: NDArray[Any]) -> NDArray[np.float64]:
        """Cumulative seconds (K,) that one more sample adds to each exit, where ``shares`` (K,) leave at the exits now.

        Less than ``costs``: what a segment takes whatever comes is there already, as far as somebody gets to it. All
        samples get to the first exit, so that its own cost moves nothing; it is the mean one.
        """
        _, seconds, slopes = self._segments(shares)
        slopes[0] = seconds[0]
        return np.cumsum(slopes) / self.batch_size

    def mean(self, shares: NDArray[Any]) -> float:
        """Expected seconds per sample where ``shares`` (K,) of all samples leave at the exits."""
        return float(self._segments(shares)[1].sum()) / self.batch_size

    def _segments(self, shares: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The share (K,) that gets to each exit, the expected seconds of its segment in a batch, and their slope."""
        shares = np.asarray(shares, dtype=np.float64)
        if shares.shape != (self.num_exits,) or (shares < 0).any() or not np.isclose(shares.sum(), 1.0):
            raise ValueError(f"expected {self.num_exits} shares that add up to 1, got {shares.tolist()}.")
        batch, rows = self.batch_size, np.arange(self.batch_size + 1)
        gone = np.minimum(np.concatenate([[0.0], np.cumsum(shares)[:-1]]), 1.0)
        seconds, slopes = np.zeros(self.num_exits), np.zeros(self.num_exits)
        for k in range(self.num_exits):
            each = np.interp(rows, self.sizes, self.segment[k])
            if gone[k] > 0:
                # A batch is gathered where any of those that are gone left just before.
                just_before = min(shares[k - 1] / gone[k], 1.0)
                gathered = 1.0 - (1.0 - just_before) ** (batch - rows)
                each += gathered * np.interp(rows, self.sizes, self.gather[k])
            each[0] = 0.0  # nobody is left
            seconds[k] = binom.pmf(rows, batch, 1.0 - gone[k]) @ each
            # The derivative of a binomial mean: what one sample adds to those the others are.
            slopes[k] = batch * max(float(binom.pmf(rows[:-1], batch - 1, 1.0 - gone[k]) @ np.diff(each)), 0.0)
        return 1.0 - gone, seconds, slopes


@torch.inference_mode()
def profile_latency(
    model: AdaptiveModel,
    images: Tensor,
    repeats: int = 9,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyProfile:
    """Time adaptive calls of ``model`` on ``images`` (B, C, H, W), a batch as it will come, or clips (B, T, C, H, W).

    All samples are made to leave at one exit, at each in turn, for batches of 1, a quarter, half and all of the images;
    so deciding who leaves, and what a call does besides, is in the times. Medians of ``repeats`` runs, all sizes and
    exits timed within each run so that a drift of the machine touches all alike.

    Args:
        model: in the form it will run in: fused, compiled, mixed precision, an ``ExportedAdaptiveModel``. While it is
            timed its policy is another, so no other thread should call it.
        images: of the size they will have; what they show does not matter.
        clock: seconds, for instance ``time.process_time`` on one thread of a machine that others use too.

    Raises:
        ValueError: no images, no repeats or a negative warmup, or confidences that are NaN, which never leave.
    """
    if repeats < 1 or warmup < 0 or images.shape[0] == 0:
        raise ValueError(
            f"expected repeats >= 1, warmup >= 0 and images, got {repeats}, {warmup}, {tuple(images.shape)}."
        )
    batch, num_exits, before = images.shape[0], model.policy.num_exits, model.policy
    sizes = sorted({1, -(-batch // 4), -(-batch // 2), batch})
    wait = synchronizer(images.device)

    def timed(function: Callable[[], Any]) -> tuple[float, Any]:
        wait()
        start = clock()
        result = function()
        wait()
        return clock() - start, result

    calls = np.zeros((repeats, num_exits, len(sizes)))
    try:
        for run in range(-warmup, repeats):
            for index in range(num_exits):
                model.policy = _everybody_at(index, before)
                model(images[:1])  # calls follow one another: what the policy's change put out of the caches is back
                for column, size in enumerate(sizes):
                    seconds, out = timed(lambda: model(images[:size]))  # noqa: B023
                    if (out.exit_index != index).any():
                        raise ValueError(
                            f"confidences at exit {index + 1} are NaN, and such samples never leave; look for NaN or "
                            "infinite values in the images or in the weights."
                        )
                    if run >= 0:
                        calls[run, index, column] = seconds
        gathers = np.zeros((repeats, num_exits, len(sizes)))
        with model.running(images.device):
            state = model.runner.begin_exits(model.checked(images))
            for index in range(num_exits - 1 if batch > 1 else 0):
                _, state = model.runner.forward_exit(index, state)
                for column, size in enumerate(sizes):
                    rows = torch.linspace(0, batch - 1, size, device=images.device).long()
                    for run in range(repeats):
                        gathers[run, index + 1, column] = timed(lambda: select_samples(state, rows))[0]  # noqa: B023
    finally:
        model.policy = before
    # Noise may make a longer call look shorter.
    reached = np.maximum.accumulate(np.maximum(np.median(calls, 0), _TICK), axis=0)
    measured = {
        "batch_size": batch,
        "mode": model.mode,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(images.device) if images.device.type == "cuda" else images.device.type,
        "processor": processor_name(),
        "torch": torch.__version__,
    }
    return LatencyProfile(np.array(sizes), np.diff(reached, axis=0, prepend=0.0), np.median(gathers, 0), measured)


def solve_latency(
    table: ExitTable,
    profile: LatencyProfile,
    budget: float | None = None,
    accuracy: float | None = None,
    **how: Any,
) -> ExitPolicy:
    """Thresholds as accurate as possible in a mean time of ``budget`` seconds, or as fast as ``accuracy`` allows.

    The time of a batch is no sum of costs per sample. But it grows the less the more of its samples go on, so that it
    lies below what the marginal costs at any policy say, and equals it there: thresholds are solved for those, and
    again for those at the policy that this gave, until they stay as they are (a convex-concave procedure). From both
    ends, nobody and everybody leaving at the first exit; the best policy whose expected time keeps to the budget is
    taken.

    Args:
        table: K exits, N labelled samples the model was not trained on.
        profile: of the model, at the batch size and in the mode it will run.
        budget: highest mean seconds per sample in batches of ``profile.batch_size``. Not exceeded on ``table`` by
            what ``profile`` expects.
        accuracy: lowest accuracy on ``table``, a fraction in [0, 1]. Give exactly one of the two.
        how: ``method``, ``model``, ``holdout``, ``max_exit`` and the method's options, as ``solve_thresholds`` takes
            them.

    Returns:
        ExitPolicy whose ``costs`` are seconds per sample in the batches it leaves, whose ``source["cost"]`` is the
        expected time, and whose ``source["latency"]`` says where that was measured.

    Raises:
        ValueError: a profile of another number of exits, or what ``solve_thresholds`` raises: a target out of reach.
    """
    check_not_empty(table, "thresholds are solved on a labelled calibration split")
    if profile.num_exits != table.num_exits:
        raise ValueError(f"a profile of {profile.num_exits} exits does not fit a table of {table.num_exits}.")
    cap = how.get("max_exit")
    if budget is not None:
        _check_reachable(table, profile, budget, cap)
    found: list[ExitPolicy] = []
    seen: list[NDArray[Any]] = []
    for start in (_NOBODY_EARLY, _EVERYBODY_FIRST):
        shares = exit_shares_of(ExitPolicy(np.full(table.num_exits, start), max_exit=cap), table)
        for _ in range(_ROUNDS):
            costs = profile.marginal_costs(shares)
            goal = None
            if budget is not None:
                goal = max(budget - profile.mean(shares) + float(shares @ costs), _least(table, costs, cap))
            problem = np.append(costs, goal or 0.0)
            if any(np.allclose(problem, other, rtol=_SETTLED, atol=0.0) for other in seen):
                break
            seen.append(problem)
            policy = _as_run(solve_thresholds(table, costs, goal, accuracy, **how), table, profile, budget)
            found.append(policy)
            shares = np.array(policy.source["shares"])
    if budget is None:
        return min(found, key=lambda policy: float(policy.source["cost"]))
    kept = [policy for policy in found if policy.source["cost"] <= budget]
    if not kept:
        full = profile.full_batches()
        cheapest = solve_thresholds(table, full, _least(table, full, cap), **how)
        kept = [_as_run(cheapest, table, profile, budget)]
    return max(kept, key=lambda policy: (policy.source["accuracy"], -policy.source["cost"]))


def processor_name() -> str:
    """Of this machine, as its system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _everybody_at(index: int, policy: ExitPolicy) -> ExitPolicy:
    """All leave at exit ``index``, by the confidence that ``policy`` takes."""
    thresholds = np.full(policy.num_exits, -np.inf)
    thresholds[:index] = np.inf
    return ExitPolicy(thresholds, policy.measure, policy.temperatures, model=policy.model)


def exit_shares_of(policy: ExitPolicy, table: ExitTable) -> NDArray[np.float64]:
    """Share (K,) of the samples of ``table`` that leaves at each exit under ``policy``."""
    exits = policy.choose(table.confidence)
    return np.bincount(exits, minlength=table.num_exits) / table.num_samples


def _shares_first(table: ExitTable, cap: int | None) -> NDArray[np.float64]:
    """Everybody whose confidence is a number leaves at the first exit."""
    return exit_shares_of(ExitPolicy(np.full(table.num_exits, _EVERYBODY_FIRST), max_exit=cap), table)


def _least(table: ExitTable, costs: NDArray[Any], cap: int | None) -> float:
    # A budget is compared with means that carry rounding.
    return float(_shares_first(table, cap) @ costs) * (1 + 1e-12)


def _check_reachable(table: ExitTable, profile: LatencyProfile, budget: float, cap: int | None) -> None:
    least = profile.mean(_shares_first(table, cap))
    if not budget >= least:
        raise ValueError(
            f"a budget of {1e3 * budget:.6g} ms cannot be met: in batches of {profile.batch_size} the least possible "
            f"mean time is {1e3 * least:.6g} ms, where everybody leaves at the first exit, and to the last it takes "
            f"{1e3 * profile.full_batches()[-1]:.6g} ms."
        )


def _as_run(policy: ExitPolicy, table: ExitTable, profile: LatencyProfile, budget: float | None) -> ExitPolicy:
    """``policy`` with the costs and the mean time of the batches that it leaves itself."""
    shares = exit_shares_of(policy, table)
    costs = profile.costs(shares)
    source = {**policy.source, "cost": float(shares @ costs), "latency": profile.measured}
    if budget is not None:
        source["target"] = {"budget": float(budget)}
    return replace(policy, costs=costs, source=source)
