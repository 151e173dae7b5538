"""Searches over two thresholds at once: where moving one alone breaks the target or gains nothing, two can still gain.

A line search stops where the budget is spent: one exit could give what another would use better, but only both moves
together keep to the target. With three exits there are two thresholds, and a search over all their pairs of cuts is the
optimum.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .split import Point, Split, Target

__all__ = ["refine"]

# Cuts of one exit that are looked at together: all of them on small tables. On larger ones a half of it, evenly spaced,
# and then as many around the best of these. A pair's sums are four arrays of the square of it.
_CUTS = 500
# Rounds over all pairs; the first that moves nothing ends it.
_ROUNDS = 4
# Sums of costs carry rounding: so many of the best pairs are evaluated exactly.
_CANDIDATES = 4


def refine(split: Split, point: Point, target: Target) -> Point:
    """The best point found from ``point`` by moving two thresholds at a time, and then one, until neither helps."""
    for _ in range(_ROUNDS):
        before = point
        for first, second in combinations(range(split.num_exits - 1), 2):
            found = _best_pair(split, point, first, second, target)
            if found is not None and (
                not target.met(point.correct, point.cost) or target.score(found) > target.score(point)
            ):
                point = found
        if point is before:
            break
        point = split.improve(point, target)
    return point


def _best_pair(split: Split, point: Point, first: int, second: int, target: Target) -> Point | None:
    """The best point found that meets the target when thresholds ``first`` < ``second`` move and all others stay."""
    every = [split.cuts[first], split.cuts[second]]
    spread = [cuts if len(cuts) <= _CUTS else cuts[_evenly(0, len(cuts) - 1)] for cuts in every]
    found = _best_in_plane(split, point, first, second, spread, target)
    if all(few is cuts for few, cuts in zip(spread, every, strict=True)):
        return found
    if found is None:
        return None
    near = []
    for k, few, cuts in zip((first, second), spread, every, strict=True):
        here = int(np.searchsorted(few, np.count_nonzero(split.leaves(k, found.thresholds[k]))))
        ends = np.searchsorted(cuts, few[[max(here - 1, 0), min(here + 1, len(few) - 1)]])
        near.append(cuts[_evenly(*ends)])
    return target.best(p for p in (found, _best_in_plane(split, point, first, second, near, target)) if p is not None)


def _evenly(start: int, stop: int) -> NDArray[np.int64]:
    """Places from ``start`` to ``stop``, both with them: all, or half of ``_CUTS`` at even distances."""
    count = stop - start + 1
    return np.unique(np.linspace(start, stop, count if count <= _CUTS else _CUTS // 2).round().astype(np.int64))


def _best_in_plane(
    split: Split, point: Point, first: int, second: int, cuts: Sequence[NDArray[np.int64]], target: Target
) -> Point | None:
    """The best point that meets the target, of all pairs of ``cuts`` (M,), (L,) of the two exits; the rest stays.

    Every sample that gets to ``first`` leaves there, or at an exit between the two, or at ``second``, or behind it. Its
    gain is summed where it would fall in the plane of the two cuts, and running sums give all pairs at once.
    """
    cuts_first, cuts_second = cuts
    bin_first, bin_second = _bins(split, first, cuts_first), _bins(split, second, cuts_second)
    thresholds = point.thresholds.copy()
    thresholds[[first, second]] = np.inf
    # Where each sample leaves when both are closed, and whether that is before, between or behind them.
    closed = split.exits(thresholds)
    reaches, passes = closed >= first, closed > second
    at = split.samples
    # Whoever leaves at the first in place of where it would, and at the second in place of behind it.
    gains = []
    for worth, base in (
        (split.correct.astype(np.int64), int(split.correct[closed, at].sum())),
        (np.broadcast_to(split.extra[:, None], split.correct.shape), float(split.extra[closed].sum())),
    ):
        behind = worth[closed, at]
        left = _up_to(bin_first[reaches], (worth[first] - behind)[reaches], len(cuts_first))
        plane = np.bincount(
            bin_first[passes] * (len(cuts_second) + 1) + bin_second[passes],
            weights=(worth[second] - behind)[passes],
            minlength=(len(cuts_first) + 1) * (len(cuts_second) + 1),
        ).reshape(len(cuts_first) + 1, len(cuts_second) + 1)
        # Who is still there after cut i of the first (later rows) and leaves by cut j of the second (columns so far).
        after = plane.sum(0, keepdims=True) - np.cumsum(plane, axis=0)
        gains.append(base + left[:, None] + np.cumsum(after, axis=1)[:-1, :-1])
    correct, extra = np.rint(gains[0]), gains[1]
    if target.need is None:
        room = (target.budget - split.costs[0]) * split.num_samples
        slack = 1e-9 * split.extra[-1] * split.num_samples
        allowed = extra <= room + slack if target.budget < split.costs[-1] else np.ones(extra.shape, dtype=bool)
        if not allowed.any():
            return None
        most = correct[allowed].max()
        chosen = np.flatnonzero(allowed & (correct == most))
        chosen = chosen[np.argsort(extra.ravel()[chosen], kind="stable")]
    else:
        chosen = np.flatnonzero(correct >= target.need)
        chosen = chosen[np.lexsort((-correct.ravel()[chosen], extra.ravel()[chosen]))]
    for candidate in chosen[:_CANDIDATES]:
        row, column = np.unravel_index(candidate, correct.shape)
        thresholds[first] = split.threshold(first, int(cuts_first[row]))
        thresholds[second] = split.threshold(second, int(cuts_second[column]))
        found = split.point(thresholds)
        if target.met(found.correct, found.cost):
            return found
    return None


def _bins(split: Split, k: int, cuts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each sample (N,) the first of ``cuts`` of exit ``k`` by which it leaves."""
    place = np.empty(split.num_samples, dtype=np.int64)
    place[split.orders[k]] = split.samples
    return np.searchsorted(cuts, place, side="right")


def _up_to(bins: NDArray[np.int64], weights: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """For each of ``count`` cuts the sum of the weights of those who leave by it."""
    sums = np.bincount(bins, weights=weights, minlength=count + 1)
    return np.cumsum(sums, dtype=np.float64)[:count]
