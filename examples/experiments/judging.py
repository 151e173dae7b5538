"""Whether one network is better than another: differences paired by seed, and curves compared at equal cost.

"Better" is a one-sided test at 5 %. Over several seeds it is Student's t on the differences of each seed; all seeds see
the same test images, so it says what another seed would give on them, not what other images would. With a single seed
nothing is known of seeds: there the difference has to stand out from what the draw of the test images does to it,
counted as if the two networks erred independently of each other, which is more than they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from base import Result, mean_and_error, percent
from scipy import stats

LEVEL = 0.95


def by_chance(accuracies: Sequence[float], images: int) -> float:
    """Standard error that the draw of the test images gives the difference of two accuracies, not paired."""
    return float(np.sqrt(sum(share * (1 - share) for share in accuracies) / images))


@dataclass(frozen=True)
class Difference:
    """Of two networks, in shares: one value a seed.

    Attributes:
        values: (seeds,).
        chance: what ``by_chance`` says of one value; asked only where there is a single seed.
    """

    values: Sequence[float]
    chance: float | None = None

    @property
    def mean(self) -> float:
        return mean_and_error(self.values)[0]

    @property
    def reach(self) -> float:
        """How far from the mean the one-sided limit of confidence is; infinite where nothing is known of it."""
        error = mean_and_error(self.values)[1]
        if error is not None:
            return float(stats.t.ppf(LEVEL, len(self.values) - 1)) * error
        return float(stats.norm.ppf(LEVEL)) * self.chance if self.chance is not None else np.inf

    def above(self, margin: float = 0.0) -> bool:
        return self.mean - self.reach > margin

    def below(self, margin: float = 0.0) -> bool:
        return self.mean + self.reach < margin

    def __str__(self) -> str:
        """In points, with the standard error over seeds."""
        return percent(*mean_and_error(self.values), sign=True)


def of_seeds(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    """The results of the seeds that both have, by pairs."""
    theirs = {result["seed"]: result for result in second}
    return [
        (result, theirs[result["seed"]])
        for result in sorted(first, key=lambda result: result["seed"])
        if result["seed"] in theirs
    ]


def paired(first: Sequence[Result], second: Sequence[Result], exit_index: int = -1) -> Difference | None:
    """accuracy(first) - accuracy(second) at an exit, over the seeds that both have; None if there is no such seed."""
    pairs = [
        (ours["exits"][exit_index]["accuracy"], theirs["exits"][exit_index]["accuracy"])
        for ours, theirs in of_seeds(first, second)
    ]
    images = first[0].get("test_images") if first else None
    return _of_pairs(pairs, images) if pairs else None


def _of_pairs(pairs: Sequence[tuple[float, float]], images: int | None) -> Difference:
    return Difference([a - b for a, b in pairs], by_chance(pairs[0], images) if images else None)


# ---------------------------------------------------------------------------------------------------------------------
# Curves: rows of cost and accuracy, and of whatever else, (2 or more, N)
# ---------------------------------------------------------------------------------------------------------------------

Curve = np.ndarray


def budget_curve(result: Result, key: str = "budgeted") -> Curve:
    """(2, N): cost and accuracy of a run's budgets."""
    return np.array(sorted((point["cost"], point["accuracy"]) for point in result[key])).T


def frontier(points: Sequence[Sequence[float]]) -> Curve:
    """The points (cost, accuracy, ...) that no cheaper one is as accurate as, by cost."""
    best: list[Sequence[float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):  # of equal costs the best first
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return np.array(best).T


@dataclass(frozen=True)
class Comparison:
    """How far some curves are above others at the same costs.

    Attributes:
        costs: (N,), the same for all seeds.
        gains: (seeds, N), differences of accuracy.
        chance: of one of them, for a single seed.
    """

    costs: np.ndarray
    gains: np.ndarray
    chance: float | None = None

    @property
    def mean(self) -> Difference:
        """Over the costs."""
        return Difference(self.gains.mean(1).tolist(), self.chance)

    @property
    def at_costs(self) -> list[Difference]:
        return [Difference(column, self.chance) for column in self.gains.T.tolist()]

    @property
    def least(self) -> float:
        """Over the costs, of the mean over seeds."""
        return float(self.gains.mean(0).min())

    @property
    def most(self) -> float:
        return float(self.gains.mean(0).max())

    def above(self, margin: float = 0.0) -> bool:
        """At every one of the costs, and in the mean by more than seeds (or images) explain."""
        return self.least > margin and self.mean.above(margin)

    def below(self) -> bool:
        return self.most < 0 and self.mean.below()

    def cells(self, unit: float = 1e6, digits: int = 0) -> list[Any]:
        """For a table: the costs compared, and the least, mean and most of the gain in points."""
        reach = " to ".join(f"{cost / unit:.{digits}f}" for cost in (self.costs[0], self.costs[-1]))
        return [reach, percent(self.least, sign=True), str(self.mean), percent(self.most, sign=True)]


def compare(
    ours: Sequence[Curve],
    theirs: Sequence[Curve],
    part: tuple[float, float] = (0.0, 1.0),
    points: int = 9,
    images: int | None = None,
) -> Comparison | None:
    """Curves against curves, a pair for each seed, at costs that all of them cover; None if there are none.

    Between two points of a curve lies what some images answered by one and the others by the other give.

    Args:
        ours, theirs: (2, N) each, ascending costs; see ``frontier``.
        part: of the range of costs that all cover.
        points: number of costs.
        images: of the test set.
    """
    low = max(curve[0][0] for curve in (*ours, *theirs))
    high = min(curve[0][-1] for curve in (*ours, *theirs))
    if high <= low:
        return None
    costs = np.linspace(low + part[0] * (high - low), low + part[1] * (high - low), points)
    accuracies = [np.array([np.interp(costs, *curve[:2]) for curve in curves]) for curves in (ours, theirs)]
    chance = by_chance([float(found[0].mean()) for found in accuracies], images) if images else None
    return Comparison(costs, accuracies[0] - accuracies[1], chance)


MIDDLE = (0.25, 0.75)  # the middle half of the range
