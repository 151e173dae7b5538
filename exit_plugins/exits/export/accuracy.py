"""What a lower precision costs: both exports on labelled images, thresholds solved again, and a bound on the fall."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..collecting import collect_exits
from ..evaluation import bootstrap_interval, evaluate_policy
from ..policy import ExitPolicy
from ..table import ExitTable
from ..thresholds import msdnet_thresholds, solve_thresholds
from ..thresholds.msdnet import closed_as_inf
from .exported import ExportedSegments

__all__ = ["check_max_drop", "policy_for"]


def check_max_drop(max_drop: float) -> None:
    """ValueError unless ``max_drop`` is a share of the images."""
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop is a share of the images from 0 to 1, as 0.005 for half a point, got {max_drop}.")


def policy_for(
    after: ExportedSegments, before: ExportedSegments, policy: ExitPolicy, held_out: Iterable[Any], max_drop: float
) -> tuple[ExitPolicy, ExitTable, dict[str, Any]]:
    """The policy for ``after``, its table of ``held_out``, and what both exports get there, in plain JSON values.

    Half of the images solve thresholds, for both exports and by the same rule; the other half says what these get.

    Args:
        after: the export in the lower precision.
        before: the float32 export it was made from; ``policy`` is its own.
        held_out: batches of (images (B, C, H, W), target (B,)), the same each time it is read.
        max_drop: how much the accuracy may fall, a share of the images: at the last exit of all of them, and under
            the policies.

    Raises:
        ValueError: ``held_out`` has fewer than two images, or gives others when it is read again.
        RuntimeError: the accuracy falls by more.
    """
    old, new = (
        collect_exits(each, held_out, measure=policy.measure, temperatures=policy.temperatures.tolist())
        for each in (before, after)
    )
    assert old.sample is not None and new.sample is not None  # as in every table that was collected
    if not np.array_equal(old.sample, new.sample):
        raise ValueError("held_out gives other images each time it is read; do not shuffle or augment it.")
    if len(new) < 2:
        raise ValueError("held_out needs images to solve thresholds on and others to compare the accuracy on.")
    (solving_old, testing_old), (solving, testing) = old.split(0.5), new.split(0.5)
    spent = evaluate_policy(policy, solving_old)
    budget = (policy.source.get("target") or {}).get("budget", spent.cost)
    policies = [_solved(policy, table, budget, spent.shares) for table in (solving_old, solving)]
    results = [evaluate_policy(p, table) for p, table in zip(policies, (testing_old, testing), strict=True)]
    last = policy.last_exit
    name = after.manifest["precision"]
    figures = {
        "at_last_exit": _compared(old.correct[last], new.correct[last], name),
        "under_policy": _compared(results[0].correct, results[1].correct, name),
    }
    for where, found in figures.items():
        if found["drop"] > max_drop + 1e-9:
            raise RuntimeError(_refusal(where.replace("_", " "), found, name, max_drop))
    report = {
        "samples": len(new),
        "accuracy_float32": old.correct.mean(1).tolist(),
        f"accuracy_{name}": new.correct.mean(1).tolist(),
        "budget": budget,
        "cost_float32": results[0].cost,
        f"cost_{name}": results[1].cost,
        **figures,
        "max_drop": max_drop,
    }
    return policies[1], new, report


def _solved(policy: ExitPolicy, table: ExitTable, budget: float | None, shares: NDArray[Any]) -> ExitPolicy:
    """Thresholds on ``table`` for the budget; a policy that knows no costs keeps the shares that leave at its exits."""
    model = {key: value for key, value in (policy.model or {}).items() if key != "weights"}
    if policy.costs is not None:
        return solve_thresholds(table, policy.costs, budget=budget, model=model, max_exit=policy.max_exit)
    thresholds = closed_as_inf(msdnet_thresholds(table, shares))
    return ExitPolicy(thresholds, table.measure, np.array(table.temperatures), model=model, max_exit=policy.max_exit)


def _compared(before: NDArray[Any], after: NDArray[Any], name: str) -> dict[str, Any]:
    """Accuracies of answers right or wrong (N,), the fall, and its 95 % interval over the same images."""
    moved = before.astype(np.int64) - after
    return {
        "samples": len(moved),
        "float32": float(before.mean()),
        name: float(after.mean()),
        "drop": int(moved.sum()) / len(moved),
        "interval": list(bootstrap_interval(moved)),
    }


def _refusal(where: str, found: dict[str, Any], name: str, max_drop: float) -> str:
    low, high = found["interval"]
    return (
        f"{name} was not written: {where} the accuracy falls from {found['float32']:.2%} to {found[name]:.2%}, by "
        f"{100 * found['drop']:.2f} points (95 % interval {100 * low:.2f} to {100 * high:.2f}, {found['samples']} "
        f"images), and max_drop allows {100 * max_drop:.2f}. Calibrate on more images, or allow more."
    )
