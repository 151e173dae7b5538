"""What thresholds do on a split, and the line searches that move one threshold at a time: what all solvers share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..costs import exit_counts, mean_cost
from ..table import ExitTable
from .msdnet import descending

__all__ = ["Point", "Split", "Target", "exit_shares"]

# Sweeps over the exits after which a search stops even if a threshold still moves: ours, a guard against going round in
# circles; a sweep that moves nothing ends it before.
_ASCENT_SWEEPS = 10
_LINE_SWEEPS = 20
# Running sums carry rounding: so many of the best cuts on a line are evaluated exactly.
_CANDIDATES = 4


@dataclass(frozen=True)
class Point:
    """Thresholds and what they do on the split they were evaluated on."""

    thresholds: NDArray[Any]
    correct: int
    cost: float


@dataclass(frozen=True)
class Target:
    """What is asked for: at most ``budget`` mean cost, or at least ``need`` correct answers."""

    budget: float = np.inf
    need: int | None = None

    def met(self, correct: int, cost: float) -> bool:
        return cost <= self.budget if self.need is None else correct >= self.need

    def score(self, point: Point) -> tuple[float, float]:
        return (point.correct, -point.cost) if self.need is None else (-point.cost, point.correct)

    def best(self, points: Iterable[Point]) -> Point | None:
        return max((p for p in points if self.met(p.correct, p.cost)), key=self.score, default=None)


def cuts_of(values: NDArray[Any]) -> NDArray[Any]:
    """How many of ``values`` (N,), sorted from high to low with NaN last, a threshold can have at or above it.

    A cut lies only where the value changes, so ties stay together; NaN is never above a threshold.
    """
    changes = np.flatnonzero(values[:-1] != values[1:]) + 1
    cuts = np.unique(np.concatenate([[0], changes, [len(values)]]))
    possible: NDArray[Any] = cuts[cuts <= len(values) - np.isnan(values).sum()]
    return possible


class Split:
    """A table made ready for line searches: per exit the samples sorted by confidence and the cuts between them."""

    def __init__(self, confidence: NDArray[Any], correct: NDArray[Any], costs: NDArray[Any]) -> None:
        # An infinite threshold closes an exit for everybody, and any other lets whoever is infinitely sure leave: as
        # for the largest number there is, with which comparisons alone say the same.
        self.confidence = np.minimum(confidence, np.finfo(np.float32).max)
        self.correct, self.costs = correct.astype(np.int8), costs
        self.num_exits, self.num_samples = confidence.shape
        self.extra = costs - costs[0]
        self.samples = np.arange(self.num_samples)
        self.orders = [descending(c) for c in confidence]
        self.values = [c[order] for c, order in zip(confidence, self.orders, strict=True)]
        self.cuts = [cuts_of(values) for values in self.values]

    @classmethod
    def of(cls, table: ExitTable, costs: NDArray[Any]) -> "Split":
        return cls(table.confidence, table.correct, costs)

    def subset(self, index: NDArray[Any]) -> "Split":
        return Split(self.confidence[:, index], self.correct[:, index], self.costs)

    def leaves(self, k: int, threshold: float) -> NDArray[Any]:
        leaves: NDArray[Any] = self.confidence[k] >= threshold
        return leaves

    def exits(self, thresholds: NDArray[Any]) -> NDArray[Any]:
        return self.exits_after(-1, thresholds)

    def point(self, thresholds: NDArray[Any]) -> Point:
        exits = self.exits(thresholds)
        correct = int(self.correct[exits, self.samples].sum())
        return Point(thresholds.copy(), correct, mean_cost(exit_counts(exits, self.num_exits), self.costs))

    def threshold(self, k: int, cut: int) -> np.float32:
        """Threshold that lets the ``cut`` most confident samples leave; -inf for all of them, here and elsewhere."""
        if cut == 0:
            return np.float32(np.inf)
        return np.float32(-np.inf) if cut == self.cuts[k][-1] else self.values[k][cut - 1]

    def everybody_first(self) -> NDArray[Any]:
        """The cheapest thresholds there are: everyone whose confidence is a number leaves at the first exit."""
        return np.full(self.num_exits, -np.inf, dtype=np.float32)

    def nobody_early(self) -> NDArray[Any]:
        thresholds = np.full(self.num_exits, np.inf, dtype=np.float32)
        thresholds[-1] = -np.inf
        return thresholds

    def ascend(self, thresholds: NDArray[Any], price: float) -> NDArray[Any]:
        """Coordinate ascent of ``sum(correct - price * extra cost)``, an exact line search per exit."""
        thresholds = thresholds.copy()
        value = self.correct - price * self.extra[:, None]
        leaves = [self.leaves(k, t) for k, t in enumerate(thresholds)]
        for _ in range(_ASCENT_SWEEPS):
            before = thresholds.copy()
            # Who reaches exit k is decided above it, what waiting is worth below it: going from deep to shallow, the
            # first stays as it was at the start of the sweep and the second is always up to date.
            reach = [np.ones(self.num_samples, dtype=bool)]
            for k in range(self.num_exits - 2):
                reach.append(reach[-1] & ~leaves[k])
            later = value[-1]
            for k in range(self.num_exits - 2, -1, -1):
                gain = (value[k] - later) * reach[k]
                total = np.concatenate([[0.0], np.cumsum(gain[self.orders[k]])])[self.cuts[k]]
                thresholds[k] = self.threshold(k, self.cuts[k][total.argmax()])
                leaves[k] = self.leaves(k, thresholds[k])
                later = np.where(leaves[k], value[k], later)
            if (thresholds == before).all():
                break
        return thresholds

    def improve(self, point: Point, target: Target) -> Point:
        """Constrained line searches, exit after exit, until none helps: spends what is left of the budget.

        Starts from any point; the result meets the target if the start does or if moving one threshold at a time can
        get there.
        """
        for _ in range(_LINE_SWEEPS):
            before = point
            for k in range(self.num_exits - 2, -1, -1):
                found = self._line(point, k, target)
                if found is not None and (
                    not target.met(point.correct, point.cost) or target.score(found) > target.score(point)
                ):
                    point = found
            if point is before:
                break
        return point

    def _line(self, point: Point, k: int, target: Target) -> Point | None:
        """The best point that meets the target when only threshold ``k`` moves."""
        exits = self.exits(point.thresholds)
        order = self.orders[k][exits[self.orders[k]] >= k]  # the samples that get here, surest first
        values = self.confidence[k][order]
        cuts = cuts_of(values)
        later = self.exits_after(k, point.thresholds)[order]
        gain = self.correct[k][order].astype(np.int64) - self.correct[later, order]
        spent = self.extra[k] - self.extra[later]
        # What it comes to when nobody leaves here, then for every cut.
        exits[order] = later
        correct = int(self.correct[exits, self.samples].sum()) + np.concatenate([[0], np.cumsum(gain)])[cuts]
        extra = float(self.extra[exits].sum()) + np.concatenate([[0.0], np.cumsum(spent)])[cuts]
        # The running sums carry rounding: they propose, an exact evaluation decides.
        if target.need is None:
            room = (target.budget - self.costs[0]) * self.num_samples
            if target.budget < self.costs[-1]:
                allowed = extra <= room + 1e-9 * self.extra[-1] * self.num_samples
            else:
                allowed = np.ones(len(cuts), dtype=bool)
            rank = np.lexsort((extra, -correct))
        else:
            allowed = correct >= target.need
            rank = np.lexsort((-correct, extra))
        for candidate in rank[allowed[rank]][:_CANDIDATES]:
            thresholds = point.thresholds.copy()
            cut = cuts[candidate]
            if cut == 0:
                thresholds[k] = np.inf
            else:
                thresholds[k] = -np.inf if cut == cuts[-1] else values[cut - 1]
            found = self.point(thresholds)
            if target.met(found.correct, found.cost):
                return found
        return None

    def exits_after(self, k: int, thresholds: NDArray[Any]) -> NDArray[Any]:
        """Where each sample would leave if it passed exit ``k``; for -1, where it leaves."""
        leaves: NDArray[Any] = self.confidence[k + 1 :] >= thresholds[k + 1 :, None]
        leaves[-1] = True
        exits: NDArray[Any] = leaves.argmax(0) + k + 1
        return exits


def exit_shares(split: Split, thresholds: NDArray[Any]) -> NDArray[Any]:
    """Share (K,) of the samples that leaves at each exit under ``thresholds`` (K,)."""
    return exit_counts(split.exits(thresholds), split.num_exits) / split.num_samples
