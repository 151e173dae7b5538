"""Thresholds for a budget, an accuracy or a guarantee, written to a policy file.

Solve on images the model was not trained on. A guarantee (--certify) takes half of them for itself: the policy is then
the cheapest whose answers differ from the last exit's (or whose accuracy falls short of its) by at most --epsilon.

examples:
  exit-plugins solve dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images --split val \\
      --budget 0.4G -o policy.json
  exit-plugins solve dynperceiver_regnety_400mf --table val.npz --certify ucb --epsilon 0.02 -o policy.json
"""

import argparse

from ..exits.confidence import fit_temperatures
from ..exits.control import cap_policy
from ..exits.policy import describe_model
from ..exits.risk import LOSSES, RISK_METHODS, certify
from ..exits.table import ExitTable
from ..exits.thresholds import METHODS, SWEEPS, policy_path, solve_thresholds
from .common import (
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    add_model_arguments,
    amount,
    collect,
    costs_of,
    is_main,
    open_data,
    open_model,
    parse_budget,
    percent,
    print_json,
    start_processes,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, split="validation")
    add_confidence_arguments(parser)
    add_cost_arguments(parser)
    parser.add_argument("--table", metavar="FILE", help="solve on this exit table instead of running the model")
    parser.add_argument("--save-table", metavar="FILE", help="write the exit table (.npz)")
    goal = parser.add_argument_group("goal (one of)").add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget", metavar="COST", help="highest mean cost per image: 0.4e9, 400M, 12ms, or 60%% of the last exit"
    )
    goal.add_argument("--accuracy", type=float, metavar="A", help="lowest accuracy, e.g. 0.9")
    goal.add_argument("--drop", type=float, metavar="D", help="highest loss of accuracy to the last exit, e.g. 0.005")
    goal.add_argument("--certify", choices=RISK_METHODS, help="cheapest policy with a guarantee, see --epsilon")
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=METHODS, default="lagrangian", help="(default: %(default)s)")
    how.add_argument("--sweep", choices=SWEEPS, help="of --method msdnet")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and of --method genetic (default: 0)")
    how.add_argument(
        "--temperatures", action="store_true", help="fit one temperature per exit first (on the same images)"
    )
    how.add_argument("--max-exit", type=int, metavar="K", help="hard cap: no image goes beyond exit K (1 is the first)")
    risk = parser.add_argument_group("guarantee")
    risk.add_argument("--epsilon", type=float, default=0.02, metavar="E", help="risk allowed (default: %(default)s)")
    risk.add_argument(
        "--delta", type=float, default=0.1, metavar="D", help="chance that it fails (default: %(default)s)"
    )
    risk.add_argument("--loss", choices=LOSSES, default="disagreement", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", default="policy.json", metavar="FILE", help="(default: %(default)s)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.table:
        table = ExitTable.load(args.table)
        model = open_model(args, needs_weights=False)
    else:
        if not args.data:
            raise ValueError("give --data to run the model on, or --table with a table that evaluate wrote.")
        start_processes(args)
        data, names = open_data(args)
        model = open_model(args, num_classes=len(names) or None)
        table = collect(model, data, args, args.measure or "max_softmax", save=args.save_table)
    if not is_main():
        return 0
    if table.num_exits != model.num_exits:
        raise ValueError(f"the table has {table.num_exits} exits and {args.model} has {model.num_exits}.")
    if args.measure and args.measure != table.measure:
        table = table.with_confidence(args.measure)
    if args.temperatures:
        if table.logits is None:
            raise ValueError("temperatures need a table with logits.")
        table = table.with_confidence(temperatures=fit_temperatures(table.logits, table.target))
    costs, unit = costs_of(args, model)
    options = {"method": args.method}
    if args.sweep:
        options["sweep"] = args.sweep
    if args.method == "genetic":
        options["seed"] = args.seed
    if args.certify:
        solving, apart = table.split(0.5, args.seed)
        path = policy_path(solving, costs, model=describe_model(model), **options)
        policy = certify(path, apart, args.epsilon, args.delta, args.certify, args.loss, args.seed)
    else:
        target = {}
        if args.budget is not None:
            target["budget"] = parse_budget(args.budget, costs)
        else:
            target["accuracy"] = args.accuracy
            if args.drop is not None:
                target["accuracy"] = max(0.0, float(table.correct[-1].mean()) - args.drop)
        policy = solve_thresholds(table, costs, model=model, **target, **options)
    if args.max_exit is not None:
        policy = cap_policy(policy, max_exit=args.max_exit - 1)
    policy.save(args.output)
    if args.json:
        print_json({"policy": str(args.output), "thresholds": [str(t) for t in policy.thresholds], **_about(policy)})
        return 0
    about = policy.source
    print(
        f"{args.output}: accuracy {percent(about['accuracy'])}, mean cost {amount(about['cost'], unit)} "
        f"({percent(about['cost'] / costs[-1])} of the last exit), on the {about['samples']['count']} images it was "
        "solved on"
    )
    print("thresholds", ", ".join(f"{t:.4g}" for t in policy.thresholds))
    if policy.certificate:
        c = policy.certificate
        chance = "in expectation" if c["delta"] is None else f"with probability {1 - c['delta']:.0%}"
        count = c["samples"]["count"]
        print(f"certified ({c['method']}, {count} images): {c['loss']} at most {c['epsilon']:.2%}, {chance}")
    return 0


def _about(policy) -> dict:
    return {"source": policy.source, "certificate": policy.certificate, "max_exit": policy.max_exit}
