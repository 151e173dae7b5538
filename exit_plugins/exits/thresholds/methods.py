"""The methods: each takes a split and a target, and returns the points it found, feasible or not."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .msdnet import closed_as_inf, rule, sweep_shares
from .pairs import refine
from .split import Point, Split, Target, exit_shares

__all__ = ["METHODS"]

# Where the numbers below come from: the papers name theirs; ours trade the solver's time for its answer, and what they
# cost in accuracy is what examples/benchmarks/solvers.py shows beside the optimum.

# Lagrangian. On this many samples an accuracy is known to within 0.8 points (one standard error), which tells good
# starts from bad ones; only as many of the best as follow are polished on all samples.
_EXPLORED = 4000
_POLISHED = 4
# Of so many exits, and no more samples than are explored, the optimum itself is found.
_OPTIMAL_EXITS = 3
# Samples times pairs of exits up to which pairs are searched on all samples: a second or two.
_REFINED = 2_000_000
# What the whole range of costs is worth, in correct answers a sample: at the lowest price accuracy alone counts, at the
# highest cost alone. Bisected in the logarithm: 9 halvings of seven decades leave 3 %, 5 of a factor of 16 leave 9 %.
_PRICES = (1e-4, 1e3)
_PRICE_STEPS = 9
_POLISH_FACTOR = 4
_POLISH_STEPS = 5
# Shares in proportion to p**k, as in MSDNet's rule, from nearly everybody at the first exit to nearly all at the last.
_START_P = (0.02, 5.0)
_START_TRIES = 12
# Sums run over many samples carry rounding: so many of the best candidates are evaluated exactly.
_CANDIDATES = 4
# Exact: entries of one block of pairs of cuts, 16 MB of int32.
_BLOCK = 4_000_000
# Genetic. DVT's paper names the algorithm and none of its numbers (section 3.3); these are ours. Blend crossover goes a
# quarter beyond the parents on either side (Muehlenbein, Schlierkamp-Voosen 1993), mutation moves a gene, a quantile,
# by a tenth, and one in twenty survives.
_BEYOND = 0.25
_MUTATION = 0.1
_ELITE = 20


def _solve_msdnet(split: Split, target: Target, sweep: str | NDArray[Any] = "msdnet") -> list[Point]:
    """The published sweep; of its points the one nearest below the budget, as the papers plot them."""
    shares = sweep_shares(split.num_exits, sweep) if isinstance(sweep, str) else np.atleast_2d(sweep)
    if shares.shape[1] != split.num_exits:
        raise ValueError(f"sweep shares of shape {shares.shape} do not fit {split.num_exits} exits.")
    points = []
    for row in shares:
        thresholds = rule(split.confidence, split.orders, row.astype(np.float32))
        points.append(split.point(closed_as_inf(thresholds)))
    feasible = [p for p in points if target.met(p.correct, p.cost)]
    if target.need is None and feasible:
        return [max(feasible, key=lambda p: p.cost)]
    return feasible or [split.point(split.everybody_first()), split.point(split.nobody_early())]


def _solve_shared(split: Split, target: Target) -> list[Point]:
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
    for candidate in rank[allowed[rank]][:_CANDIDATES]:
        thresholds = np.full(split.num_exits, candidates[candidate], dtype=np.float32)
        thresholds[-1] = -np.inf
        points.append(split.point(thresholds))
    return points + [split.point(split.nobody_early())]


def _count_at_least(values: NDArray[Any], candidates: NDArray[Any], weight: NDArray[Any] | None = None) -> NDArray[Any]:
    """For every candidate, the (weighted) number of values at or above it."""
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(values[order], candidates, side="left")
    # The sum of the weights below every place, and of all of them.
    below: NDArray[Any] = np.arange(len(values) + 1)
    if weight is not None:
        below = np.concatenate([[0], np.cumsum(weight[order])])
    count: NDArray[Any] = below[-1] - below[place]
    return count


def _solve_exact(split: Split, target: Target) -> list[Point]:
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
    best: tuple[tuple[float, float], int, int] | None = None
    rows = max(1, _BLOCK // n)
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
            score: tuple[float, float] | None = (int(key[at]), -float(extra[at])) if key[at] >= 0 else None
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


def _solve_lagrangian(split: Split, target: Target, seed: int = 0) -> list[Point]:
    """Coordinate ascent of the Lagrangian from many starts, the rest of the budget spent by line searches, then pairs.

    All starts are tried on some thousands of the samples at most, drawn by ``seed``; the best are polished on all.
    Where the optimum itself is cheap, as for three exits of no more samples than that, it is found beside them.
    """
    explored = split
    if split.num_samples > _EXPLORED:
        chosen = np.sort(np.random.default_rng(seed).permutation(split.num_samples)[:_EXPLORED])
        explored = split.subset(chosen)
    small_target = target
    if target.need is not None:
        small_target = Target(need=int(np.ceil(target.need / split.num_samples * explored.num_samples)))
    found: list[tuple[Point, float]] = []
    # The starts themselves are answers too: with fewer degrees of freedom, they are what a held-out split may prefer.
    points = [split.point(split.everybody_first()), split.point(split.nobody_early())]
    for thresholds in _starts(explored, small_target):
        points.append(split.point(thresholds))
        ends = _bisect_price(explored, thresholds, small_target, *_PRICES, steps=_PRICE_STEPS)
        price = ends[-1][0]
        for start in (explored.point(thresholds), *(point for _, point in ends)):
            found.append((explored.improve(start, small_target), price))
    feasible = [f for f in found if small_target.met(f[0].correct, f[0].cost)]
    ranked = sorted(feasible or found, key=lambda f: small_target.score(f[0]), reverse=True)
    if explored is split:
        if split.num_exits <= _OPTIMAL_EXITS:
            refined = _solve_exact(split, target)
        else:
            refined = [refine(split, point, target) for point in _distinct([f[0] for f in ranked])[:_POLISHED]]
        return [*refined, *(f[0] for f in ranked), *points]
    seen: set[tuple[float, ...]] = set()
    for point, price in ranked:
        key = tuple(np.round(exit_shares(explored, point.thresholds), 2))
        if key in seen:
            continue
        seen.add(key)
        points.append(split.improve(split.point(point.thresholds), target))
        for _, polished in _bisect_price(
            split, point.thresholds, target, price / _POLISH_FACTOR, price * _POLISH_FACTOR, steps=_POLISH_STEPS
        ):
            points.append(split.improve(polished, target))
        if len(seen) == _POLISHED:
            break
    best = target.best(points)
    pairs = split.num_exits * (split.num_exits - 1) // 2
    if best is not None and split.num_samples * pairs <= _REFINED:
        points.append(refine(split, best, target))
    return points


def _distinct(points: list[Point]) -> list[Point]:
    """Of points in order the first of each outcome."""
    return list({(point.correct, point.cost): point for point in reversed(points)}.values())[::-1]


def _bisect_price(
    split: Split, thresholds: NDArray[Any], target: Target, low: float, high: float, steps: int
) -> list[tuple[float, Point]]:
    """The two ends of the price bracket around the target, each with its point, found by bisection in log(price)."""
    ends: dict[bool, tuple[float, Point]] = {}
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


def _starts(split: Split, target: Target) -> list[NDArray[Any]]:
    """Continuous p over every subset of the exits (over pairs and the whole for many exits), and a shared threshold."""
    early = range(split.num_exits - 1)
    sizes = early if split.num_exits <= 5 else (0, 1, split.num_exits - 2)
    starts = [split.everybody_first(), split.nobody_early()]
    shared = target.best(_solve_shared(split, target))
    if shared is not None:
        starts.append(shared.thresholds)
    for size in sizes:
        for subset in combinations(early, size + 1):
            tries = 4 * _START_TRIES if len(subset) == split.num_exits - 1 else _START_TRIES
            points = [
                split.point(closed_as_inf(rule(split.confidence, split.orders, _open_shares(split, p, subset))))
                for p in np.geomspace(*_START_P, tries)
            ]
            best = target.best(points)
            if best is not None:
                starts.append(best.thresholds)
    return starts


def _open_shares(split: Split, p: float, subset: tuple[int, ...]) -> NDArray[Any]:
    shares = np.zeros(split.num_exits)
    shares[list(subset)] = p ** np.arange(1, len(subset) + 1)
    shares[-1] = p ** (len(subset) + 1)
    return np.asarray(shares / shares.sum(), dtype=np.float32)


def _solve_genetic(
    split: Split, target: Target, population: int = 60, generations: int = 100, seed: int = 0, mutation: float = 0.1
) -> list[Point]:
    """Genetic algorithm, as DVT's paper solves its thresholds (section 3.3): maximise accuracy within the budget.

    A gene is a quantile of one exit's confidences. Tournament selection, blend crossover, Gaussian mutation, the best
    kept; individuals over the budget rank below all others, by how much they overspend.
    """
    if population < 4 or generations < 1:
        raise ValueError(f"expected population >= 4 and generations >= 1, got {population} and {generations}.")
    rng = np.random.default_rng(seed)
    genes_per = split.num_exits - 1

    def thresholds_of(genes: NDArray[Any]) -> NDArray[Any]:
        thresholds = split.nobody_early()
        for k, gene in enumerate(genes):
            cuts = split.cuts[k]
            cut = cuts[min(np.searchsorted(cuts, gene * split.num_samples), len(cuts) - 1)]
            thresholds[k] = split.threshold(k, cut)
        return thresholds

    def fitness(point: Point) -> tuple[float, float, float]:
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
        elite = max(1, population // _ELITE)
        pairs = rng.integers(population, size=(population - elite, 2, 2))
        parents = np.where(rank[pairs[..., 0]] < rank[pairs[..., 1]], pairs[..., 0], pairs[..., 1])
        blend = rng.uniform(-_BEYOND, 1 + _BEYOND, (population - elite, genes_per))
        children = blend * genes[parents[:, 0]] + (1 - blend) * genes[parents[:, 1]]
        mutate = rng.random(children.shape) < max(mutation, 1 / genes_per)
        children = np.clip(children + mutate * rng.normal(0, _MUTATION, children.shape), 0, 1)
        kept = order[:elite]
        genes = np.concatenate([genes[kept], children])
        points = [points[i] for i in kept] + [split.point(thresholds_of(g)) for g in children]
    return [*points, split.point(split.everybody_first())]


METHODS: dict[str, Callable[..., list[Point]]] = {
    "exact": _solve_exact,
    "lagrangian": _solve_lagrangian,
    "msdnet": _solve_msdnet,
    "genetic": _solve_genetic,
    "shared": _solve_shared,
}
