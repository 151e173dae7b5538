"""Paths of policies, from cheap to full: what certificates and controllers of the budget walk along."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..costs import check_costs
from ..policy import ExitPolicy
from ..protocol import AnyModel
from ..table import ExitTable, check_not_empty
from .solve import PolicyMaker, solve_thresholds
from .split import Split

__all__ = ["policy_path"]

_HALVINGS = 12  # of the factor between 0 and 1 that spends a budget: to a four-thousandth, finer than most tables' cuts


def policy_path(
    table: ExitTable,
    costs: Sequence[float] | NDArray[Any],
    steps: int = 33,
    method: str = "lagrangian",
    model: AnyModel | Mapping[str, Any] | None = None,
    **options: Any,
) -> list[ExitPolicy]:
    """Policies from the cheapest (everybody leaves at the first exit) to the fullest (nobody leaves early).

    The budgets in between are spaced evenly. No threshold ever falls along the path, so each sample leaves no earlier
    under a later policy: solved thresholds are raised to the highest of those before them, and where more budget buys
    no accuracy on ``table`` the exits close at one pace. This is what ``exits.risk`` walks along.

    Raises:
        ValueError: fewer than two steps, or a table without samples.
    """
    check_not_empty(table, "a path is solved on a labelled calibration split")
    costs = check_costs(costs, table.num_exits)
    if steps < 2:
        raise ValueError(f"a path has at least two policies, got steps={steps}.")
    split = Split.of(table, costs)
    lowest = split.everybody_first()
    least = split.point(lowest).cost
    path = [lowest]
    for budget in np.linspace(least, costs[-1], steps)[1:-1]:
        solved = solve_thresholds(table, costs, budget=float(budget), method=method, **options)
        path.append(_spend(split, np.maximum(path[-1], solved.thresholds), float(budget)))
    path.append(split.nobody_early())
    make = PolicyMaker(table, split, model, costs)
    return [
        make(split.point(thresholds), {"method": method, "path": {"step": step, "of": steps}})
        for step, thresholds in enumerate(path)
    ]


def _spend(split: Split, thresholds: NDArray[Any], budget: float) -> NDArray[Any]:
    """Thresholds raised, by shrinking the share each lets leave by one factor, until ``budget`` is spent."""

    def raised(factor: float) -> NDArray[Any]:
        found = thresholds.copy()
        for k, threshold in enumerate(thresholds[:-1]):
            cuts = split.cuts[k]
            goal = factor * np.count_nonzero(split.confidence[k] >= threshold)
            cut = cuts[max(int(np.searchsorted(cuts, goal, side="right")) - 1, 0)]
            found[k] = max(threshold, split.threshold(k, cut))
        return found

    low, high = 0.0, 1.0  # raised(1) is where it starts, raised(0) closes every exit
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if split.point(raised(middle)).cost <= budget:
            high = middle
        else:
            low = middle
    return raised(high)
