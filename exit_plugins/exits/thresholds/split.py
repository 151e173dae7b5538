"""What thresholds do on a split, and the line searches that move one threshold at a time: what all solvers share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..costs import mean_cost
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
    values = values[: len(values) - np.count_nonzero(np.isnan(values))]
    ends = [len(values)] if len(values) else []
    return np.concatenate([[0], np.flatnonzero(values[:-1] != values[1:]) + 1, ends]).astype(np.int64)


class Split:
    """A table made ready for line searches: per exit the samples sorted by confidence and the cuts between them."""

    def __init__(self, confidence: NDArray[Any], correct: NDArray[Any], costs: NDArray[Any]) -> None:
        # An infinite threshold closes an exit for everybody, and any other lets whoever is infinitely sure leave: as
        # for the largest number there is, with which comparisons alone say the same.
        self.confidence = np.minimum(confidence, np.finfo(np.float32).max)
        self.right, self.costs = np.ascontiguousarray(correct, dtype=bool), costs
        self.correct = self.right.view(np.int8)
        self.num_exits, self.num_samples = confidence.shape
        self.extra = costs - costs[0]
        self.samples = np.arange(self.num_samples)
        self.orders = [descending(c) for c in self.confidence]
        self.values = [c[order] for c, order in zip(self.confidence, self.orders, strict=True)]
        self.cuts = [cuts_of(values) for values in self.values]

    @classmethod
    def of(cls, table: ExitTable, costs: NDArray[Any], max_exit: int | None = None) -> "Split":
        """Of all exits, or of those up to ``max_exit``, which is then the last."""
        end = None if max_exit is None else max_exit + 1
        return cls(table.confidence[:end], table.correct[:end], costs[:end])

    def subset(self, index: NDArray[Any]) -> "Split":
        return Split(self.confidence[:, index], self.right[:, index], self.costs)

    def leaves(self, k: int, threshold: float) -> NDArray[Any]:
        leaves: NDArray[Any] = self.confidence[k] >= threshold
        return leaves

    def exits(self, thresholds: NDArray[Any]) -> NDArray[Any]:
        """Where each sample (N,) leaves."""
        exits: NDArray[Any] = np.full(self.num_samples, self.num_exits - 1)
        for k in range(self.num_exits - 2, -1, -1):
            exits[self.leaves(k, thresholds[k])] = k
        return exits

    def counts(self, thresholds: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
        """How many samples (K,) leave at each exit, and how many of all are answered right."""
        # Counting bits: many times faster than gathering what each sample is worth where it leaves.
        counts, correct = np.zeros(self.num_exits, dtype=np.int64), 0
        waiting = np.ones(self.num_samples, dtype=bool)
        for k in range(self.num_exits):
            leaving = waiting if k == self.num_exits - 1 else self.leaves(k, thresholds[k]) & waiting
            counts[k] = np.count_nonzero(leaving)
            correct += np.count_nonzero(leaving & self.right[k])
            waiting = waiting ^ leaving
        return counts, correct

    def point(self, thresholds: NDArray[Any]) -> Point:
        counts, correct = self.counts(thresholds)
        return Point(thresholds.copy(), correct, mean_cost(counts, self.costs))

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
        for _ in range(_ASCENT_SWEEPS):
            before = thresholds.copy()
            sweep = _Sweep(self, thresholds)
            gains = sweep.correct - price * sweep.extra
            for k in range(self.num_exits - 2, -1, -1):
                total = _running(gains[k], sweep.kinds(k))[self.cuts[k]]
                thresholds[k] = self.threshold(k, self.cuts[k][total.argmax()])
                sweep.settle(k, thresholds[k])
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
            sweep = _Sweep(self, point.thresholds)
            for k in range(self.num_exits - 2, -1, -1):
                found = self._line(sweep, point, k, target)
                if found is not None and (
                    not target.met(point.correct, point.cost) or target.score(found) > target.score(point)
                ):
                    point = found
                sweep.settle(k, point.thresholds[k])
            if point is before:
                break
        return point

    def _line(self, sweep: "_Sweep", point: Point, k: int, target: Target) -> Point | None:
        """The best point that meets the target when only threshold ``k`` moves."""
        kinds = sweep.kinds(k)
        here = np.flatnonzero(kinds)
        kinds, values = kinds[here], self.values[k][here]  # of the samples that get here, surest first
        cuts = cuts_of(values)
        # What it comes to for every cut, beginning at what it comes to now.
        now = np.count_nonzero(values >= point.thresholds[k])
        correct, extra = _running(sweep.correct[k], kinds), _running(sweep.extra[k], kinds)
        correct = (point.correct - correct[now] + correct)[cuts]
        extra = ((point.cost - self.costs[0]) * self.num_samples - extra[now] + extra)[cuts]
        # The running sums carry rounding: they propose, an exact evaluation decides.
        if target.need is None:
            room = (target.budget - self.costs[0]) * self.num_samples
            if target.budget < self.costs[-1]:
                allowed = extra <= room + 1e-9 * self.extra[-1] * self.num_samples
            else:
                allowed = np.ones(len(cuts), dtype=bool)
            candidates = _first(allowed, -correct, extra)
        else:
            candidates = _first(correct >= target.need, extra, -correct)
        for candidate in candidates:
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


class _Sweep:
    """One pass over the exits, from deep to shallow, in which each threshold in turn may move.

    Who reaches exit k is decided above it, what passing it leads to below it: in this order the first stays as it was
    at the start of the pass and the second is always up to date.

    A sample's part in moving threshold k depends on little: whether it gets there, whether exit k is right, where it
    would leave otherwise and whether that is right. Each combination is a kind, a small number: 0 for the samples that
    do not get there, else 1 + where it would leave times two, one more where that is right, and 2 K more where exit k
    is. Small numbers are worked out without branches, which cost more than anything else where masks are random.

    Attributes:
        correct, extra: (K, kinds) what a sample of a kind adds to correct answers, and to the cost beyond the first
            exit's, by leaving at exit k instead of passing it.
    """

    def __init__(self, split: Split, thresholds: NDArray[Any]) -> None:
        count = split.num_exits
        self.split, self.small = split, np.min_scalar_type(4 * count)
        self.right = split.right.view(np.uint8).astype(self.small, copy=False)
        self.reach = [np.ones(split.num_samples, dtype=bool)]
        for k in range(count - 2):
            self.reach.append(self.reach[-1] & ~split.leaves(k, thresholds[k]))
        self.later = self._ending(count - 1)
        later, right = np.divmod(np.arange(2 * count), 2)
        self.correct = np.tile(np.concatenate([[0], -right, 1 - right]), (count, 1))
        self.extra = np.zeros(self.correct.shape)
        self.extra[:, 1:] = np.tile(split.extra[:, None] - split.extra[later], 2)

    def _ending(self, k: int) -> NDArray[Any]:
        """For each sample (N,) two times ``k``, and one more where exit ``k`` is right."""
        ending: NDArray[Any] = self.right[k] + self.small.type(2 * k)
        return ending

    def kinds(self, k: int) -> NDArray[Any]:
        """The kind (N,) of each sample at exit ``k``, surest first."""
        one, right = self.small.type(1), self.small.type(2 * self.split.num_exits)
        kinds = (self.later + self.right[k] * right + one) * self.reach[k].view(np.uint8)
        ordered: NDArray[Any] = kinds[self.split.orders[k]]
        return ordered

    def settle(self, k: int, threshold: float) -> None:
        """Go on to the next shallower exit, with this threshold at exit ``k``."""
        self.later += (self._ending(k) - self.later) * self.split.leaves(k, threshold).view(np.uint8)


def _running(worth: NDArray[Any], kinds: NDArray[Any]) -> NDArray[Any]:
    """Sums (N + 1,) of what the first 0, 1, ... N of ``kinds`` are worth."""
    sums = np.zeros(len(kinds) + 1, dtype=worth.dtype)
    np.cumsum(worth[kinds], out=sums[1:])
    return sums


def _first(allowed: NDArray[Any], major: NDArray[Any], minor: NDArray[Any]) -> NDArray[Any]:
    """The ``_CANDIDATES`` allowed places with the least ``major``, of equal ones with the least ``minor``, in order."""
    places = np.flatnonzero(allowed)
    if len(places) > _CANDIDATES:
        last = np.partition(major[places], _CANDIDATES - 1)[_CANDIDATES - 1]
        places = places[major[places] <= last]
    ranked: NDArray[Any] = places[np.lexsort((minor[places], major[places]))]
    return ranked[:_CANDIDATES]


def exit_shares(split: Split, thresholds: NDArray[Any]) -> NDArray[Any]:
    """Share (K,) of the samples that leaves at each exit under ``thresholds`` (K,)."""
    return split.counts(thresholds)[0] / split.num_samples
