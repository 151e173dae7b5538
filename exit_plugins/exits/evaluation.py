"""What the exits are worth: anytime and budgeted curves with intervals, and where samples leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .costs import check_costs, exit_counts, mean_cost
from .deprecation import moved, warn_old
from .policy import ExitPolicy, check_same_origin
from .table import ExitTable, check_not_empty
from .thresholds import solve_thresholds

__all__ = [
    "AnytimePoint",
    "BudgetPoint",
    "PolicyResult",
    "anytime_curve",
    "bootstrap_interval",
    "budgeted_curve",
    "ensemble_curve",
    "evaluate_policy",
]

__getattr__ = moved(
    __name__,
    {
        "Calibration": "exit_plugins.exits.calibration.Calibration",
        "calibration": "exit_plugins.exits.calibration.calibration",
        "cka": "exit_plugins.exits.similarity.cka",
        "cka_matrix": "exit_plugins.exits.similarity.cka_matrix",
    },
)

Interval = tuple[float, float]


def bootstrap_interval(
    values: NDArray[Any], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval | NDArray[Any]:
    """Percentile bootstrap interval of the mean of per-sample ``values``.

    Args:
        values: (N,), or (R, N) for R means over the same samples, which are then resampled together.
        level: coverage, e.g. 0.95.

    Returns:
        (low, high), or (R, 2) for values (R, N). NaN for no samples.

    ValueError for a level outside of (0, 1), or no values.
    """
    values = np.asarray(values, dtype=np.float64)
    found = _intervals(np.atleast_2d(values), level, resamples, seed)
    return found[0] if values.ndim == 1 else np.array(found)


def _intervals(rows: NDArray[Any], level: float, resamples: int, seed: int) -> list[Interval]:
    """`bootstrap_interval` of every one of ``rows`` (R, N)."""
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"expected 0 < level < 1 and resamples >= 1, got {level} and {resamples}.")
    if rows.shape[1] == 0:
        return [(np.nan, np.nan)] * len(rows)
    rng = np.random.default_rng(seed)
    n, chunk = rows.shape[1], 50
    means = []
    for start in range(0, resamples, chunk):
        # How often each sample is drawn is all that matters: one product instead of a gather per resample.
        draws = rng.integers(n, size=(min(chunk, resamples - start), n))
        weight = np.stack([np.bincount(draw, minlength=n) for draw in draws]).astype(np.float64)
        means.append(rows @ weight.T / n)
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means, axis=1), [tail, 1 - tail], axis=1).tolist()
    return list(zip(low, high, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnytimePoint:
    """One exit when everybody leaves there: its cost, accuracy (a fraction) and interval (low, high)."""

    exit_index: int
    cost: float | None
    accuracy: float
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def anytime_curve(
    table: ExitTable,
    costs: Sequence[float] | NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[AnytimePoint]:
    """Accuracy of every exit over all samples, shallow to deep (anytime prediction; MSDNet, section 3).

    Args:
        table: K exits, N samples.
        costs: (K,) cumulative cost of each exit, in any unit.
        level, resamples, seed: of the bootstrap interval; the exits share their resamples.
    """
    costs = None if costs is None else check_costs(costs, table.num_exits)
    check_not_empty(table)
    intervals = _intervals(table.correct, level, resamples, seed)
    return [
        AnytimePoint(k, None if costs is None else float(costs[k]), float(table.correct[k].mean()), interval)
        for k, interval in enumerate(intervals)
    ]


def ensemble_curve(
    table: ExitTable,
    costs: Sequence[float] | NDArray[Any],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[AnytimePoint]:
    """`anytime_curve` of the FLOP-weighted running ensemble of exits, see ``exits.confidence.running_ensemble``."""
    return anytime_curve(table.running_ensemble(costs), costs, level, resamples, seed)


@dataclass(frozen=True)
class PolicyResult:
    """What a policy does on a table.

    Attributes:
        accuracy: fraction correct, and its bootstrap ``interval``.
        cost: mean cost per sample in the unit of ``costs``; None without costs.
        shares: (K,) share of the samples that left at each exit.
        random_accuracy: accuracy to expect where as many leave at each exit but chance says who: what is left of
            ``accuracy`` without the confidence (DVT, table 9). It is the exits' accuracies weighted by ``shares``.
        exits: (N,) exit each sample left at; ``correct`` (N,) whether its answer was right.
        exit_accuracy: (K,) accuracy of those who left at each exit, NaN where nobody did.
        classes: (C,) the classes of the table; ``class_shares`` (C, K) exit shares and ``class_accuracy`` (C,) of each.
    """

    accuracy: float
    interval: Interval
    cost: float | None
    shares: NDArray[Any]
    random_accuracy: float
    exits: NDArray[Any]
    correct: NDArray[Any]
    exit_accuracy: NDArray[Any]
    classes: NDArray[Any]
    class_shares: NDArray[Any]
    class_accuracy: NDArray[Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-sample arrays, for JSON; NaN becomes None."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "cost": self.cost,
            "shares": self.shares.tolist(),
            "random_accuracy": self.random_accuracy,
            "exit_accuracy": [None if np.isnan(a) else float(a) for a in self.exit_accuracy],
            "classes": self.classes.tolist(),
            "class_shares": self.class_shares.tolist(),
            "class_accuracy": self.class_accuracy.tolist(),
        }


def evaluate_policy(
    policy: ExitPolicy,
    table: ExitTable,
    costs: Sequence[float] | NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> PolicyResult:
    """What ``policy`` gets and spends on ``table``; ``costs`` (K,) default to those the policy was solved for.

    ValueError if the table's confidences are not those the policy's thresholds are for, or of another architecture
    (other weights of it are measured as they are); TypeError if it is no policy.
    """
    check_not_empty(table)
    if not isinstance(policy, ExitPolicy):
        raise TypeError(f"expected an ExitPolicy, got {type(policy).__name__}.")
    check_same_origin(policy, table, weights=False)
    if costs is None:
        costs = policy.costs
    costs = None if costs is None else check_costs(costs, table.num_exits)
    exits = policy.choose(table.confidence)
    correct = table.correct[exits, np.arange(table.num_samples)]
    num_exits = table.num_exits
    counts = exit_counts(exits, num_exits)
    classes, class_of = np.unique(table.target, return_inverse=True)
    per_class = np.bincount(class_of * num_exits + exits, minlength=len(classes) * num_exits)
    per_class = per_class.reshape(len(classes), num_exits)
    with np.errstate(invalid="ignore"):
        exit_accuracy = np.bincount(exits, weights=correct, minlength=num_exits) / counts
    return PolicyResult(
        accuracy=float(correct.mean()),
        interval=_intervals(correct[None], level, resamples, seed)[0],
        cost=None if costs is None else mean_cost(counts, costs),
        shares=counts / table.num_samples,
        random_accuracy=float(counts @ table.correct.mean(1) / table.num_samples),
        exits=exits,
        correct=correct,
        exit_accuracy=exit_accuracy,
        classes=classes,
        class_shares=per_class / per_class.sum(1, keepdims=True),
        class_accuracy=np.bincount(class_of, weights=correct) / per_class.sum(1),
    )


@dataclass(frozen=True)
class BudgetPoint:
    """One budget, solved on one split and measured on another.

    Attributes:
        budget: the target, a mean cost per sample.
        policy: what was solved for it; ``policy.source`` holds what it came to on the split it was solved on.
        result: what it does on the test split; accuracies are fractions, costs means per sample.
    """

    budget: float
    policy: ExitPolicy
    result: PolicyResult

    @property
    def accuracy(self) -> float:
        """On the test split, as ``interval`` and ``cost`` are: what curves are drawn of."""
        return self.result.accuracy

    @property
    def interval(self) -> Interval:
        return self.result.interval

    @property
    def cost(self) -> float:
        assert self.result.cost is not None  # budgeted_curve knows the costs
        return self.result.cost

    def to_dict(self) -> dict[str, Any]:
        """The point, for JSON; ``solved_accuracy`` and ``solved_cost`` are of the split it was solved on."""
        return {
            "budget": self.budget,
            "accuracy": self.accuracy,
            "random_accuracy": self.result.random_accuracy,
            "interval": list(self.interval),
            "cost": self.cost,
            "shares": self.result.shares.tolist(),
            "thresholds": [float(t) if np.isfinite(t) else str(t) for t in self.policy.thresholds],
            "solved_accuracy": self.policy.source["accuracy"],
            "solved_cost": self.policy.source["cost"],
        }

    def __getattr__(self, name: str) -> Any:
        if name not in _BUDGET_POINT:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        new, find = _BUDGET_POINT[name]
        warn_old(f"BudgetPoint.{name}", f"read point.{new}")
        return find(self)


# Copies of what the policy and the result hold: their old names, their new ones, and where those lie.
_BUDGET_POINT: dict[str, tuple[str, Callable[[BudgetPoint], Any]]] = {
    "shares": ("result.shares", lambda point: point.result.shares),
    "random_accuracy": ("result.random_accuracy", lambda point: point.result.random_accuracy),
    "thresholds": ("policy.thresholds", lambda point: point.policy.thresholds),
    "solved_accuracy": ("policy.source['accuracy']", lambda point: point.policy.source["accuracy"]),
    "solved_cost": ("policy.source['cost']", lambda point: point.policy.source["cost"]),
}


def budgeted_curve(
    table_val: ExitTable,
    table_test: ExitTable,
    costs: Sequence[float] | NDArray[Any],
    budgets: Sequence[float] | NDArray[Any] | int,
    method: str = "lagrangian",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> list[BudgetPoint]:
    """Budgeted batch classification (MSDNet, section 3): solve each budget on one split, measure it on another.

    Args:
        table_val: the split thresholds are solved on; the budget holds there.
        table_test: the split every figure is of; what is really spent there is ``cost``.
        costs: (K,) cumulative cost of each exit, in any unit.
        budgets: mean costs per sample in that unit, or how many to space evenly between the first and the last exit.
        method, options: as in ``solve_thresholds``.

    Returns:
        One BudgetPoint per budget, in the order given.

    Raises:
        ValueError: the tables are not of one model and its weights, or what ``solve_thresholds`` refuses.
    """
    costs = check_costs(costs, table_val.num_exits)
    if table_test.num_exits != table_val.num_exits:
        raise ValueError(f"tables of {table_val.num_exits} and {table_test.num_exits} exits are not of one model.")
    check_same_origin(table_val, table_test)
    if isinstance(budgets, (int, np.integer)):
        budgets = np.linspace(costs[0], costs[-1], int(budgets))
    points = []
    for budget in budgets:
        policy = solve_thresholds(table_val, costs, budget=float(budget), method=method, **options)
        result = evaluate_policy(policy, table_test, costs, level, resamples, seed)
        points.append(BudgetPoint(float(budget), policy, result))
    return points
