"""What the exits are worth: anytime and budgeted curves with intervals, exit shares, calibration, similarity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .policy import ExitPolicy
from .table import ExitTable
from .thresholds import check_costs, exit_counts, mean_cost, solve_thresholds

__all__ = [
    "AnytimePoint",
    "BudgetPoint",
    "Calibration",
    "PolicyResult",
    "anytime_curve",
    "bootstrap_interval",
    "budgeted_curve",
    "calibration",
    "cka",
    "check_same_confidence",
    "cka_matrix",
    "ensemble_curve",
    "evaluate_policy",
]

Interval = tuple[float, float]


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval | np.ndarray:
    """Percentile bootstrap interval of the mean of per-sample ``values``.

    Args:
        values: (N,), or (R, N) for R means over the same samples, which are then resampled together.
        level: coverage, e.g. 0.95.

    Returns:
        (low, high), or (R, 2) for values (R, N). NaN for no samples.
    """
    values = np.asarray(values, dtype=np.float64)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"expected 0 < level < 1 and resamples >= 1, got {level} and {resamples}.")
    rows = np.atleast_2d(values)
    if rows.shape[1] == 0:
        found = np.full((len(rows), 2), np.nan)
    else:
        rng = np.random.default_rng(seed)
        n, chunk = rows.shape[1], 50
        means = []
        for start in range(0, resamples, chunk):
            # How often each sample is drawn is all that matters: one product instead of a gather per resample.
            draws = rng.integers(n, size=(min(chunk, resamples - start), n))
            weight = np.stack([np.bincount(draw, minlength=n) for draw in draws]).astype(np.float64)
            means.append(rows @ weight.T / n)
        tail = (1 - level) / 2
        found = np.quantile(np.concatenate(means, axis=1), [tail, 1 - tail], axis=1).T
    return tuple(found[0].tolist()) if values.ndim == 1 else found


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
    costs: Sequence[float] | np.ndarray | None = None,
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
    _check_not_empty(table)
    intervals = bootstrap_interval(table.correct, level, resamples, seed)
    return [
        AnytimePoint(k, None if costs is None else float(costs[k]), float(table.correct[k].mean()), tuple(interval))
        for k, interval in enumerate(intervals.tolist())
    ]


def ensemble_curve(
    table: ExitTable,
    costs: Sequence[float] | np.ndarray,
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
    shares: np.ndarray
    random_accuracy: float
    exits: np.ndarray
    correct: np.ndarray
    exit_accuracy: np.ndarray
    classes: np.ndarray
    class_shares: np.ndarray
    class_accuracy: np.ndarray

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
    costs: Sequence[float] | np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> PolicyResult:
    """What ``policy`` gets and spends on ``table``; ``costs`` (K,) default to those the policy was solved for.

    ValueError if the table's confidences are not those the policy's thresholds are for.
    """
    _check_not_empty(table)
    check_same_confidence(policy, table)
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
        interval=bootstrap_interval(correct, level, resamples, seed),
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
    """One budget, solved on one split and measured on another; accuracies are fractions, costs means per sample.

    Attributes:
        budget: the target; ``solved_accuracy`` and ``solved_cost`` what it came to on the split it was solved on.
        accuracy, interval, cost: on the test split, beside the target.
        shares: (K,) of the test samples per exit; ``random_accuracy`` what chance would get with them.
        thresholds: (K,), and the whole ``policy``.
        result: everything else of the test split, shares per class for one.
    """

    budget: float
    accuracy: float
    interval: Interval
    cost: float
    shares: np.ndarray
    thresholds: np.ndarray
    solved_accuracy: float
    solved_cost: float
    policy: ExitPolicy
    result: PolicyResult

    @property
    def random_accuracy(self) -> float:
        """See ``PolicyResult``."""
        return self.result.random_accuracy

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "accuracy": self.accuracy,
            "random_accuracy": self.random_accuracy,
            "interval": list(self.interval),
            "cost": self.cost,
            "shares": self.shares.tolist(),
            "thresholds": [float(t) if np.isfinite(t) else str(t) for t in self.thresholds],
            "solved_accuracy": self.solved_accuracy,
            "solved_cost": self.solved_cost,
        }


def budgeted_curve(
    table_val: ExitTable,
    table_test: ExitTable,
    costs: Sequence[float] | np.ndarray,
    budgets: Sequence[float] | np.ndarray | int,
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
    """
    costs = check_costs(costs, table_val.num_exits)
    if table_test.num_exits != table_val.num_exits:
        raise ValueError(f"tables of {table_val.num_exits} and {table_test.num_exits} exits are not of one model.")
    if isinstance(budgets, (int, np.integer)):
        budgets = np.linspace(costs[0], costs[-1], int(budgets))
    points = []
    for budget in budgets:
        policy = solve_thresholds(table_val, costs, budget=float(budget), method=method, **options)
        result = evaluate_policy(policy, table_test, costs, level, resamples, seed)
        points.append(
            BudgetPoint(
                budget=float(budget),
                accuracy=result.accuracy,
                interval=result.interval,
                cost=result.cost,
                shares=result.shares,
                thresholds=policy.thresholds,
                solved_accuracy=policy.source["accuracy"],
                solved_cost=policy.source["cost"],
                policy=policy,
                result=result,
            )
        )
    return points


def _check_not_empty(table: ExitTable) -> None:
    if table.num_samples == 0:
        raise ValueError("the table holds no samples; there is nothing to evaluate.")


def check_same_confidence(policy: ExitPolicy, table: ExitTable) -> None:
    if policy.measure != table.measure or not np.allclose(policy.temperatures, table.temperatures):
        raise ValueError(
            f"the policy's thresholds are for {policy.measure} at temperatures {policy.temperatures.tolist()}, the "
            f"table holds {table.measure} at {list(table.temperatures)}; collect it with the policy's, or use "
            "ExitTable.with_confidence."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """How far an exit's confidence can be believed.

    Attributes:
        ece: expected calibration error over equal-width bins (Guo et al. 2017, eq. 3), in [0, 1].
        auroc: probability that a right answer has a higher confidence than a wrong one (failure prediction); NaN when
            all answers are right or all wrong.
        aurc: area under the risk-coverage curve: the mean error among the most confident, over all coverages.
        bin_confidence, bin_accuracy, bin_share: (bins,) of the reliability diagram; NaN in an empty bin.
    """

    exit_index: int
    ece: float
    auroc: float
    aurc: float
    bin_confidence: np.ndarray
    bin_accuracy: np.ndarray
    bin_share: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        return {
            "exit_index": self.exit_index,
            "ece": self.ece,
            "auroc": None if np.isnan(self.auroc) else self.auroc,
            "aurc": self.aurc,
        }


def calibration(table: ExitTable, bins: int = 15) -> list[Calibration]:
    """Calibration of every exit. Confidences must lie in [0, 1]; samples whose confidence is NaN are left out."""
    from scipy.stats import rankdata

    _check_not_empty(table)
    if bins < 1:
        raise ValueError(f"expected at least one bin, got {bins}.")
    found = []
    for k in range(table.num_exits):
        known = ~np.isnan(table.confidence[k])
        sure, right = table.confidence[k][known].astype(np.float64), table.correct[k][known].astype(np.float64)
        if len(sure) == 0 or sure.min() < 0 or sure.max() > 1 + 1e-6:
            raise ValueError(f"exit {k + 1} has no confidences in [0, 1] to be calibrated.")
        place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # (low, high], zero in the first
        count = np.bincount(place, minlength=bins)
        with np.errstate(invalid="ignore"):
            bin_confidence = np.bincount(place, weights=sure, minlength=bins) / count
            bin_accuracy = np.bincount(place, weights=right, minlength=bins) / count
        share = count / len(sure)
        gaps = np.where(count > 0, np.abs(bin_confidence - bin_accuracy), 0.0)
        positives = right.sum()
        negatives = len(right) - positives
        auroc = np.nan
        if positives and negatives:
            ranks = rankdata(sure)
            auroc = (ranks[right == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)
        found.append(
            Calibration(k, float(share @ gaps), float(auroc), _aurc(sure, right), bin_confidence, bin_accuracy, share)
        )
    return found


def _aurc(sure: np.ndarray, right: np.ndarray) -> float:
    # Samples with equal confidence are accepted together; each takes the mean error of its group's coverages.
    order = np.argsort(-sure, kind="stable")
    values, wrong = sure[order], 1 - right[order]
    ends = np.flatnonzero(np.append(values[:-1] != values[1:], True))
    sizes = np.diff(ends, prepend=-1)
    return float(np.repeat(np.cumsum(wrong)[ends] / (ends + 1), sizes).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Similarity of exits
# ---------------------------------------------------------------------------------------------------------------------


def cka(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same samples (Kornblith et al. 2019, eq. 5).

    Args:
        x: (N, ...) and
        y: (N, ...), any number of features each; class indices (N,) are taken one-hot.

    Returns:
        A number in [0, 1], 1 for representations equal up to rotation and scale; NaN if one of them is constant.
        Dyn-Adapter's Fig. 4 compares layers and labels so.
    """
    x, y = _features(x), _features(y)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"cka compares two views of the same samples, got {len(x)} and {len(y)}.")
    if min(x.shape[1], y.shape[1]) > len(x):
        # Fewer samples than features: the same figures from the N x N products.
        gram_x, gram_y = x @ x.T, y @ y.T
        cross, own_x, own_y = (gram_x * gram_y).sum(), (gram_x**2).sum(), (gram_y**2).sum()
    else:
        cross, own_x, own_y = ((x.T @ y) ** 2).sum(), ((x.T @ x) ** 2).sum(), ((y.T @ y) ** 2).sum()
    if own_x == 0 or own_y == 0:
        return float("nan")
    return float(cross / np.sqrt(own_x * own_y))


def cka_matrix(features: Sequence[np.ndarray | Tensor], target: np.ndarray | Tensor | None = None) -> np.ndarray:
    """`cka` (R, R) of every pair of representations; with ``target`` (N,) the labels are the last row and column."""
    views = [*features] if target is None else [*features, target]
    matrix = np.ones((len(views), len(views)))
    for i, first in enumerate(views):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = cka(first, views[j])
    return matrix


def _features(values: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    values = np.asarray(values)
    if values.ndim == 1 and values.dtype.kind in "iub":
        values = (values[:, None] == np.unique(values)).astype(np.float64)
    values = values.reshape(len(values), -1).astype(np.float64)
    return values - values.mean(0) if len(values) else values
