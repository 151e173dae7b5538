"""Accuracy, cost and calibration of every exit on a labelled data set, and of a policy.

Runs over several processes too (torchrun --nproc_per_node 2 -m exit_plugins evaluate ...), with the same numbers. With
--save-table an interrupted run goes on where it stopped.

example:
  exit-plugins evaluate dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images \\
      --save-table test.npz --policy policy.json
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exits.calibration import Calibration, calibration
from ..exits.evaluation import AnytimePoint, PolicyResult, anytime_curve, ensemble_curve, evaluate_policy
from ..exits.latency import exit_shares_of
from ..exits.policy import ExitPolicy
from .common import (
    Output,
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    amount,
    is_main,
    percent,
    print_json,
    print_table,
)
from .inputs import Inputs, open_inputs
from .models import add_force_argument, add_model_arguments
from .tables import check_batches, check_weights, fit_table, overlap_note, overlap_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, splits=("validation", "test"))
    add_confidence_arguments(parser)
    add_cost_arguments(parser)
    parser.add_argument("--table", metavar="FILE", help="evaluate this exit table instead of running the model")
    parser.add_argument("--save-table", metavar="FILE", help="write the exit table (.npz), for solve and report")
    parser.add_argument("--policy", metavar="FILE", help="evaluate this policy too")
    add_force_argument(parser)
    add_json_argument(parser)


def outputs(args: argparse.Namespace) -> list[Output]:
    return [Output("save_table", args.save_table)] if args.save_table else []


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy) if args.policy else None
    inputs = open_inputs(args, policy)
    if not is_main():
        return 0
    table, costs = inputs.table, inputs.costs
    exits = list(zip(anytime_curve(table, costs), calibration(table), strict=True))
    ensemble = ensemble_curve(table, costs) if table.logits is not None else None
    under = None if policy is None else _under(policy, args, inputs)
    if args.json:
        print_json(
            {
                "model": args.model,
                "samples": table.num_samples,
                "cost_unit": inputs.unit,
                "exits": [{**p.to_dict(), **c.to_dict()} for p, c in exits],
                "ensemble": None if ensemble is None else [p.to_dict() for p in ensemble],
                "policy": None if under is None else {**under.result.to_dict(), **overlap_record(under.overlap)},
            }
        )
        return 0
    print(f"{args.model} on {table.num_samples} images")
    _print_exits(exits, ensemble, inputs.unit)
    if under is not None:
        _print_policy(under, args, inputs)
    return 0


@dataclass(frozen=True)
class _UnderPolicy:
    """The figures of a policy, and how many of the samples it was made from (None: not known)."""

    policy: ExitPolicy
    result: PolicyResult
    overlap: int | None


def _under(policy: ExitPolicy, args: argparse.Namespace, inputs: Inputs) -> _UnderPolicy:
    table = inputs.table
    policy.check_model(inputs.model)
    check_weights(policy, (table.about or {}).get("weights"), args.force)
    fitted, costs = fit_table(table, policy), inputs.costs
    if inputs.latency:
        (profile,) = inputs.latency
        check_batches(policy, profile.batch_size, profile.measured["mode"])
        costs = profile.costs(exit_shares_of(policy, fitted))
    result = evaluate_policy(policy, fitted, costs)
    return _UnderPolicy(policy, result, policy.overlap(table))


def _print_exits(
    exits: Sequence[tuple[AnytimePoint, Calibration]], ensemble: Sequence[AnytimePoint] | None, unit: str
) -> None:
    rows = []
    for k, (point, exit_) in enumerate(exits):
        assert point.cost is not None  # the inputs know the costs
        row = [f"exit {k + 1}", amount(point.cost, unit), percent(point.accuracy), _interval(point.interval)]
        row += [percent(ensemble[k].accuracy)] if ensemble else []
        row += [percent(exit_.ece), "-" if np.isnan(exit_.auroc) else f"{exit_.auroc:.3f}"]
        rows.append(row)
    print_table(["", "cost", "accuracy", "95 %", *(["ensemble"] if ensemble else []), "ECE", "AUROC"], rows)


def _print_policy(under: _UnderPolicy, args: argparse.Namespace, inputs: Inputs) -> None:
    result, unit = under.result, inputs.unit
    assert result.cost is not None  # the inputs know the costs
    if under.overlap:
        print(f"\nno test: {overlap_note(under.overlap, inputs.table)}")
    print(
        f"\npolicy {args.policy}: accuracy {percent(result.accuracy)} {_interval(result.interval)}, mean cost "
        f"{amount(result.cost, unit)} ({percent(result.cost / inputs.costs[-1])} of the last exit)"
    )
    print(f"as many leaving at each exit, but at random: accuracy {percent(result.random_accuracy)}")
    target: dict[str, Any] = under.policy.source.get("target", {})
    if target.get("budget") is not None and unit == ("s" if "latency" in under.policy.source else "MACs"):
        budget = target["budget"]
        print(f"budget {amount(budget, unit)}: {percent(result.cost / budget)} of it spent here")
    print_table(
        ["", "images", "accuracy"],
        [
            [f"exit {k + 1}", percent(share), "-" if np.isnan(a) else percent(a)]
            for k, (share, a) in enumerate(zip(result.shares, result.exit_accuracy, strict=True))
        ],
    )


def _interval(interval: tuple[float, float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
