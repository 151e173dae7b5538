"""Accuracy, cost and calibration of every exit on a labelled data set, and of a policy.

Runs over several processes too (torchrun --nproc_per_node 2 -m exit_plugins evaluate ...), with the same numbers. With
--save-table an interrupted run goes on where it stopped.

example:
  exit-plugins evaluate dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images \\
      --save-table test.npz --policy policy.json
"""

import argparse

import numpy as np

from ..exits.evaluation import anytime_curve, calibration, ensemble_curve, evaluate_policy
from ..exits.policy import ExitPolicy
from ..exits.table import ExitTable
from .common import (
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    amount,
    costs_of,
    is_main,
    open_data,
    percent,
    print_json,
    print_table,
    start_processes,
)
from .models import add_force_argument, add_model_arguments, data_config, known_model, match_classes, open_model
from .tables import check_table, check_weights, collect, fit_table, overlap_note, overlap_record


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


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy) if args.policy else None
    measure = args.measure or (policy.measure if policy else "max_softmax")
    if args.table:
        table = ExitTable.load(args.table)
        known = known_model(args, policy, table)
        model = open_model(args, known, needs_weights=False)
        check_table(table, model)
        config = data_config(args, model, known)
        if args.measure and args.measure != table.measure:
            table = table.with_confidence(args.measure)
    else:
        if not args.data:
            raise ValueError("give --data to run the model on, or --table with a table that evaluate wrote.")
        start_processes(args)
        known = known_model(args, policy)
        data, names = open_data(args)
        model = open_model(args, known, num_classes=len(names) or None)
        config = data_config(args, model, known)
        temperatures = policy.temperatures.tolist() if policy else None
        data = match_classes(data, model, known)
        table, _ = collect(model, data, args, config, measure, temperatures, save=args.save_table)
    if not is_main():
        return 0
    costs, unit = costs_of(args, model, config)
    anytime, honest = anytime_curve(table, costs), calibration(table)
    ensemble = ensemble_curve(table, costs) if table.logits is not None else None
    result = None
    if policy is not None:
        policy.check_model(model)
        check_weights(policy, (table.about or {}).get("weights"), args.force)
        result = evaluate_policy(policy, fit_table(table, policy), costs)
        overlap = policy.overlap(table)
    if args.json:
        print_json(
            {
                "model": args.model,
                "samples": table.num_samples,
                "cost_unit": unit,
                "exits": [{**p.to_dict(), **c.to_dict()} for p, c in zip(anytime, honest, strict=True)],
                "ensemble": None if ensemble is None else [p.to_dict() for p in ensemble],
                "policy": None if result is None else {**result.to_dict(), **overlap_record(overlap)},
            }
        )
        return 0
    print(f"{args.model} on {table.num_samples} images")
    rows = []
    for k, (point, exit_) in enumerate(zip(anytime, honest, strict=True)):
        low, high = point.interval
        row = [
            f"exit {k + 1}",
            amount(point.cost, unit),
            percent(point.accuracy),
            f"[{100 * low:.1f}, {100 * high:.1f}]",
        ]
        row += [percent(ensemble[k].accuracy)] if ensemble else []
        row += [percent(exit_.ece), "-" if np.isnan(exit_.auroc) else f"{exit_.auroc:.3f}"]
        rows.append(row)
    head = ["", "cost", "accuracy", "95 %", *(["ensemble"] if ensemble else []), "ECE", "AUROC"]
    print_table(head, rows)
    if result is not None:
        low, high = result.interval
        if overlap:
            print(f"\nno test: {overlap_note(overlap, table)}")
        print(
            f"\npolicy {args.policy}: accuracy {percent(result.accuracy)} [{100 * low:.1f}, {100 * high:.1f}], "
            f"mean cost {amount(result.cost, unit)} ({percent(result.cost / costs[-1])} of the last exit)"
        )
        print(f"as many leaving at each exit, but at random: accuracy {percent(result.random_accuracy)}")
        target = policy.source.get("target", {}).get("budget")
        if target is not None and unit == "MACs":
            print(f"budget {amount(target, unit)}: {percent(result.cost / target)} of it spent here")
        print_table(
            ["", "images", "accuracy"],
            [
                [f"exit {k + 1}", percent(share), "-" if np.isnan(a) else percent(a)]
                for k, (share, a) in enumerate(zip(result.shares, result.exit_accuracy, strict=True))
            ],
        )
    return 0
