"""Budgets that hold at run time: a hard cap per sample, a controller of the mean cost, a monitor of exit rates."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .costs import check_costs, exit_counts, mean_cost
from .policy import ExitPolicy, check_path
from .samples import SampleRecord

__all__ = ["BudgetController", "ExitDrift", "ExitRateMonitor", "cap_policy"]


def cap_policy(policy: ExitPolicy, max_exit: int | None = None, max_cost: float | None = None) -> ExitPolicy:
    """``policy`` with a hard cap per sample: nobody goes beyond ``max_exit``, or beyond what ``max_cost`` pays for.

    The cap holds for every sample, whatever its confidence, NaN included: against inputs made to look hard (slowdown
    attacks, Hong et al. 2021) it is the worst case. A certificate does not survive it and is dropped. What ``source``
    records is that of the capped policy: ``shares``, and with them the ``cost`` where that is a mean of ``costs``; the
    ``accuracy`` is dropped where samples went beyond the cap, since only a table tells (``evaluate_policy``). A cap
    that is set already stays where it is the lower. ``solve_thresholds(max_exit=)`` solves under a cap.

    Args:
        max_exit: 0-based index of the last exit that may be reached.
        max_cost: in the unit of ``policy.costs``; the deepest exit within it becomes the cap.

    Raises:
        ValueError: not one of the two is given, the policy knows no costs, or the cap lies below the first exit.
    """
    if (max_exit is None) == (max_cost is None):
        raise ValueError("give either max_exit= or max_cost=, and not both.")
    if max_cost is not None:
        if policy.costs is None:
            raise ValueError("this policy knows no costs; give max_exit= instead of max_cost=.")
        if max_cost < policy.costs[0]:
            raise ValueError(f"a cap of {max_cost:.6g} lies below the first exit, which costs {policy.costs[0]:.6g}.")
        max_exit = int(np.searchsorted(policy.costs, max_cost, side="right")) - 1
    capped = replace(policy, max_exit=max_exit, certificate=None)
    last = min(capped.last_exit, policy.last_exit)
    return replace(capped, max_exit=last, source=_capped_source(policy, last))


def _capped_source(policy: ExitPolicy, last: int) -> dict[str, Any]:
    """``policy.source`` as it is where those who went beyond exit ``last`` leave there."""
    shares = policy.source.get("shares")
    if last == policy.last_exit or (shares is not None and not any(shares[last + 1 :])):
        return policy.source  # nobody went beyond
    source = {key: value for key, value in policy.source.items() if key not in ("accuracy", "cost", "shares")}
    if shares is not None:
        moved = [*shares[:last], min(sum(shares[last:]), 1.0), *[0.0] * (len(shares) - last - 1)]
        source["shares"] = moved
        # A time depends on the batches that are left, and is no mean of costs.
        if policy.costs is not None and "latency" not in source:
            source["cost"] = mean_cost(np.array(moved), policy.costs)
    return source


@dataclass(frozen=True)
class ExitDrift:
    """Exit rates of the last samples beside those of the calibration split.

    Attributes:
        observed, expected: (K,) shares per exit.
        psi: population stability index, ``sum (o - e) log(o / e)``; by custom below 0.1 is quiet and above 0.25 loud.
        p_value: of the chi-squared test that both are draws from the same rates; tiny differences become significant
            with many samples, so read it together with ``psi``.
        samples: how many the observed shares are of.
    """

    observed: NDArray[Any]
    expected: NDArray[Any]
    psi: float
    p_value: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "observed": self.observed.tolist(),
            "expected": self.expected.tolist(),
            "psi": self.psi,
            "p_value": self.p_value,
            "samples": self.samples,
        }


class ExitRateMonitor:
    """Compares where samples leave with where they left on the calibration split.

    Args:
        shares: (K,) exit shares on the calibration split, ``policy.source["shares"]``.
        calibration_samples: how many samples those are of, ``policy.source["samples"]["count"]``.
        window: how many of the last samples are looked at.
    """

    def __init__(self, shares: Sequence[float] | NDArray[Any], calibration_samples: int, window: int = 2000) -> None:
        self.shares = np.asarray(shares, dtype=np.float64)
        if self.shares.ndim != 1 or not np.isclose(self.shares.sum(), 1.0) or (self.shares < 0).any():
            raise ValueError(f"shares must be one per exit and add up to 1, got {self.shares.tolist()}.")
        if window < 1 or calibration_samples < 1:
            raise ValueError("expected window >= 1 and calibration_samples >= 1.")
        self.calibration_samples = calibration_samples
        self.window = window
        self._batches: deque[tuple[NDArray[Any], NDArray[Any]]] = deque()  # counts, expected counts
        self._samples = 0

    def update(self, exit_index: Tensor | NDArray[Any], shares: NDArray[Any] | None = None) -> None:
        """Add a batch; ``shares`` are the expected ones where the policy in use is not the one of the constructor."""
        exits = _exits(exit_index, len(self.shares))
        if len(exits) == 0:
            return
        expected = (self.shares if shares is None else np.asarray(shares)) * len(exits)
        self._batches.append((exit_counts(exits, len(self.shares)), expected))
        self._samples += len(exits)
        while self._samples - self._batches[0][0].sum() >= self.window:
            self._samples -= int(self._batches.popleft()[0].sum())

    def report(self) -> ExitDrift:
        """ValueError before the first batch."""
        from scipy.stats import chi2_contingency

        if self._samples == 0:
            raise ValueError("no samples seen yet; there is no exit rate to report.")
        observed = np.sum([counts for counts, _ in self._batches], axis=0)
        expected = np.sum([counts for _, counts in self._batches], axis=0) / self._samples
        # Half a sample in every cell, so that an exit nobody took on one side stays finite.
        o = (observed + 0.5) / (self._samples + 0.5 * len(observed))
        e = (expected * self.calibration_samples + 0.5) / (self.calibration_samples + 0.5 * len(observed))
        cells = np.stack([observed, expected * self.calibration_samples])
        cells = cells[:, cells.sum(0) > 0]
        p_value = float(chi2_contingency(cells, correction=False).pvalue) if cells.shape[1] > 1 else 1.0
        return ExitDrift(
            observed / self._samples, expected, float(((o - e) * np.log(o / e)).sum()), p_value, self._samples
        )


class BudgetController:
    """Keeps the running mean cost at a budget by moving along a path of policies from cheap to full.

    An integral controller: the position u on the path (0 cheap, 1 full) moves by ``gain * (budget - cost) / range``
    per sample, range being the last exit's cost minus the first's. Because at u < 0 everybody leaves at the first exit
    and at u > 1 nobody before the last, u stays within a batch's step of [0, 1], and so, whatever the inputs are, by
    drift or by an attacker's choice,

        |mean cost - budget| <= range * (1 + step) / (gain * samples),    step = gain * batch size,

    for a budget between the first and the last exit's cost. No assumption on the stream is needed; what drift costs
    is accuracy.

    Example::

        controller = BudgetController(policy_path(table, costs), budget=0.4e9)
        adaptive = AdaptiveModel(model, controller.policy)
        for images in stream:
            adaptive.policy = controller.policy
            out = adaptive(images)
            controller.update(out.exit_index)
        controller.mean_cost, controller.drift()

    Args:
        path: ``exits.thresholds.policy_path``, cheapest first, to the policy under which nobody leaves early; finer
            paths hold the budget more smoothly.
        budget: mean cost per sample, in the unit of the path's costs.
        gain: per sample; higher follows faster and disturbs the thresholds more.
        max_exit: hard cap on the exit any sample may reach, see ``cap_policy``; the budget cannot exceed its cost.
        window: samples that ``drift`` looks at.

    Raises:
        ValueError: fewer than two policies with costs, not in that order or not to the full end, or a budget that is
            out of reach.
    """

    def __init__(
        self,
        path: Sequence[ExitPolicy],
        budget: float,
        gain: float = 0.02,
        max_exit: int | None = None,
        window: int = 2000,
    ) -> None:
        costs = path[0].costs if len(path) else None
        if len(path) < 2 or costs is None or any(policy.costs is None for policy in path):
            raise ValueError("the controller needs a path of at least two policies with costs; use policy_path(...).")
        if not gain > 0:
            raise ValueError(f"gain must be positive, got {gain}.")
        num_exits = path[0].num_exits
        self.costs = check_costs(costs, num_exits)
        if not all(policy.costs is not None and np.array_equal(policy.costs, costs) for policy in path):
            raise ValueError("the policies of a path must be of one model and the same costs; use policy_path(...).")
        last = path[-1].last_exit if max_exit is None else cap_policy(path[-1], max_exit).last_exit
        check_path(path, last)
        # The ends are exact, NaN included: at the cheap one nobody passes the first exit.
        capped = path if max_exit is None else [cap_policy(policy, max_exit) for policy in path]
        self.path = [cap_policy(path[0], 0), *capped[1:]]
        self.range = float(self.costs[last] - self.costs[0])
        if not self.costs[0] <= budget <= self.costs[last]:
            raise ValueError(
                f"a budget of {budget:.6g} cannot be held between {self.costs[0]:.6g} (first exit) and "
                f"{self.costs[last]:.6g} (last exit that may be reached)."
            )
        self.budget, self.gain = float(budget), float(gain)
        known = [policy.source["cost"] for policy in self.path if policy.source.get("cost") is not None]
        position = np.linspace(0, 1, len(path))
        # Where the path met the budget on its calibration split, or in proportion.
        self._position = (
            float(np.interp(budget, known, position))
            if len(known) == len(path)
            else (self.budget - self.costs[0]) / (self.range or 1.0)
        )
        self.num_samples = 0
        self._spent = 0.0
        shares = [policy.source.get("shares") for policy in self.path]
        self._shares = None if None in shares else [np.asarray(s) for s in shares]
        self._monitor = None
        if self._shares is not None:
            samples = SampleRecord.of_json(path[0].source.get("samples")) or SampleRecord(1)
            self._monitor = ExitRateMonitor(self._shares[self._step], samples.count, window)

    @property
    def _step(self) -> int:
        # Rounding makes the stream dither between neighbouring policies: the integral takes care of the fraction.
        return int(np.clip(round(self._position * (len(self.path) - 1)), 0, len(self.path) - 1))

    @property
    def policy(self) -> ExitPolicy:
        """The policy for the next batch."""
        return self.path[self._step]

    @property
    def mean_cost(self) -> float:
        """Mean cost per sample so far; NaN before the first."""
        return self._spent / self.num_samples if self.num_samples else float("nan")

    def bound(self, samples: int, batch_size: int = 1) -> float:
        """The guarantee: how far the mean cost can be from the budget after ``samples`` in batches of that size."""
        return self.range * (1 + self.gain * batch_size) / (self.gain * samples)

    def update(self, exit_index: Tensor | NDArray[Any]) -> None:
        """Tell where the samples of the last batch left, (B,) exit indices."""
        exits = _exits(exit_index, len(self.costs))
        if len(exits) == 0:
            return
        if self._monitor is not None:
            self._monitor.update(exits, None if self._shares is None else self._shares[self._step])
        spent = float(self.costs[exits].sum())
        self._spent += spent
        self.num_samples += len(exits)
        if self.range > 0:
            self._position += self.gain * (self.budget * len(exits) - spent) / self.range

    def drift(self) -> ExitDrift:
        """Exit rates of the last samples beside those the policies in use had on the calibration split.

        ValueError if the path's policies do not know theirs.
        """
        if self._monitor is None:
            raise ValueError("the path's policies do not know their exit shares; make it with policy_path(...).")
        return self._monitor.report()


def _exits(exit_index: Tensor | NDArray[Any], num_exits: int) -> NDArray[Any]:
    exits = exit_index.detach().cpu().numpy() if isinstance(exit_index, Tensor) else np.asarray(exit_index)
    if exits.ndim != 1 or (
        len(exits) and (exits.dtype.kind not in "iu" or exits.min() < 0 or exits.max() >= num_exits)
    ):
        raise ValueError(f"expected exit indices (B,) from 0 to {num_exits - 1}.")
    return exits
