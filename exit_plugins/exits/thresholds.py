"""Solvers: thresholds that spend a budget as well as possible, or reach an accuracy as cheaply as possible."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from torch import nn

from .digests import SampleRecord
from .policy import ExitPolicy, check_same_model, describe_model
from .table import ExitTable

__all__ = [
    "METHODS",
    "SWEEPS",
    "check_costs",
    "exit_counts",
    "mean_cost",
    "msdnet_shares",
    "msdnet_thresholds",
    "policy_path",
    "solve_thresholds",
    "sweep_shares",
]

NOBODY = np.float32(1e8)  # MSDNet's threshold of an exit where no sample may leave
EVERYBODY = np.float32(-1e8)  # and of the last one


# ---------------------------------------------------------------------------------------------------------------------
# MSDNet's rule
# ---------------------------------------------------------------------------------------------------------------------


def msdnet_shares(num_exits: int, p: float) -> np.ndarray:
    """Shares (K,) float32 of samples per exit, ``p**k / sum_j p**j`` for k = 1..K (MSDNet, section 4.2).

    Computed in torch's float32, as the released rule is, so that the thresholds agree to the last bit.
    """
    import torch

    if num_exits < 1 or not p > 0:
        raise ValueError(f"expected at least one exit and p > 0, got {num_exits} and {p}.")
    shares = torch.exp(torch.log(torch.tensor([p], dtype=torch.float32)) * torch.arange(1, num_exits + 1).float())
    return (shares / shares.sum()).numpy()


def _msdnet_sweep(num_exits: int) -> np.ndarray:
    return np.stack([msdnet_shares(num_exits, i / 20) for i in range(1, 40)])


def _dyn_perceiver_sweep(num_exits: int) -> np.ndarray:
    bases = [*(round(0.05 * i, 2) for i in range(4, 21)), *(20 / i for i in range(20, 4, -1))]
    rows = np.stack([msdnet_shares(num_exits, q) for q in bases]).astype(np.float64)
    for j, factor in enumerate((0.85, 1.0, 0.5)[: num_exits - 1]):
        # What exit j gives up goes to the exits after it, in proportion.
        given = rows[:, j] * (1 - factor)
        later = rows[:, j + 1 :]
        later *= 1 + given[:, None] / later.sum(1, keepdims=True)
        rows[:, j] *= factor
    return rows.astype(np.float32)


SWEEPS: dict[str, Callable[[int], np.ndarray]] = {"msdnet": _msdnet_sweep, "dyn_perceiver": _dyn_perceiver_sweep}


def sweep_shares(num_exits: int, sweep: str = "msdnet") -> np.ndarray:
    """Shares (P, K) float32 that a published rule tries: ``msdnet`` (39 rows, p = i/20) or ``dyn_perceiver`` (33)."""
    if sweep not in SWEEPS:
        raise ValueError(f"unknown sweep {sweep!r}; choose one of {', '.join(SWEEPS)}.")
    return SWEEPS[sweep](num_exits)


def msdnet_thresholds(table: ExitTable, shares: np.ndarray | Sequence[float]) -> np.ndarray:
    """Thresholds (K,) float32 that let the given share of samples leave at each exit, bit for bit as MSDNet's release.

    Exit after exit, the ``floor(N * share)``-th most confident sample that is still there sets the threshold, and
    everybody at or above it leaves; ties may therefore let more leave than the share says. The last entry is -1e8;
    1e8 marks an exit where nobody may leave.

    Args:
        table: labelled samples; the labels are not used.
        shares: (K,) taken as float32, as the product with N is.
    """
    shares = np.asarray(shares, dtype=np.float32)
    if shares.shape != (table.num_exits,):
        raise ValueError(f"expected one share per exit ({table.num_exits}), got shape {shares.shape}.")
    if not (shares >= 0).all():
        raise ValueError(f"shares must be numbers from 0 to 1, got {shares.tolist()}.")
    return _msdnet_thresholds(table.confidence, [_descending(c) for c in table.confidence], shares)


def _descending(values: np.ndarray) -> np.ndarray:
    """Indices from the largest value to the smallest, NaN last."""
    return np.argsort(-values, kind="stable")


def _msdnet_thresholds(confidence: np.ndarray, orders: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    num_exits, num_samples = confidence.shape
    thresholds = np.full(num_exits, NOBODY, dtype=np.float32)
    gone = np.zeros(num_samples, dtype=bool)
    for k in range(num_exits - 1):
        count = int(np.floor(np.float32(num_samples) * shares[k]))
        waiting = orders[k][~gone[orders[k]]]
        if 1 <= count <= len(waiting) and not np.isnan(confidence[k, waiting[count - 1]]):
            thresholds[k] = confidence[k, waiting[count - 1]]
        gone |= confidence[k] >= thresholds[k]
    thresholds[-1] = EVERYBODY
    return thresholds


# ---------------------------------------------------------------------------------------------------------------------
# What a set of thresholds costs and gets right
# ---------------------------------------------------------------------------------------------------------------------


def check_costs(costs: Sequence[float] | np.ndarray, num_exits: int) -> np.ndarray:
    """Cumulative costs (K,) as float64; ValueError unless they are K finite, positive numbers that do not fall."""
    if not isinstance(costs, (np.ndarray, Sequence)) and hasattr(costs, "macs"):
        raise TypeError("costs are one number per exit; pass exit_costs(...).macs, or measured latencies.")
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (num_exits,):
        raise ValueError(f"expected the cumulative cost of each of {num_exits} exits, got shape {costs.shape}.")
    if not np.isfinite(costs).all() or not (costs > 0).all() or (np.diff(costs) < 0).any():
        raise ValueError(f"costs are cumulative: finite, positive and never falling; got {costs.tolist()}.")
    return costs


def exit_counts(exits: np.ndarray, num_exits: int) -> np.ndarray:
    """How many samples (K,) left at each exit."""
    return np.bincount(exits, minlength=num_exits)


def mean_cost(counts: np.ndarray, costs: np.ndarray) -> float:
    """Mean cost per sample of (K,) counts; between the first and the last exit's cost to the last bit."""
    extra = counts @ (costs - costs[0]) / max(counts.sum(), 1)
    return float(min(costs[0] + extra, costs[-1]))


@dataclass(frozen=True)
class _Point:
    """Thresholds and what they do on the split they were evaluated on."""

    thresholds: np.ndarray
    correct: int
    cost: float


@dataclass(frozen=True)
class _Target:
    """What is asked for: at most ``budget`` mean cost, or at least ``need`` correct answers."""

    budget: float | None
    need: int | None

    def met(self, correct: int, cost: float) -> bool:
        return cost <= self.budget if self.need is None else correct >= self.need

    def score(self, point: _Point) -> tuple[float, float]:
        return (point.correct, -point.cost) if self.need is None else (-point.cost, point.correct)

    def best(self, points: Iterable[_Point]) -> _Point | None:
        return max((p for p in points if self.met(p.correct, p.cost)), key=self.score, default=None)


def _cuts(values: np.ndarray) -> np.ndarray:
    """How many of ``values`` (N,), sorted from high to low with NaN last, a threshold can have at or above it.

    A cut lies only where the value changes, so ties stay together; NaN is never above a threshold.
    """
    changes = np.flatnonzero(values[:-1] != values[1:]) + 1
    cuts = np.unique(np.concatenate([[0], changes, [len(values)]]))
    return cuts[cuts <= len(values) - np.isnan(values).sum()]


class _Split:
    """A table made ready for line searches: per exit the samples sorted by confidence and the cuts between them."""

    def __init__(self, confidence: np.ndarray, correct: np.ndarray, costs: np.ndarray) -> None:
        # An infinite threshold closes an exit for everybody, and any other lets whoever is infinitely sure leave: as
        # for the largest number there is, with which comparisons alone say the same.
        self.confidence = np.minimum(confidence, np.finfo(np.float32).max)
        self.correct, self.costs = correct.astype(np.int8), costs
        self.num_exits, self.num_samples = confidence.shape
        self.extra = costs - costs[0]
        self.samples = np.arange(self.num_samples)
        self.orders = [_descending(c) for c in confidence]
        self.values = [c[order] for c, order in zip(confidence, self.orders, strict=True)]
        self.cuts = [_cuts(values) for values in self.values]

    @classmethod
    def of(cls, table: ExitTable, costs: np.ndarray) -> "_Split":
        return cls(table.confidence, table.correct, costs)

    def subset(self, index: np.ndarray) -> "_Split":
        return _Split(self.confidence[:, index], self.correct[:, index], self.costs)

    def leaves(self, k: int, threshold: float) -> np.ndarray:
        return self.confidence[k] >= threshold

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        leaves = self.confidence >= thresholds[:, None]
        leaves[-1] = True
        return leaves.argmax(0)

    def point(self, thresholds: np.ndarray) -> _Point:
        exits = self.exits(thresholds)
        correct = int(self.correct[exits, self.samples].sum())
        return _Point(thresholds.copy(), correct, mean_cost(exit_counts(exits, self.num_exits), self.costs))

    def threshold(self, k: int, cut: int) -> np.float32:
        """Threshold that lets the ``cut`` most confident samples leave; -inf for all of them, here and elsewhere."""
        if cut == 0:
            return np.float32(np.inf)
        return np.float32(-np.inf) if cut == self.cuts[k][-1] else self.values[k][cut - 1]

    def everybody_first(self) -> np.ndarray:
        """The cheapest thresholds there are: everyone whose confidence is a number leaves at the first exit."""
        return np.full(self.num_exits, -np.inf, dtype=np.float32)

    def nobody_early(self) -> np.ndarray:
        thresholds = np.full(self.num_exits, np.inf, dtype=np.float32)
        thresholds[-1] = -np.inf
        return thresholds

    def ascend(self, thresholds: np.ndarray, price: float, max_sweeps: int = 10) -> np.ndarray:
        """Coordinate ascent of ``sum(correct - price * extra cost)``, an exact line search per exit."""
        thresholds = thresholds.copy()
        value = self.correct - price * self.extra[:, None]
        leaves = [self.leaves(k, t) for k, t in enumerate(thresholds)]
        for _ in range(max_sweeps):
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

    def improve(self, point: _Point, target: _Target, max_sweeps: int = 20) -> _Point:
        """Constrained line searches, exit after exit, until none helps: spends what is left of the budget.

        Starts from any point; the result meets the target if the start does or if moving one threshold at a time can
        get there.
        """
        for _ in range(max_sweeps):
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

    def _line(self, point: _Point, k: int, target: _Target) -> _Point | None:
        """The best point that meets the target when only threshold ``k`` moves."""
        exits = self.exits(point.thresholds)
        order = self.orders[k][exits[self.orders[k]] >= k]  # the samples that get here, surest first
        values = self.confidence[k][order]
        cuts = _cuts(values)
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
        for candidate in rank[allowed[rank]][:4]:
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

    def exits_after(self, k: int, thresholds: np.ndarray) -> np.ndarray:
        """Where each sample would leave if it passed exit ``k``."""
        leaves = self.confidence[k + 1 :] >= thresholds[k + 1 :, None]
        leaves[-1] = True
        return leaves.argmax(0) + k + 1


# ---------------------------------------------------------------------------------------------------------------------
# The methods: each returns the points it found
# ---------------------------------------------------------------------------------------------------------------------


def _solve_msdnet(split: _Split, target: _Target, sweep: str | np.ndarray = "msdnet") -> list[_Point]:
    """The published sweep; of its points the one nearest below the budget, as the papers plot them."""
    shares = sweep_shares(split.num_exits, sweep) if isinstance(sweep, str) else np.atleast_2d(sweep)
    if shares.shape[1] != split.num_exits:
        raise ValueError(f"sweep shares of shape {shares.shape} do not fit {split.num_exits} exits.")
    points = []
    for row in shares:
        thresholds = _msdnet_thresholds(split.confidence, split.orders, row.astype(np.float32))
        points.append(split.point(_closed_as_inf(thresholds)))
    feasible = [p for p in points if target.met(p.correct, p.cost)]
    if target.need is None and feasible:
        return [max(feasible, key=lambda p: p.cost)]
    return feasible or [split.point(split.everybody_first()), split.point(split.nobody_early())]


def _closed_as_inf(thresholds: np.ndarray) -> np.ndarray:
    thresholds = np.where(thresholds == NOBODY, np.float32(np.inf), thresholds)
    thresholds[-1] = -np.inf
    return thresholds


def _solve_shared(split: _Split, target: _Target) -> list[_Point]:
    """One threshold for all exits: every distinct value is tried."""
    sure = np.where(np.isnan(split.confidence), -np.inf, split.confidence)[:-1]
    if len(sure) == 0:
        return [split.point(split.nobody_early())]
    # A sample has left by exit k when its highest confidence so far reaches the threshold.
    so_far = np.maximum.accumulate(sure, axis=0)
    candidates = np.append(np.unique(so_far), np.float32(np.inf))
    correct = np.full(len(candidates), int(split.correct[-1].sum()))
    extra = np.full(len(candidates), split.extra[-1] * split.num_samples)
    before = np.full(split.num_samples, -np.inf)
    for k, now in enumerate(so_far):
        # Those with before < threshold <= now leave here.
        weight = split.correct[k].astype(np.int64) - split.correct[-1]
        leaving = _count_at_least(now, candidates) - _count_at_least(np.minimum(before, now), candidates)
        correct += _count_at_least(now, candidates, weight) - _count_at_least(before, candidates, weight)
        extra += leaving * (split.extra[k] - split.extra[-1])
        before = now
    if target.need is None:
        rank = np.lexsort((extra, -correct))
        allowed = split.costs[0] + extra / split.num_samples <= target.budget * (1 + 1e-9)
    else:
        rank = np.lexsort((-correct, extra))
        allowed = correct >= target.need
    points = [split.point(split.everybody_first())]
    for candidate in rank[allowed[rank]][:4]:
        thresholds = np.full(split.num_exits, candidates[candidate], dtype=np.float32)
        thresholds[-1] = -np.inf
        points.append(split.point(thresholds))
    return points + [split.point(split.nobody_early())]


def _count_at_least(values: np.ndarray, candidates: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """For every candidate, the (weighted) number of values at or above it."""
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(values[order], candidates, side="left")
    if weight is None:
        return len(values) - place
    below = np.concatenate([[0], np.cumsum(weight[order])])
    return below[-1] - below[place]


def _solve_exact(split: _Split, target: _Target) -> list[_Point]:
    """The optimum for up to three exits: all pairs of cuts, by prefix sums. N^2 / 2 additions for three exits."""
    if split.num_exits > 3:
        raise ValueError(f'method "exact" takes up to 3 exits and the table has {split.num_exits}; use "lagrangian".')
    if split.num_exits < 3:
        ends = [split.point(split.everybody_first()), split.point(split.nobody_early())]
        return [split.improve(point, target) for point in ends]
    n = split.num_samples
    first, second = split.orders[0], split.orders[1]
    rank_first = np.empty(n, dtype=np.int32)
    rank_first[first] = np.arange(n)
    rank_second = rank_first[second]  # in the second exit's order, how early each would leave at the first
    cuts = split.cuts[0]
    left_correct = np.concatenate([[0], np.cumsum(split.correct[0][first], dtype=np.int64)])[cuts]
    last = split.correct[2].astype(np.int32)
    stay_correct = int(last.sum()) - np.concatenate([[0], np.cumsum(last[first], dtype=np.int64)])[cuts]
    change = (split.correct[1].astype(np.int32) - last)[second]
    end = np.zeros(n, dtype=bool)  # a cut of the second exit may lie after this sample
    end[split.cuts[1][split.cuts[1] > 0] - 1] = True
    best: tuple | None = None
    rows = max(1, 4_000_000 // n)
    for start in range(0, len(cuts), rows):
        cut = cuts[start : start + rows]
        here = rank_second[None, :] >= cut[:, None]
        leaving = np.cumsum(here, axis=1, dtype=np.int32)
        correct = np.cumsum(np.where(here, change, 0), axis=1, dtype=np.int32)
        leaving = np.pad(leaving, ((0, 0), (1, 0)))
        correct = np.pad(correct, ((0, 0), (1, 0))) + (left_correct + stay_correct)[start : start + rows, None]
        extra = leaving * (split.extra[1] - split.extra[2]) + ((n - cut) * split.extra[2])[:, None]
        possible = np.concatenate([[True], end])
        if target.need is None:
            # Costs to the bit as `mean_cost` has them, since a budget may lie exactly on one.
            cost = np.minimum(split.costs[0] + extra / n, split.costs[-1])
            possible = possible & (cost <= target.budget)
            key = np.where(possible, correct, -1)
            at = np.unravel_index(key.argmax(), key.shape)
            score = (int(key[at]), -float(extra[at])) if key[at] >= 0 else None
        else:
            key = np.where(possible & (correct >= target.need), extra, np.inf)
            at = np.unravel_index(key.argmin(), key.shape)
            score = (-float(key[at]), int(correct[at])) if np.isfinite(key[at]) else None
        if score is not None and (best is None or score > best[0]):
            best = (score, int(cut[at[0]]), int(at[1]))
    points = [split.point(split.everybody_first()), split.point(split.nobody_early())]
    if best is not None:
        thresholds = split.nobody_early()
        thresholds[0] = split.threshold(0, best[1])
        thresholds[1] = split.threshold(1, best[2])
        points.append(split.improve(split.point(thresholds), target))
    return points


def _solve_lagrangian(
    split: _Split, target: _Target, explore_samples: int = 4000, keep: int = 4, seed: int = 0
) -> list[_Point]:
    """Coordinate ascent of the Lagrangian from many starts, then the rest of the budget spent by line searches.

    All starts are tried on at most ``explore_samples`` samples, the ``keep`` best of them polished on all.
    """
    explored = split
    if split.num_samples > explore_samples:
        chosen = np.sort(np.random.default_rng(seed).permutation(split.num_samples)[:explore_samples])
        explored = split.subset(chosen)
    small_target = target
    if target.need is not None:
        small_target = _Target(None, int(np.ceil(target.need / split.num_samples * explored.num_samples)))
    found: list[tuple[_Point, float]] = []
    # The starts themselves are answers too: with fewer degrees of freedom, they are what a held-out split may prefer.
    points = [split.point(split.everybody_first()), split.point(split.nobody_early())]
    for thresholds in _starts(explored, small_target):
        points.append(split.point(thresholds))
        ends = _bisect_price(explored, thresholds, small_target, low=1e-4, high=1e3, steps=9)
        price = ends[-1][0]
        for start in (explored.point(thresholds), *(point for _, point in ends)):
            found.append((explored.improve(start, small_target), price))
    feasible = [f for f in found if small_target.met(f[0].correct, f[0].cost)]
    ranked = sorted(feasible or found, key=lambda f: small_target.score(f[0]), reverse=True)
    if explored is split:
        return [f[0] for f in ranked] + points
    seen: set[tuple[float, ...]] = set()
    for point, price in ranked:
        key = tuple(np.round(_shares(explored, point.thresholds), 2))
        if key in seen:
            continue
        seen.add(key)
        points.append(split.improve(split.point(point.thresholds), target))
        for _, polished in _bisect_price(split, point.thresholds, target, price / 4, price * 4, steps=5):
            points.append(split.improve(polished, target))
        if len(seen) == keep:
            break
    return points


def _shares(split: _Split, thresholds: np.ndarray) -> np.ndarray:
    return exit_counts(split.exits(thresholds), split.num_exits) / split.num_samples


def _bisect_price(
    split: _Split, thresholds: np.ndarray, target: _Target, low: float, high: float, steps: int
) -> list[tuple[float, _Point]]:
    """The two ends of the price bracket around the target, each with its point, found by bisection in log(price)."""
    ends: dict[bool, tuple[float, _Point]] = {}
    scale = 1.0 / split.extra[-1] if split.extra[-1] > 0 else 1.0
    for _ in range(steps):
        price = float(np.sqrt(low * high))
        thresholds = split.ascend(thresholds, price * scale)
        point = split.point(thresholds)
        cheap_enough = point.cost <= target.budget if target.need is None else point.correct < target.need
        ends[cheap_enough] = (price, point)
        if cheap_enough:
            high = price
        else:
            low = price
    return list(ends.values())


def _starts(split: _Split, target: _Target, num_subset: int = 12) -> list[np.ndarray]:
    """Continuous p over every subset of the exits (over pairs and the whole for many exits), and a shared threshold."""
    early = range(split.num_exits - 1)
    sizes = early if split.num_exits <= 5 else (0, 1, split.num_exits - 2)
    starts = [split.everybody_first(), split.nobody_early()]
    shared = target.best(_solve_shared(split, target))
    if shared is not None:
        starts.append(shared.thresholds)
    for size in sizes:
        for subset in combinations(early, size + 1):
            tries = 4 * num_subset if len(subset) == split.num_exits - 1 else num_subset
            points = [
                split.point(
                    _closed_as_inf(_msdnet_thresholds(split.confidence, split.orders, _open_shares(split, p, subset)))
                )
                for p in np.geomspace(0.02, 5.0, tries)
            ]
            best = target.best(points)
            if best is not None:
                starts.append(best.thresholds)
    return starts


def _open_shares(split: _Split, p: float, subset: tuple[int, ...]) -> np.ndarray:
    shares = np.zeros(split.num_exits)
    shares[list(subset)] = p ** np.arange(1, len(subset) + 1)
    shares[-1] = p ** (len(subset) + 1)
    return (shares / shares.sum()).astype(np.float32)


def _solve_genetic(
    split: _Split, target: _Target, population: int = 60, generations: int = 100, seed: int = 0, mutation: float = 0.1
) -> list[_Point]:
    """Genetic algorithm, as DVT's paper solves its thresholds (section 3.3): maximise accuracy within the budget.

    A gene is a quantile of one exit's confidences. Tournament selection, blend crossover, Gaussian mutation, the best
    kept; individuals over the budget rank below all others, by how much they overspend.
    """
    if population < 4 or generations < 1:
        raise ValueError(f"expected population >= 4 and generations >= 1, got {population} and {generations}.")
    rng = np.random.default_rng(seed)
    genes_per = split.num_exits - 1

    def thresholds_of(genes: np.ndarray) -> np.ndarray:
        thresholds = split.nobody_early()
        for k, gene in enumerate(genes):
            cuts = split.cuts[k]
            cut = cuts[min(np.searchsorted(cuts, gene * split.num_samples), len(cuts) - 1)]
            thresholds[k] = split.threshold(k, cut)
        return thresholds

    def fitness(point: _Point) -> tuple[float, float, float]:
        if target.met(point.correct, point.cost):
            return (1.0, *target.score(point))
        return (0.0, -point.cost if target.need is None else point.correct, 0.0)

    genes = rng.random((population, genes_per))
    genes[0], genes[1] = 1.0, 0.0  # everybody at the first exit, nobody before the last: one of them meets any target
    points = [split.point(thresholds_of(g)) for g in genes]
    for _ in range(generations if genes_per else 0):
        order = sorted(range(population), key=lambda i: fitness(points[i]), reverse=True)
        rank = np.empty(population, dtype=int)
        rank[order] = np.arange(population)
        elite = max(1, population // 20)
        pairs = rng.integers(population, size=(population - elite, 2, 2))
        parents = np.where(rank[pairs[..., 0]] < rank[pairs[..., 1]], pairs[..., 0], pairs[..., 1])
        blend = rng.uniform(-0.25, 1.25, (population - elite, genes_per))
        children = blend * genes[parents[:, 0]] + (1 - blend) * genes[parents[:, 1]]
        mutate = rng.random(children.shape) < max(mutation, 1 / genes_per)
        children = np.clip(children + mutate * rng.normal(0, 0.1, children.shape), 0, 1)
        kept = order[:elite]
        genes = np.concatenate([genes[kept], children])
        points = [points[i] for i in kept] + [split.point(thresholds_of(g)) for g in children]
    return [*points, split.point(split.everybody_first())]


METHODS: dict[str, Callable[..., list[_Point]]] = {
    "exact": _solve_exact,
    "lagrangian": _solve_lagrangian,
    "msdnet": _solve_msdnet,
    "genetic": _solve_genetic,
    "shared": _solve_shared,
}


# ---------------------------------------------------------------------------------------------------------------------
# The door
# ---------------------------------------------------------------------------------------------------------------------


def solve_thresholds(
    table: ExitTable,
    costs: Sequence[float] | np.ndarray,
    budget: float | None = None,
    accuracy: float | None = None,
    method: str = "lagrangian",
    model: nn.Module | dict[str, Any] | None = None,
    holdout: ExitTable | None = None,
    **options: Any,
) -> ExitPolicy:
    """Thresholds for ``table`` that are as accurate as possible within ``budget``, or as cheap as ``accuracy`` allows.

    Solve on samples the model was not trained on: on training images it is surer than it will be, and the budget
    will not hold.

    Args:
        table: K exits, N labelled samples.
        costs: (K,) cumulative cost of each exit, in any unit: ``exit_costs(...).macs``, ``exit_latency(...)``.
        budget: highest mean cost per sample, in the unit of ``costs``. Never exceeded on ``table``.
        accuracy: lowest accuracy on ``table``, a fraction in [0, 1]. Give exactly one of the two.
        method: ``lagrangian`` (default), ``exact`` (the optimum, K <= 3), ``shared`` (one threshold for all exits),
            ``msdnet`` (Huang et al. 2018, section 4.2; the point of its sweep nearest below the budget; option
            ``sweep``: ``msdnet``, ``dyn_perceiver`` or shares (P, K)), ``genetic`` (DVT, section 3.3; options
            ``population``, ``generations``, ``mutation``, ``seed``).
        model: the model, or what ``describe_model`` said of it; the policy then runs on no other. Default the one the
            table was collected from, if it knows.
        holdout: further samples that choose among the solutions whose accuracy on ``table`` is within one standard
            error of the best; the budget still holds on ``table``.
        options: of the method.

    Returns:
        ExitPolicy with the measure and temperatures of the table; ``source`` records how it was solved and what it
        got and spent on ``table``.

    Raises:
        ValueError: an empty table, an unknown method, or a target out of reach; the message names the nearest one.
    """
    costs = check_costs(costs, table.num_exits)
    if (budget is None) == (accuracy is None):
        raise ValueError("give either budget= or accuracy=, and not both.")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if table.num_samples == 0:
        raise ValueError("the table holds no samples; thresholds are solved on a labelled calibration split.")
    split = _Split.of(table, costs)
    target = _target(split, budget, accuracy)
    try:
        points = METHODS[method](split, target, **options)
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            raise TypeError(f"method {method!r} does not take the option: {error}") from error
        raise
    best = target.best(points)
    if best is None:
        highest = max(point.correct for point in points) / split.num_samples
        raise ValueError(
            f"accuracy {accuracy} is out of reach: the best that {method!r} found on this table is {highest:.4f}."
        )
    if holdout is not None:
        best = _choose_on(holdout, points, best, split, target)
    source = {
        "method": method,
        "target": {"budget": float(budget)} if accuracy is None else {"accuracy": float(accuracy)},
        "samples": SampleRecord.of(table.sample, table.num_samples).to_json(),
        "sha256": table.digest(),
        "accuracy": best.correct / split.num_samples,
        "cost": best.cost,
        "shares": [float(share) for share in _shares(split, best.thresholds)],
    }
    if holdout is not None:
        source["holdout_samples"] = SampleRecord.of(holdout.sample, holdout.num_samples).to_json()
    if options:
        source["options"] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return ExitPolicy(
        thresholds=best.thresholds,
        measure=table.measure,
        temperatures=np.array(table.temperatures),
        costs=costs,
        model=_model_of(table, model),
        source=source,
    )


def _model_of(table: ExitTable, model: nn.Module | dict[str, Any] | None) -> dict[str, Any] | None:
    """What the policy remembers of its model: what the caller says, and what the table knows."""
    about = table.about or {}
    described = describe_model(model) if isinstance(model, nn.Module) else model
    if described is None:
        described = about.get("model")
    elif about.get("model") is not None:
        check_same_model(described, about["model"], "the table")
        described = about["model"] | {key: value for key, value in described.items() if value is not None}
    if described is None:
        return None
    return {key: about[key] for key in ("weights", "input_size", "classes") if about.get(key) is not None} | described


def _target(split: _Split, budget: float | None, accuracy: float | None) -> _Target:
    if budget is not None:
        if budget == np.inf:
            raise ValueError(
                f"a budget is a finite number; for no limit give the last exit's cost, {split.costs[-1]:.6g}."
            )
        least = split.point(split.everybody_first()).cost
        if not budget >= least:
            raise ValueError(
                f"a budget of {budget:.6g} cannot be met: the least possible mean cost on this table is {least:.6g}"
                + (" (the first exit)." if least == split.costs[0] else " (some confidences are NaN and never leave).")
            )
        return _Target(float(budget), None)
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy is a fraction between 0 and 1, got {accuracy}.")
    return _Target(None, int(np.ceil(accuracy * split.num_samples - 1e-9)))


def _choose_on(holdout: ExitTable, points: list[_Point], best: _Point, split: _Split, target: _Target) -> _Point:
    """Of the points as good as the best, up to one standard error of the paired difference, the best on ``holdout``."""
    if holdout.num_exits != split.num_exits or holdout.num_samples == 0:
        raise ValueError(
            f"a holdout of {holdout.num_exits} exits and {holdout.num_samples} samples does not fit a table of "
            f"{split.num_exits} exits."
        )
    other = _Split.of(holdout, split.costs)
    right = split.correct[split.exits(best.thresholds), split.samples]
    near = []
    for point in points:
        if not target.met(point.correct, point.cost):
            continue
        differ = int((split.correct[split.exits(point.thresholds), split.samples] != right).sum())
        # With an accuracy asked for, near-equal means near-equal cost.
        if target.need is None:
            equal = best.correct - point.correct <= np.sqrt(differ)
        else:
            equal = point.cost <= best.cost + 0.005 * split.extra[-1]
        if equal:
            near.append(point)
    return max(near, key=lambda p: (other.point(p.thresholds).correct, target.score(p)))


def _spend(split: _Split, thresholds: np.ndarray, budget: float) -> np.ndarray:
    """Thresholds raised, by shrinking the share each lets leave by one factor, until ``budget`` is spent."""

    def raised(factor: float) -> np.ndarray:
        found = thresholds.copy()
        for k, threshold in enumerate(thresholds[:-1]):
            cuts = split.cuts[k]
            goal = factor * np.count_nonzero(split.confidence[k] >= threshold)
            cut = cuts[max(np.searchsorted(cuts, goal, side="right") - 1, 0)]
            found[k] = max(threshold, split.threshold(k, cut))
        return found

    low, high = 0.0, 1.0  # raised(1) is where it starts, raised(0) closes every exit
    for _ in range(12):
        middle = (low + high) / 2
        if split.point(raised(middle)).cost <= budget:
            high = middle
        else:
            low = middle
    return raised(high)


def policy_path(
    table: ExitTable,
    costs: Sequence[float] | np.ndarray,
    steps: int = 33,
    method: str = "lagrangian",
    model: nn.Module | dict[str, Any] | None = None,
    **options: Any,
) -> list[ExitPolicy]:
    """Policies from the cheapest (everybody leaves at the first exit) to the fullest (nobody leaves early).

    The budgets in between are spaced evenly. No threshold ever falls along the path, so each sample leaves no earlier
    under a later policy: solved thresholds are raised to the highest of those before them, and where more budget buys
    no accuracy on ``table`` the exits close at one pace. This is what ``exits.risk`` walks along.
    """
    costs = check_costs(costs, table.num_exits)
    if steps < 2:
        raise ValueError(f"a path has at least two policies, got steps={steps}.")
    if table.num_samples == 0:
        raise ValueError("the table holds no samples; a path is solved on a labelled calibration split.")
    split = _Split.of(table, costs)
    lowest = split.everybody_first()
    least = split.point(lowest).cost
    path = [lowest]
    for budget in np.linspace(least, costs[-1], steps)[1:-1]:
        solved = solve_thresholds(table, costs, budget=float(budget), method=method, **options)
        path.append(_spend(split, np.maximum(path[-1], solved.thresholds), float(budget)))
    path.append(split.nobody_early())
    policies, digest = [], table.digest()
    described, samples = _model_of(table, model), SampleRecord.of(table.sample, table.num_samples).to_json()
    for step, thresholds in enumerate(path):
        point = split.point(thresholds)
        policies.append(
            ExitPolicy(
                thresholds=thresholds,
                measure=table.measure,
                temperatures=np.array(table.temperatures),
                costs=costs,
                model=described,
                source={
                    "method": method,
                    "path": {"step": step, "of": steps},
                    "samples": samples,
                    "sha256": digest,
                    "accuracy": point.correct / split.num_samples,
                    "cost": point.cost,
                    "shares": [float(share) for share in _shares(split, thresholds)],
                },
            )
        )
    return policies
