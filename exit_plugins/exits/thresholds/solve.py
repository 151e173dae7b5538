"""The door: a table, costs and a target in; a policy that knows where it comes from out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..costs import check_costs
from ..deprecation import warn_old
from ..digests import describe_model
from ..policy import ExitPolicy, check_same_model, check_same_origin
from ..protocol import AnyModel
from ..samples import SampleRecord
from ..table import ExitTable, check_not_empty
from .methods import METHODS
from .split import Point, Split, Target, exit_shares

__all__ = ["PolicyMaker", "solve_thresholds"]

_ABOUT = ("weights", "input_size", "classes")  # what a table's ``about`` says of the model beside ``model``
# Costs this near are equal to a holdout, as a share of the range of costs: ours, half a point of what can be saved.
_NEAR_COST = 0.005


def solve_thresholds(
    table: ExitTable,
    costs: Sequence[float] | NDArray[Any],
    budget: float | None = None,
    accuracy: float | None = None,
    method: str = "lagrangian",
    model: AnyModel | Mapping[str, Any] | None = None,
    holdout: ExitTable | None = None,
    max_exit: int | None = None,
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
            error of the best; the budget still holds on ``table``. Of the same model and weights.
        max_exit: 0-based index of the last exit any sample may reach. Thresholds are solved under that cap, as
            ``control.cap_policy`` sets it on a policy that was solved without one.
        options: of the method; shares of ``sweep`` are of the exits up to ``max_exit``.

    Returns:
        ExitPolicy with the measure and temperatures of the table; ``source`` records how it was solved and what it
        got and spent on ``table``.

    Raises:
        ValueError: an empty table, an unknown method, or a target out of reach; the message names the nearest one.
    """
    check_not_empty(table, "thresholds are solved on a labelled calibration split")
    costs = check_costs(costs, table.num_exits)
    if (budget is None) == (accuracy is None):
        raise ValueError("give either budget= or accuracy=, and not both.")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if max_exit is not None and (type(max_exit) is not int or not 0 <= max_exit < table.num_exits):
        raise ValueError(f"max_exit must be an exit index below {table.num_exits}, got {max_exit!r}.")
    split = Split.of(table, costs, max_exit)
    target = _target(split, budget, accuracy)
    options = _options_in_use(method, options)
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
            f"accuracy {accuracy} is out of reach: the best that {method!r} found on this table"
            + ("" if max_exit is None else f" up to exit {max_exit + 1}")
            + f" is {highest:.4f}."
        )
    if holdout is not None:
        _check_holdout(holdout, table)
        best = _choose_on(Split.of(holdout, costs, max_exit), points, best, split, target)
    after: dict[str, Any] = {}
    if holdout is not None:
        after["holdout_samples"] = SampleRecord.of(holdout.sample, holdout.num_samples).to_json()
    if options:
        after["options"] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in options.items()}
    wanted = {"budget": float(budget)} if budget is not None else {"accuracy": accuracy}
    return PolicyMaker(table, split, model, costs, max_exit)(best, {"method": method, "target": wanted}, after)


def _options_in_use(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` without those that went: which samples to explore and how many starts to keep is the method's."""
    gone = [name for name in ("explore_samples", "keep") if method == "lagrangian" and name in options]
    for name in gone:
        warn_old(f"the option {name} of method 'lagrangian'", "leave it out: it has no effect any more", stacklevel=4)
    return {name: value for name, value in options.items() if name not in gone}


class PolicyMaker:
    """Makes policies out of points found on one table; what all of them remember is worked out once."""

    def __init__(
        self,
        table: ExitTable,
        split: Split,
        model: AnyModel | Mapping[str, Any] | None,
        costs: NDArray[Any],
        max_exit: int | None = None,
    ) -> None:
        self.table, self.split, self.costs, self.max_exit = table, split, costs, max_exit
        self.model = _model_of(table, model)
        self.samples = {
            "samples": SampleRecord.of(table.sample, table.num_samples).to_json(),
            "sha256": table.digest(),
        }

    def __call__(self, point: Point, how: dict[str, Any], after: dict[str, Any] | None = None) -> ExitPolicy:
        """The policy of ``point``; ``how`` it was found begins its ``source``, what came ``after`` ends it."""
        beyond = self.table.num_exits - self.split.num_exits  # exits that a cap leaves to nobody
        reached = {
            "accuracy": point.correct / self.split.num_samples,
            "cost": point.cost,
            "shares": [*map(float, exit_shares(self.split, point.thresholds)), *[0.0] * beyond],
        }
        return ExitPolicy(
            thresholds=np.append(point.thresholds, np.full(beyond, -np.inf)),
            measure=self.table.measure,
            temperatures=np.array(self.table.temperatures),
            costs=self.costs,
            model=self.model,
            source={**how, **self.samples, **reached, **(after or {})},
            max_exit=self.max_exit,
        )


def _model_of(table: ExitTable, model: AnyModel | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the policy remembers of its model: what the caller says, and what the table knows."""
    about = table.about or {}
    known: Mapping[str, Any] | None = about.get("model")
    described = model if model is None or isinstance(model, Mapping) else describe_model(model)
    if described is not None and known is not None:
        check_same_model(described, known, "the table")
        described = {**known, **{key: value for key, value in described.items() if value is not None}}
    described = known if described is None else described
    if described is None:
        return None
    return {**{key: about[key] for key in _ABOUT if about.get(key) is not None}, **described}


def _target(split: Split, budget: float | None, accuracy: float | None) -> Target:
    if accuracy is not None:
        if not 0.0 <= accuracy <= 1.0:
            raise ValueError(f"accuracy is a fraction between 0 and 1, got {accuracy}.")
        return Target(need=int(np.ceil(accuracy * split.num_samples - 1e-9)))
    assert budget is not None  # one of the two is given, the door has seen to it
    if budget == np.inf:
        raise ValueError(f"a budget is a finite number; for no limit give the last exit's cost, {split.costs[-1]:.6g}.")
    least = split.point(split.everybody_first()).cost
    if not budget >= least:
        raise ValueError(
            f"a budget of {budget:.6g} cannot be met: the least possible mean cost on this table is {least:.6g}"
            + (" (the first exit)." if least == split.costs[0] else " (some confidences are NaN and never leave).")
        )
    return Target(float(budget))


def _check_holdout(holdout: ExitTable, table: ExitTable) -> None:
    if holdout.num_exits != table.num_exits or holdout.num_samples == 0:
        raise ValueError(
            f"a holdout of {holdout.num_exits} exits and {holdout.num_samples} samples does not fit a table of "
            f"{table.num_exits} exits."
        )
    check_same_origin(table, holdout)


def _choose_on(other: Split, points: list[Point], best: Point, split: Split, target: Target) -> Point:
    """Of the points as good as the best, up to one standard error of the paired difference, the best on ``other``."""
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
            equal = point.cost <= best.cost + _NEAR_COST * split.extra[-1]
        if equal:
            near.append(point)
    return max(near, key=lambda p: (other.point(p.thresholds).correct, target.score(p)))
